# What a decode policy keeps, written by `keep` and replayed as a mask, gives the numbers of the policy itself; decode= on plain names.
. "$CLI/lib.sh"
ok kv-trace synth --layers 3 --q-heads 8 --kv-heads 2 --head-dim 16 --tokens 240 --prompt-tokens 200 --seed 4 -o t.kvt
if python3 -c 'import sqlite3' 2>/dev/null; then
    cat >same.py <<'P'
import sqlite3

d = sqlite3.connect("r.db")
metric, run = {}, []
for id, *slots in d.execute("SELECT run_id, kept_slots, kept_bytes, mean_bytes, peak_bytes, overspent FROM v_run"):
    run.append(slots)
    metric[id] = d.execute("SELECT metric, layer, head, value, n FROM v_metric WHERE run_id = ? ORDER BY 1, 2, 3", (id,)).fetchall()
one, other = metric.values()
print("same" if run[0] == run[1] and one == other and len(one) > 100 else "different")
P
    for p in cake.decode tova.decode h2o.realdrop h2o.mask streamingllm.decode vatp.decode rkv.decode:every=8 hae.ours snapkv:decode=tova,every=4 h2o:decode=h2o,scores=raw; do
        rm -f r.db kept.npy
        ok kv-sim keep t.kvt -p $p -b 25% -o kept.npy
        ok kv-sim run t.kvt -p $p -p mask:kept.npy -b 25% --detail head --db r.db
        check "$p: the mask measures what the policy does" test "$(python3 same.py)" = same
    done
    rm -f r.db
    ok kv-sim run t.kvt -p mixdim.ours -b 25% --db r.db
    check 'mixdim.ours: total variation instead of the distance of the means, within the budget' test "$(python3 -c 'import sqlite3
d = sqlite3.connect("r.db")
print(sorted(m for m, in d.execute("SELECT DISTINCT metric FROM v_metric") if m in ("total_variation", "value_distance")), *d.execute("SELECT overspent FROM v_run"))')" = "['total_variation'] (0,)"
else
    skip 'python3 is not installed: databases cannot be compared'
fi

ok kv-sim run t.kvt -p h2o:decode=h2o,scores=raw,tova:decode=tova,streaming:decode=streaming,sinks=4,cake:decode=cake,cake.decode -b 5%,20%,100%,300 --db plain.db
check 'every run is there' grep -q '20 new runs' .err
refused 1 rope-theta kv-sim run t.kvt -p streamingllm.reindex -b 5% --db none.db
refused 2 'decode rule' kv-sim run t.kvt -p snapkv:every=4 -b 5% --db none.db
ok kv-sim policies rkv.decode
check 'policies says what leaves when' grep -q 'every' .out

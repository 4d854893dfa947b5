# Equal bytes, bytes read by a decode step, rows, and metrics that are asked for later.
. "$CLI/lib.sh"

synth t.kvt
P=snapkv:window=8,pyramidkv:window=8,snapkv:window=8,granularity=query_head,tova.decode,h2o.realdrop,criticalkv:window=8
ok kv-sim run t.kvt -p "$P" -b 20%,50% --match-bytes --metrics recall --db m.db
ok kv-sim run t.kvt -p "$P" -b 50% --metrics recall --db m.db
ok kv-sim run t.kvt -p snapkv:granularity=query_head -b 1 --match-bytes --metrics recall --db small.db
check 'what cannot be matched is said' grep -q "note: snapkv at 1 matched of 't.kvt' holds +.* % bytes" .err
ok kv-sim run t.kvt -p snapkv:window=8,cake:window=8 -b 20%,50% --page 8 --metrics recall --db p.db
ok kv-sim run t.kvt -p snapkv:window=8,tova.decode -b 20% --detail step --db s.db
ok kv-sim run t.kvt -p snapkv:window=8 -b 20% --metrics recall --db later.db
ok kv-sim run t.kvt -p snapkv:window=8 -b 20% --metrics bound_ada --detail head --db later.db
check 'a metric that is not there is measured' grep -q '1 new run' .err
ok kv-sim run t.kvt -p snapkv:window=8 -b 20% --metrics recall,bound_ada --db later.db
check 'and the others stay' grep -q '0 new runs, 1 already there' .err
ok kv-sim run t.kvt -p snapkv:window=8 -b 20% --metrics recall --detail head --db later.db
check 'but not in more detail than they have' grep -q '1 new run' .err
ok kv-sim run t.kvt -p snapkv:window=8 -b 20% --metrics all --db all.db
if have python3; then
    check 'equal bytes' python3 -c '
import sqlite3
d = sqlite3.connect("m.db")
later, slot, layers, heads = 20.5, 64, 2, 2  # f16, head size 16: mean of the 40 later tokens
for p, budget, g, tokens, matched, mean, nominal in d.execute("select policy, budget, granularity, budget_tokens, matched_tokens, mean_bytes, nominal_bytes from v_run"):
    want, step = nominal + later * layers * heads * slot, layers * (4 if g == "query_head" else heads) * slot
    assert nominal == tokens * layers * heads * slot
    if budget.endswith("matched"):
        assert abs(mean - want) <= step / 2 + 1e-6 or (matched == 0 and mean > want), (p, budget, mean, want)
    else:
        assert matched is None
assert d.execute("select count(*) from v_run where budget like \"%matched\"").fetchone()[0] == 12
assert d.execute("select count(*) from v_run where budget like \"%matched\" and matched_tokens <> budget_tokens").fetchone()[0] >= 4'
    check 'pages read' python3 -c '
import sqlite3
d = sqlite3.connect("p.db")
total = {}
for run, slots, read in d.execute("select run_id, slots, read_bytes from v_slots"):
    want = sum(-(-(slots + r + 1) // 8) * 8 * 64 for r in range(40)) / 40
    assert abs(read - want) < 1e-6, (slots, read, want)
    total[run] = total.get(run, 0) + read
for run, read, mean in d.execute("select run_id, read_bytes, mean_bytes from v_run"):
    assert abs(read - total[run]) < 1e-6 and mean < read < mean + 2 * 2 * 8 * 64'
    check 'rows' python3 -c '
import sqlite3
d = sqlite3.connect("s.db")
for run, in d.execute("select run_id from v_run").fetchall():
    for m in ("recall", "head_error", "nats_lost"):
        rows = d.execute("select step, value from v_metric where run_id = ? and metric = ? and step is not null order by step", (run, m)).fetchall()
        all, = d.execute("select value from v_metric where run_id = ? and metric = ? and layer is null and step is null", (run, m)).fetchone()
        assert [s for s, _ in rows] == list(range(40)) and abs(sum(v for _, v in rows) / 40 - all) < 1e-9, (m, all)
    assert d.execute("select count(*) from v_metric where run_id = ? and metric = \"layer_error\" and step is not null", (run,)).fetchone()[0] == 40'
    check 'later' python3 -c '
import sqlite3
d = sqlite3.connect("later.db")
n = dict(d.execute("select metric, count(*) from v_metric group by 1"))
assert n == {"recall": 11, "bound_ada": 3}, n
assert d.execute("select count(*) from v_slots").fetchone()[0] == 4'
    check 'all of them' python3 -c '
import json, sqlite3, subprocess
want = {m["name"] for m in json.loads(subprocess.run(["kv-sim", "metrics", "--json"], capture_output=True).stdout)}
got = {r[0] for r in sqlite3.connect("all.db").execute("select distinct metric from v_metric")}
model = {"delta_nll", "kl", "top1_agree", "top5_overlap", "closed_head_error", "stream_error", "nll_noise", "answer_found", "first_divergence"}
evidence = {"evidence_kept", "evidence_span_half", "evidence_lost_everywhere"}  # synth marks none
assert want - got == model | evidence | {"total_variation"}, want - got'
fi

# The same content whatever the threads, the order, the shards; a second run computes nothing.
. "$CLI/lib.sh"
if ! python3 -c 'import sqlite3' 2>/dev/null; then
    skip 'python3 is not installed: databases cannot be compared'
    exit 0
fi
dump() {
    python3 "$CLI/dump.py" "$@"
}

synth a.kvt
synth b.kvt --seed 2 --tokens 300 --prompt-tokens 250
kv-trace synth --layers 3 --q-heads 4 --kv-heads 1 --head-dim 32 --tokens 260 --prompt-tokens 220 --seed 3 -o c.kvt
policies=full,random,recency,streaming,knorm,h2o,tova,snapkv,pyramidkv,ada-snapkv,cake,lava,oracle,oracle-layer,oracle-global,tova.decode,h2o:decode=h2o
run() { # run DB [options]
    db=$1
    shift
    ok kv-sim run -p $policies -b 5%,20%,64,ratio=0.5 --detail head --db "$db" "$@"
}

run j1.db a.kvt b.kvt c.kvt -j 1
dump j1.db >j1.txt
check 'there are runs to compare' test "$(grep -c snapkv j1.txt)" -gt 1000
run j2.db a.kvt b.kvt c.kvt -j 2
dump j2.db >j2.txt
check '-j 1 = -j 2' cmp j1.txt j2.txt
run j9.db c.kvt b.kvt a.kvt -j 9
dump j9.db >j9.txt
check 'the order of the traces does not matter' cmp j1.txt j9.txt

cp j1.db again.db
run again.db a.kvt b.kvt c.kvt
check 'a second run computes nothing' grep -q '^kv-sim: 0 new runs' .err
check 'and writes nothing' cmp j1.db again.db

for s in 1/2 2/2; do run half-${s%/2}.db a.kvt b.kvt c.kvt --shard $s; done
dump half-1.db | grep -v '^v_' >halves.txt
dump half-2.db | grep -v '^v_' >>halves.txt
grep -v '^v_' j1.txt | sort >whole.txt
sort halves.txt >sorted.txt
check 'two shards = one run, and no run twice' cmp whole.txt sorted.txt
check 'both shards have work' test "$(dump half-1.db | wc -l)" -gt 10 -a "$(dump half-2.db | wc -l)" -gt 10
run joined.db a.kvt b.kvt c.kvt --shard 2/2
run joined.db a.kvt b.kvt c.kvt --shard 1/2
dump joined.db >joined.txt
check 'two shards into one database = one run' cmp j1.txt joined.txt

# piece by piece = at once
ok kv-sim run a.kvt -p snapkv,h2o -b 20% --detail head --db pieces.db
ok kv-sim run c.kvt a.kvt -p cake,snapkv -b 5%,20% --detail head --db pieces.db
run pieces.db a.kvt b.kvt c.kvt
check 'piece by piece = at once, to 1e-6' python3 "$CLI/close.py" j1.db pieces.db

# the seed counts, and only for random
ok kv-sim run a.kvt -p random,snapkv -b 20% --db seeds.db
ok kv-sim run a.kvt -p random,snapkv -b 20% --seed 7 --db seeds.db
dump seeds.db >seeds.txt
check 'another seed is another run of random' test "$(sed '/^v_metric/,$d' seeds.txt | grep -c "'random'")" = 2

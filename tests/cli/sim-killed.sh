# kill -9 and Ctrl-C during a sweep: the database holds whole runs, and the next run completes it to what it would have been.
. "$CLI/lib.sh"
if ! python3 -c 'import sqlite3' 2>/dev/null; then
    skip 'python3 is not installed: databases cannot be compared'
    exit 0
fi

for i in 1 2 3 4 5 6; do
    kv-trace synth --layers 2 --q-heads 8 --kv-heads 2 --head-dim 32 --tokens 400 --prompt-tokens 320 --seed $i -o $i.kvt
done
sweep() {
    kv-sim run [1-6].kvt -p full,recency,knorm,h2o,snapkv,cake,oracle -b auto --detail head --db "$1"
}
ok sweep whole.db
python3 "$CLI/dump.py" whole.db >whole.txt
size=$(bytes whole.db)

for signal in KILL INT; do
    tries=0 rc=0
    while [ $tries -lt 5 ] && [ $rc -eq 0 ]; do # 0: it was faster than we are
        tries=$((tries + 1))
        rm -f $signal.db*
        kv-sim run [1-6].kvt -p full,recency,knorm,h2o,snapkv,cake,oracle -b auto --detail head \
            --db $signal.db 2>.err &
        pid=$!
        while [ "$(bytes $signal.db)" -lt $((size / 3)) ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
        kill -$signal $pid 2>/dev/null
        wait $pid 2>/dev/null
        rc=$?
    done
    if [ $signal = KILL ]; then
        check 'killed in the middle (5 tries)' test $rc -eq 137
    else
        check 'Ctrl-C: exit 1' test $rc -eq 1
        check 'Ctrl-C: one line, and how to go on' test "$(grep -c '^kv-sim: .*same command' .err)/$(wc -l <.err)" = 1/1
    fi
    ok kv-analyze export --db $signal.db --what run
    ok python3 "$CLI/dump.py" $signal.db
    check "$signal: some runs are done" test "$(wc -l <.out)" -gt 10
    sed '/^v_metric/,$d' .out >some.txt
    check "$signal: whole runs" test "$(grep -cvxF -f whole.txt some.txt)" = 0
    check "$signal: not all are" test "$(wc -l <.out)" -lt "$(wc -l <whole.txt)"
    ok sweep $signal.db
    check "$signal: the next run does not begin anew" test "$(grep -c ' 0 already there' .err)" = 0
    python3 "$CLI/dump.py" $signal.db >after.txt
    check "$signal: the next run completes it" cmp whole.txt after.txt
done

# Ctrl-C finishes the trace under way: of a sweep over one trace everything; a second one stops it at once.
kv-trace synth --layers 8 --q-heads 8 --kv-heads 8 --head-dim 64 --tokens 1500 --prompt-tokens 1300 -o long.kvt
single='kv-sim run long.kvt -p snapkv,h2o,cake -b 5%,20% -j 1'
ok $single --db long.db
python3 "$CLI/dump.py" long.db >long.txt
for times in 1 2; do
    rm -f once.db*
    $single --db once.db 2>.err &
    pid=$!
    while [ "$(bytes once.db)" -eq 0 ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
    sleep 0.1
    kill -INT $pid
    if [ $times = 2 ]; then sleep 0.1 && kill -INT $pid 2>/dev/null; fi
    wait $pid
    rc=$?
    if [ $times = 1 ]; then
        check 'Ctrl-C: the trace under way is finished' test $rc -eq 0
        python3 "$CLI/dump.py" once.db >once.txt
        check 'and whole' cmp long.txt once.txt
    else
        check 'Ctrl-C twice: exit 1' test $rc -eq 1
        no_runs once.db
    fi
done

# Killed while it writes: SQLite's journal is left, and whoever opens the database next undoes what is half done.
torn() {
    cp whole.db torn.db
    python3 - <<'W'
import os, signal, sqlite3

d = sqlite3.connect("torn.db", isolation_level=None)
d.execute("PRAGMA cache_size = 5")
d.execute("BEGIN IMMEDIATE")
for i in range(3000):
    d.execute("INSERT INTO metric VALUES (1, 1, ?, 900, 900, 0.5, 1)", (i,))
os.kill(os.getpid(), signal.SIGKILL)
W
    check 'the journal is there' test -s torn.db-journal
}
torn 2>/dev/null
ok kv-analyze export --db torn.db --what metric
check 'kv-analyze reads whole runs' test "$(grep -c ',900,' .out)" = 0
python3 "$CLI/dump.py" torn.db >torn.txt
check 'kv-analyze: nothing is lost' cmp whole.txt torn.txt
torn 2>/dev/null
ok sweep torn.db
check 'kv-sim computes nothing again' grep -q '^kv-sim: 0 new runs' .err
python3 "$CLI/dump.py" torn.db >torn.txt
check 'kv-sim: nothing is lost' cmp whole.txt torn.txt

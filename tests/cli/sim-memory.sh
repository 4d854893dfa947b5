# A trace larger than --mem-limit: the peak stays below it, the numbers are the same, and where one layer does not fit it says so.
. "$CLI/lib.sh"
if ! python3 -c 'import resource, sqlite3' 2>/dev/null; then
    skip 'python3 is not installed: peaks cannot be measured'
    exit 0
fi
peak() { # peak MIB CMD..: CMD succeeds and its largest resident set stays below MIB
    python3 - "$@" <<'END'
import resource, subprocess, sys
subprocess.run(sys.argv[2:], check=True, stderr=subprocess.DEVNULL)
got = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
if got >= float(sys.argv[1]):
    sys.exit(f"peak {got:.1f} MiB, wanted below {sys.argv[1]}")
END
}
if ! peak 20 kv-sim metrics >.out 2>.err; then
    skip 'this build takes much memory for itself (a sanitizer?)'
    exit 0
fi
kv-trace synth --layers 32 --q-heads 4 --kv-heads 4 --head-dim 64 --tokens 1600 --prompt-tokens 1500 -o big.kvt
check 'the trace is larger than the limit' test "$(wc -c <big.kvt)" -gt $((60 << 20))
run="kv-sim run big.kvt -p snapkv,cake,h2o,tova.decode,criticalkv,mixdim.ours -b 5%,20%"
check 'without a limit' $run -j 8 --db free.db
check 'with one, the peak stays below it' peak 60 $run -j 8 --mem-limit 60MiB --db tight.db
for x in free tight; do python3 "$CLI/dump.py" $x.db >$x.txt; done
check 'and the numbers are the same' cmp free.txt tight.txt
refused 2 'mem-limit 30MiB: ' $run --mem-limit 30MiB --db called_out.db
check 'it says how much would do' grep -q 'give at least [0-9]*MiB' .err
ok $run --mem-limit "$(sed -n 's/.*give at least \([0-9]*MiB\).*/\1/p' .err)" -b 5% --db said.db

# Less memory than -j would take: fewer threads, with a message, and the same numbers. OpenBLAS alone wants 128 MiB a thread.
run="kv-sim run big.kvt -p snapkv,h2o -b 5%,20%"
ok $run --db plenty.db
(ulimit -v 1500000 && exec timeout -s KILL 200 $run -j 16 --db scarce.db) >.out 2>.err
check 'short of address space: it goes on' test $? -eq 0
check 'with fewer threads, and says so' grep -q '^kv-sim: note: .*address space for -j 16: goes on with -j [1-9]*$' .err
for x in plenty scarce; do python3 "$CLI/dump.py" $x.db >$x.txt; done
check 'and the numbers are the same' cmp plenty.txt scarce.txt
for limit in 200000 250000 300000 350000; do
    (ulimit -v $limit && exec kv-sim metrics) >.out 2>.err || continue # the libraries do not fit
    rm -f tiny.db
    (ulimit -v $limit && exec timeout -s KILL 60 $run -j 16 --db tiny.db) >.out 2>.err
    rc=$?
    check "with $limit KiB: done, or one line" test $rc -eq 0 -o "$rc/$(grep -vc ': note:' .err)" = 1/1
done

# A layer that finds no memory beside another one: the trace is begun anew with half as many threads.
fault=$(dirname "$(command -v kv-sim)")/tests/fault.so
if [ -f "$fault" ]; then
    synth small.kvt --layers 4
    small="kv-sim run small.kvt -p snapkv,h2o,cake -b 5%,20% -j 2 --db"
    ok $small whole.db
    python3 "$CLI/dump.py" whole.db >whole.txt
    env LD_PRELOAD="$fault" KV_FAULT=count KV_FAULT_SAYS=says $small count.db 2>.err
    n=$(sed -n 's/^alloc //p' says) i=0 again=0
    while [ $i -lt 24 ]; do
        i=$((i + 1))
        rm -f less.db*
        env LD_PRELOAD="$fault" KV_FAULT=alloc:$((n * i / 25)) $small less.db >.out 2>.err || continue
        grep -q "^kv-sim: note: out of memory for 'small.kvt' with -j 2: goes on with -j 1\$" .err || continue
        again=$((again + 1))
        python3 "$CLI/dump.py" less.db >less.txt
        check 'half the threads, the same numbers' cmp whole.txt less.txt
    done
    check 'it was tried again' test $again -gt 0
fi

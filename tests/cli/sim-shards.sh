# Parts of a sweep and of a capture, as an array of jobs runs them (sim/slurm/shard.sh, its number set by hand) and as GNU parallel does:
# a part dies and is run again alone; the whole is what one process makes.
. "$CLI/lib.sh"
if ! python3 -c 'import sqlite3' 2>/dev/null; then
    skip 'python3 is not installed: databases cannot be compared'
    exit 0
fi
SHARD=$ROOT/sim/slurm/shard.sh
for i in 1 2 3; do synth $i.kvt --seed $i; done
sweep='kv-sim run 1.kvt 2.kvt 3.kvt -p full,snapkv,h2o,cake,knorm,oracle -b 5%,20% --detail head'
part() { # part N I DIR COMMAND..
    n=$1 i=$2 dir=$3
    shift 3
    SLURM_ARRAY_TASK_ID=$i sh "$SHARD" "$n" "$dir" "$@"
}

ok $sweep --db one.db
python3 "$CLI/dump.py" one.db >one.txt
for i in 1 2 3 4 5; do ok part 5 $i parts $sweep; done
ok kv-analyze merge parts/part-*-of-5.db -o all.db
python3 "$CLI/dump.py" all.db | sort >all.txt
sort one.txt >sorted.txt
check 'five parts merged = one process' cmp sorted.txt all.txt
ok part 5 3 parts $sweep
check 'a finished part computes nothing' grep -q '^kv-sim: 0 new runs' .err

# part 2 dies in its first trace, part 4 behind it: as files that are not there and as half of one
rm parts/part-2-of-5.db
cp parts/part-4-of-5.db keep.db && rm parts/part-4-of-5.db
ok kv-sim run 1.kvt -p full,snapkv,h2o,cake,knorm,oracle -b 5%,20% --detail head --shard 4/5 --db parts/part-4-of-5.db
kv-analyze merge parts/part-*-of-5.db -o short.db >.out 2>.err
python3 "$CLI/dump.py" short.db | sort >short.txt
check 'without them something is missing' test "$(wc -l <short.txt)" -lt "$(wc -l <all.txt)"
ok part 5 2 parts $sweep
ok part 5 4 parts $sweep
ok kv-analyze merge parts/part-*-of-5.db -o again.db
python3 "$CLI/dump.py" again.db | sort >again.txt
check 'run again alone, the whole is the same' cmp all.txt again.txt

# more parts than there is work: some have none, and that is no failure
for i in 1 2 3; do ok kv-sim run 1.kvt -p full -b 50% --shard $i/3 --db few-$i.db; done
ok kv-analyze merge few-1.db few-2.db few-3.db -o few.db

if have parallel; then
    # shellcheck disable=SC2086 # the words of a command
    parallel --will-cite -j 2 --joblog log "SLURM_ARRAY_TASK_ID={} sh $SHARD 3 by-parallel $sweep -j 1" ::: 1 2 3 >.out 2>.err
    check 'GNU parallel runs the parts' test $? -eq 0 -a "$(wc -l <log)" = 4
    ok kv-analyze merge by-parallel/part-*-of-3.db -o parallel.db
    python3 "$CLI/dump.py" parallel.db | sort >parallel.txt
    check 'and the whole is the same' cmp all.txt parallel.txt
else
    skip 'GNU parallel is not installed'
fi

# capture: parts side by side into one folder, where all find the W_O file missing
i=0
while [ $i -lt 7 ]; do
    i=$((i + 1))
    echo "{\"id\": \"p$i\", \"text\": \"the quick brown fox number $i jumps over the lazy dog\", \"prompt_end_byte\": 20}"
done >p.jsonl
capture="kv-capture run -m $MODEL --prompts p.jsonl --backend cpu"
ok $capture -o whole
for i in 1 2 3; do $capture --dry-run --shard $i/3; done | sed -n 's/^\(p[0-9]\): .*/\1/p' >dry.txt
check 'every prompt is in one part' test "$(wc -l <dry.txt)/$(sort -u dry.txt | wc -l)" = 7/7
for i in 1 2 3; do part 3 $i traces $capture 2>$i.err & done
wait
check 'every part did its own' test "$(cat [123].err | grep -c 'tokens in')" = 7
(cd whole && ls) >want.txt
(cd traces && ls) >got.txt
check 'the folder is what one process makes' cmp want.txt got.txt
for i in 1 2 3 4 5 6 7; do ok kv-trace diff whole/p$i.kvt traces/p$i.kvt; done
ok kv-trace verify --deep traces/*.kvt
check 'one W_O file for all' cmp whole/wo-*.kvw traces/wo-*.kvw
rm traces/p2.kvt traces/p5.kvt
ok part 3 2 traces $capture
check 'a part that died is run again alone' test -e traces/p2.kvt -a -e traces/p5.kvt
check 'and only that' test "$(grep -c 'tokens in' .err)" = 2
ok part 9 9 traces $capture # more parts than prompts

refused 2 "'4/3'" kv-capture run -m "$MODEL" --prompts p.jsonl --shard 4/3 -o out
refused 2 '--prompts' kv-capture run -m "$MODEL" --text the --shard 1/3 -o out.kvt
exits 2 sh "$SHARD" 3 out kv-sim run
exits 2 part 3 1 out kv-trace info 1.kvt

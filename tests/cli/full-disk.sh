# A full disk: exit 1, one line that names the file, nothing under the final name, a database that still opens. As root on a small tmpfs;
# else with ulimit -f.
. "$CLI/lib.sh"

mkdir disk
limit() { "$@"; }
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=300k kvtrace-test disk 2>/dev/null; then
    trap 'umount disk' EXIT
    trap 'exit 1' INT TERM
else
    limit() { (ulimit -f 600 && exec "$@"); } # 600 x 512 bytes
fi
# on_full WORD CMD..: as refused, on what is called disk/out*; the first word of the line is the program
on_full() {
    word=$1
    shift
    limit "$@" >.out 2>.err
    rc=$?
    why=
    if [ $rc -ne 1 ]; then why="exit $rc instead of 1"; fi
    if [ "$(grep -cv '^kv-capture: warning' .err)" -ne 1 ]; then why="$why, not one line on stderr"; fi
    if ! grep -q "^$1.*: .*$word" .err; then why="$why, stderr does not name '$word'"; fi
    for f in disk/out*; do
        case $f in *.partial) continue ;; esac
        if [ -e "$f" ]; then why="$why, left '$f' behind"; fi
    done
    rm -f disk/out*
    if [ -z "$why" ]; then pass; else fail "${why#, }: $*"; fi
}

tokens 900 >t.json
synth a.kvt
on_full disk/out.kvt kv-capture run -m "$MODEL" --tokens t.json -o disk/out.kvt
on_full disk/out.kvt kv-trace synth -o disk/out.kvt
kv-trace synth -o big.kvt
on_full disk/out.kvt kv-trace slice big.kvt disk/out.kvt
on_full disk/out.npy kv-trace cat big.kvt --stream q -o disk/out.npy
head -c 3000000 big.kvt >damaged.kvt
on_full disk/out.kvt kv-trace recover damaged.kvt disk/out.kvt

cp a.kvt disk/keep.kvt
on_full disk/keep.kvt kv-trace slice big.kvt disk/keep.kvt
check 'the file under the final name is as it was' cmp a.kvt disk/keep.kvt
rm -f disk/keep*

limit kv-sim run a.kvt -p recency -b 50% --db disk/results.db 2>/dev/null || fail 'one small run does not fit'
on_full disk/results.db kv-sim run a.kvt -p full,random,recency,streaming,knorm,snapkv,oracle -b auto --detail head --db disk/results.db
ok kv-analyze export --db disk/results.db --what run --csv
check 'whole runs stay in the database, and nothing else' test "$(wc -l <.out)" = 2

for stream in 'kv-trace info a.kvt' 'kv-trace cat a.kvt --stream q' 'kv-sim policies' 'kv-sim metrics --json' \
    "kv-sim keep a.kvt -p snapkv -b 10% -o kept.npy" "kv-capture info -m $MODEL" "kv-capture tokenize -m $MODEL --text the" \
    'kv-analyze summary --db disk/results.db' 'kv-analyze export --db disk/results.db'; do
    sh -c "$stream" >/dev/full 2>.err
    check "exit 1 when stdout is full: $stream" test $? -eq 1
done

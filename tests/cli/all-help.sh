# --help and --version everywhere, and the examples that --help shows run as they are written.
. "$CLI/lib.sh"

for p in kv-trace kv-capture kv-sim kv-analyze; do
    ok $p --help
    check "$p --help goes to stdout" test -s .out -a ! -s .err
    check "$p --help is for a terminal" test "$(awk 'length > 132' .out | wc -l)" = 0
    sed -n 's/^  \(kv-.*\)/\1/p' .out >>examples
    check "$p --help ends with two examples" test "$(tail -2 .out | grep -c '^  kv-')" = 2
    ok $p --version
    # what cannot be printed is no success
    for o in --help --version; do
        $p $o >/dev/full 2>.err
        check "$p $o on a full device: exit 1 and a line on stderr" test $? -eq 1 -a "$(wc -l <.err)" = 1
    done
    check "$p --version" grep -qE "^$p [0-9]+\.[0-9]+\.[0-9]+ \(.*\)$" .out
    $p >.out 2>.err
    check "$p alone: exit 2 and something on stderr" test $? -eq 2 -a -s .err -a ! -s .out
done
for c in info verify recover diff slice cat import export synth; do
    ok kv-trace $c --help
    sed -n 's/^  \(kv-.*\)/\1/p' .out >>examples
done
for c in run keep policies metrics selftest; do
    ok kv-sim $c --help
    sed -n 's/^  \(kv-.*\)/\1/p' .out >>examples
done
for c in run info tokenize; do ok kv-capture $c --help; done
for c in summary curve compare power recommend layers heads predict export merge plot text report; do
    ok kv-analyze $c --help
    check "kv-analyze $c --help is about it" grep -q "^usage: kv-analyze $c" .out
    check "kv-analyze $c --help is for a terminal" test "$(awk 'length > 132' .out | wc -l)" = 0
    sed -n 's/^  \(kv-.*\)/\1/p' .out >>examples
done
check 'there are examples' test "$(wc -l <examples)" -gt 20

# What the examples take: names out of the help, made small.
if ! python3 -c 'import numpy' 2>/dev/null; then
    skip 'python3 with numpy is not installed: the examples were not run'
    exit 0
fi
if ! have gnuplot; then
    skip 'gnuplot is not installed: the examples were not run'
    exit 0
fi
mkdir -p traces/samples
for t in a b cpu gpu again; do kv-trace synth -o $t.kvt; done
for i in 2 3 4; do kv-trace synth --tokens 240 --seed $i -o traces/samples/$i.kvt; done
mv traces/samples/2.kvt traces/samples/prose.kvt
kv-sim run traces/samples/*.kvt -p full,snapkv,cake,streaming,oracle -b 10%,50% --detail head --db results.db 2>/dev/null
cp results.db whole.db
cp a.kvt a.kvt.partial # becomes a.kvt again
head -c 3500000 a.kvt >damaged.kvt
cp "$MODEL" model.gguf
echo '{"id": "one", "text": "the quick brown fox jumps", "prompt_end_byte": 9}' >prompts.jsonl
python3 -c '
import numpy as np
r = np.random.default_rng(0)
q = r.standard_normal((4, 8, 520, 16)).astype("f2")
np.save("q", q), np.save("k", q[:, :2]), np.save("v", q[:, 2:4])
np.savez("mine", q=q, k=q[:, :2], v=q[:, 2:4])
m = np.tril(r.random((2, 4, 64, 64)))
np.save("attention", (m / m.sum(-1, keepdims=True)).astype("f4"))'
awk '!seen[$0]++' examples | sed 's,/tmp/,./,g' >once
while read -r line; do
    case $line in kv-analyze*) cp whole.db results.db ;; esac # examples of kv-sim add runs to it
    sh -c "$line" >.out 2>.err </dev/null
    rc=$?
    case $line in *' recover '*) if [ $rc -eq 3 ]; then rc=0; fi ;; esac # 3 = something was lost, as it should
    check "example: $line" test $rc -eq 0
done <once

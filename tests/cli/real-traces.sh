# The traces in traces/samples, and a capture with SmolLM2-135M when it was fetched (make model).
. "$CLI/lib.sh"

n=0
for t in "$ROOT"/traces/samples/*.kvt; do
    [ -e "$t" ] || continue
    n=$((n + 1))
    ok kv-trace verify --deep "$t"
    ok kv-sim run "$t" -p snapkv,oracle -b 5%,20% --db samples.db
done
if [ $n -gt 0 ]; then
    ok kv-analyze summary --db samples.db --metric recall
else
    skip 'there are no traces in traces/samples'
fi

model=$ROOT/build/models/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$model" ]; then
    skip 'SmolLM2-135M is not in build/models (make model): no real model was run'
    exit 0
fi
printf '%s' 'The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is' >p.txt
ok kv-capture run -m "$model" --file p.txt --decode 8 -o a.kvt
ok kv-capture run -m "$model" --file p.txt --decode 8 --threads 1 -o b.kvt
ok kv-trace diff a.kvt b.kvt
ok kv-trace verify --deep a.kvt
ok kv-trace cat a.kvt --stream text
check 'the model knows it' grep -q Madrid .out
ok kv-sim selftest a.kvt
ok kv-sim run a.kvt -p snapkv,cake,oracle,full -b 50%,100% --db r.db
ok kv-analyze summary --db r.db --metric layer_error

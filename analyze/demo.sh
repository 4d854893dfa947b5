#!/bin/sh
# demo.sh BIN OUT - the whole path: model -> traces -> replay -> results.db -> figures, and a short table. What is finished
# already is not computed again. Without the model (no network) the shipped sample traces are used instead.
set -eu
bin=$1
out=$2
mkdir -p "$out"
policies=full,random,recency,streaming,knorm,h2o,tova,snapkv,pyramidkv,ada-snapkv,ada-pyramidkv,cake,oracle,oracle-layer,oracle-global
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
if sh capture/get-model.sh build/models; then
    "$bin/kv-capture" run -m $model --prompts capture/prompts/demo.jsonl --record obs -o "$out/traces"
    traces=$out/traces
else
    echo "demo: no model, so the shipped sample traces are replayed instead (7 of 30 layers, 300 tokens)" >&2
    traces=traces/samples
fi
"$bin/kv-sim" run "$traces"/*.kvt -p $policies -b auto --db "$out/results.db"
"$bin/kv-sim" run "$traces"/*.kvt -p $policies -b 11.7% --detail head --db "$out/results.db" # for the heat map
"$bin/kv-sim" run "$traces"/*.kvt -p snapkv,h2o,cake -b 11.7% --gap --db "$out/results.db"
if [ ! -f "$out/attention.svg" ] || [ "$out/results.db" -nt "$out/attention.svg" ]; then
    "$bin/kv-analyze" plot all --db "$out/results.db" -o "$out" >/dev/null
    set -- "$traces"/*.kvt
    "$bin/kv-analyze" plot attention --trace-file "$1" -p snapkv -b 11.7% -o "$out" >/dev/null
    "$bin/kv-analyze" report "$@" --db "$out/results.db" -o "$out/report.html" 2>/dev/null
fi
"$bin/kv-analyze" summary --db "$out/results.db" --metric layer_error --budget 3.2%,11.7%,39.8%
echo
echo "results: $out/results.db   figures: $(ls "$out"/*.svg | wc -l) in $out/*.svg and *.png"
echo "report:  $out/report.html"
echo "next:    $bin/kv-analyze curve --db $out/results.db --metric recall"

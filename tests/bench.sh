#!/bin/sh
# bench.sh BIN - kernels, then the main jobs on the real model (make model), as CSV with machine and date.
set -eu
bin=$1
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
echo "# $(date -u +%Y-%m-%d), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores"
"$bin/tests/bench_kernels"
if [ ! -f $model ]; then
    echo "bench: no SmolLM2 in build/models (make model): capture and replay were not measured" >&2
    exit
fi
"$bin/tests/bench_path" $model capture/prompts/demo.jsonl prose
# replay: a prompt of 4,096 tokens and 64 rows, from the texts that are here
trap 'rm -f build/bench.txt build/bench.json build/bench4k.kvt' EXIT
for i in 1 2; do cat capture/prompts/prose.txt capture/prompts/needle.txt capture/prompts/code.txt capture/prompts/repetitive.txt; done >build/bench.txt
"$bin/kv-capture" tokenize -m $model --file build/bench.txt --json | tr -d '[] \n' | cut -d, -f1-4160 | sed 's/.*/[&]/' >build/bench.json
"$bin/kv-capture" run -m $model --tokens build/bench.json --prompt-tokens 4096 -o build/bench4k.kvt 2>/dev/null
"$bin/tests/bench_replay" "$bin/kv-sim" build/bench4k.kvt

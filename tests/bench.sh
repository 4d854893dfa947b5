#!/bin/sh
# bench.sh BIN - kernels, then the main jobs on the real model (make model), as CSV with machine and date.
set -eu
bin=$1
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
echo "# $(date -u +%Y-%m-%d), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores"
"$bin/tests/bench_kernels"
if [ -f $model ]; then
    "$bin/tests/bench_path" $model capture/prompts/demo.jsonl prose
else
    echo "bench: no SmolLM2 in build/models (make model): capture and replay were not measured" >&2
fi
if command -v sqlite3 >/dev/null; then sh tests/bench_db.sh "$bin"; else echo "bench: no sqlite3: a large results.db was not measured" >&2; fi

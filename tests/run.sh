#!/bin/sh
# run.sh BIN - every check there is; the last line is "N passed, N failed, N skipped", the exit status agrees. BIN holds the
# programs and tests/. ../shared/golden, when present, adds the larger expected sets.
set -u
. tests/numbers.sh
bin=$1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
pass=0 fail=0 skip=0
model=build/models/SmolLM2-135M-Instruct.Q4_1.gguf
golden=../shared/golden

# run NAME COMMAND..: its last line says how many; a program that dies or says nothing is one failure
run() {
    name=$1
    shift
    "$@" >"$log" 2>&1
    rc=$?
    numbers "$log"
    if [ -z "$line" ] || { [ $rc -ne 0 ] && [ "${f:-0}" = 0 ]; }; then
        p=${p:-0} f=$((${f:-0} + 1))
        echo "FAIL $name: exit status $rc"
        tail -5 "$log"
    fi
    pass=$((pass + p)) fail=$((fail + f)) skip=$((skip + ${s:-0}))
    grep -E '^(FAIL|SKIP)' "$log" | cut -c1-300 | head -20
    printf '%-28s %s\n' "$name" "$line"
}

for t in "$bin"/tests/test_*; do [ -x "$t" ] && run "$(basename "$t")" "$t"; done
run command-line sh tests/cli/run.sh "$bin"
run arrows sh -c 'sh tests/arrows.sh && echo "1 passed, 0 failed"'
run readme sh tests/readme.sh "$bin"
run kvt.py python3 tests/kvt_check.py "$bin"
run hf-hook python3 tests/hf_check.py "$bin"
run golden-models python3 tests/golden/drive_models.py "$bin" tests/golden/models gguf
run golden-malformed python3 tests/golden/drive_models.py "$bin" tests/golden/models malformed
run extra-models python3 tests/golden/drive_models.py "$bin" tests/golden/models_extra tiny
run twin-models python3 tests/models_check.py "$bin" tests/golden/models_extra
run refused-models python3 tests/refusals_check.py "$bin" tests/golden/models_extra/tiny
run faults python3 tests/faults.py "$bin" --quick 2
run kills python3 tests/kills.py "$bin" --moments 3
run long-sweep python3 tests/sweep.py "$bin" --traces 100
run hostile python3 tests/hostile_check.py "$bin"
run layer-error python3 tests/layer_error_check.py "$bin" tests/golden/models_extra/tiny/gemma3 tests/golden/models_extra/tiny/granite tests/golden/models_extra/tiny/qwen3
for c in tests/golden/policies/*/; do run "kept-$(basename "$c")" python3 tests/golden/drive_kept.py "$bin" tests/golden/policies "${c%/}"; done
for c in tests/golden/metrics/*/; do run "metrics-$(basename "$c")" python3 tests/golden/drive_metrics.py "$bin" tests/golden/policies "${c%/}"; done

if [ -f $model ]; then run closed-loop python3 tests/golden/drive_closed.py "$bin" $model tests/golden/closed-loop/smollm2_*; fi

if [ -d $golden ]; then
    run shared-models-gguf python3 tests/golden/drive_models.py "$bin" $golden/models gguf
    run shared-models-tiny python3 tests/golden/drive_models.py "$bin" $golden/models tiny
    run shared-twin-models python3 tests/models_check.py "$bin" $golden/models
    run shared-malformed python3 tests/malformed_check.py "$bin" $golden/models/malformed "$(case $bin in *san-*) echo 600 ;; *) echo 64 ;; esac)"
    for r in gemma3:gemma-3-270m-q4_k_m qwen2:qwen2.5-coder-0.5b-instruct-q4_k_m; do
        f=build/models/${r#*:}.gguf
        [ ! -f "$f" ] || run "real-${r%%:*}" python3 tests/real_check.py "$bin" "$golden/models/real/${r%%:*}.json" "$f"
    done
    for c in $golden/policies/case*/; do run "shared-kept-$(basename "$c")" python3 tests/golden/drive_kept.py "$bin" tests/golden/policies "${c%/}" --sample 60; done
    for c in $golden/metrics/*/; do run "shared-metrics-$(basename "$c")" python3 tests/golden/drive_metrics.py "$bin" $golden/policies "${c%/}"; done
    if [ -f $model ]; then
        run tokenizer python3 tests/golden/drive_models.py "$bin" $golden/models tokenizer --model $model
        run smollm2 python3 tests/smollm2_check.py "$bin" $golden/models/smollm2 $model
        run shared-closed-loop python3 tests/golden/drive_closed.py "$bin" $model $golden/closed-loop/smollm2_pub_code*
    fi
fi
if [ ! -f $model ]; then
    echo "SKIP SmolLM2-135M is not in build/models (make model): tests on the real model were not run"
    skip=$((skip + 1))
fi
echo "$pass passed, $fail failed, $skip skipped"
[ $fail -eq 0 ] && [ $pass -gt 0 ]

#!/bin/sh
# check-all.sh - `make test`, then what a change must also survive: warnings as errors in gcc and clang, lint, the tests that meet
# memory and files of others under ASan + UBSan (gcc), the threaded parts under TSan (clang). The last line is "N passed, N failed, N
# skipped" over everything, the exit status agrees. Installs what it needs (tests/deps.sh); what cannot be had is a skip, and said.
# `check-all.sh more` leaves `make test` out.
set -u
. tests/numbers.sh
log=$(mktemp)
trap 'rm -f "$log"' EXIT
pass=0 fail=0 skip=0
jobs=$(nproc 2>/dev/null || echo 2)

# stage NAME COMMAND..: its last line of numbers counts; without one it is a check of its own
stage() {
    name=$1
    shift
    from=$(date +%s)
    "$@" >"$log" 2>&1
    rc=$?
    numbers "$log"
    if [ $rc -eq 0 ] && [ -z "$line" ]; then p=1; fi
    if [ $rc -ne 0 ] && [ "${f:-0}" = 0 ]; then
        f=1
        echo "FAIL $name: exit status $rc"
        tail -30 "$log"
    fi
    pass=$((pass + ${p:-0})) fail=$((fail + ${f:-0})) skip=$((skip + ${s:-0}))
    grep -E '^(FAIL|SKIP)|WARNING: ThreadSanitizer|ERROR: [A-Za-z]*Sanitizer|runtime error|SUMMARY:' "$log" | cut -c1-300 | head -20
    printf '%-34s %s passed, %s failed, %s skipped, %d s\n' "$name" "${p:-0}" "${f:-0}" "${s:-0}" $(($(date +%s) - from))
}

skipped() {
    echo "SKIP $*"
    skip=$((skip + 1))
}

build() { # WARNINGS.. as errors or "", then the rest: gcc warns of things that are not there when it instruments
    werror=$1
    shift
    make --no-print-directory -j"$jobs" CUDA=0 CFLAGS="-O1 -g $werror" "$@"
}

if [ "${1:-}" != more ]; then
    stage 'make test, gcc -O2 -Werror' make --no-print-directory test CFLAGS='-O2 -g -Werror'
    sed -n '/^[a-z].* passed, /p' "$log"
fi

clang=
if sh tests/deps.sh clang clang-format && clang --version >/dev/null 2>&1; then
    clang=yes
    stage lint make --no-print-directory lint
else
    skipped 'no clang: lint and TSan were not run'
fi

# What meets memory: every unit test but those that are arithmetic only and slow, and the programs on hostile files.
asan=build/san-address-undefined
export OPENBLAS_NUM_THREADS=1
export ASAN_OPTIONS=strict_string_checks=1:detect_stack_use_after_return=1:detect_leaks=1
export UBSAN_OPTIONS=print_stacktrace=1
stage 'build, gcc ASan UBSan' build '' SAN=address,undefined all tests
for t in analyze base capture chat closed compare fuzz gap literals model plugin schedules stats stream tokenizer tokenizer_hf traces; do
    stage "ASan test_$t" $asan/tests/test_$t
done
stage 'ASan command line' sh tests/cli/run.sh $asan trace-damaged trace-recover trace-import trace-misuse capture-refuses sim-refuses analyze-refuses
stage 'ASan hostile files' python3 tests/hostile_check.py $asan
stage 'ASan refused models' python3 tests/refusals_check.py $asan tests/golden/models_extra/tiny
stage 'ASan malformed models' python3 tests/malformed_check.py $asan tests/golden/models/malformed 600

# The threaded parts: kernels/parallel, the trace writer's ring, capture's threads, kv-sim -j.
tsan=build/san-thread
tsan_try='int x; void *f(void *p) { x++; return p; } int main(void) { pthread_t t; pthread_create(&t, 0, f, 0); pthread_join(t, 0); return x - 1; }'
if [ -z "$clang" ]; then
    :
elif ! sh tests/deps.sh "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev" ||
    ! { echo "#include <pthread.h>"; echo "$tsan_try"; } | clang -x c -fsanitize=thread - -o build/tsan-try || ! build/tsan-try; then
    skipped 'programs under TSan do not start here: threads were not checked'
else
    export TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp:halt_on_error=1:second_deadlock_stack=1
    stage 'build, clang TSan -Werror' build -Werror CC=clang SAN=thread all $tsan/tests/test_stream $tsan/tests/test_traces $tsan/tests/test_capture \
        $tsan/tests/test_replay_paths $tsan/tests/test_closed
    for t in stream traces capture replay_paths closed; do stage "TSan test_$t" $tsan/tests/test_$t; done
    stage 'TSan command line' sh tests/cli/run.sh $tsan sim-same trace-same capture-batch sim-memory
fi
echo "$pass passed, $fail failed, $skip skipped"
[ $fail -eq 0 ] && [ $pass -gt 0 ]

#!/bin/sh
# run.sh BIN - the four programs as a user meets them: bad input, killed runs, full disks, and that the same input gives the same
# bytes. Every other *.sh here but lib.sh is a case, run in an empty folder (lib.sh tells the words it is written in). One case: run.sh
# BIN NAME. Last line "N passed, N failed, N skipped"; the exit status agrees.
set -u
if [ $# -lt 1 ] || [ ! -x "$1/kv-trace" ]; then
    echo "usage: run.sh BIN [CASE..]   BIN holds the programs" >&2
    exit 2
fi
PATH=$(cd "$1" && pwd):$PATH
CLI=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$CLI/../.." && pwd)
KVTRACE_PLOTS=$ROOT/plots
LC_ALL=C
export PATH CLI ROOT KVTRACE_PLOTS LC_ALL
shift
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
TALLY=$tmp/tally
export TALLY
: >"$TALLY"

if [ $# -eq 0 ]; then
    cd "$CLI" && set -- *-*.sh
fi
for case in "$@"; do
    CASE=${case%.sh}
    export CASE
    mkdir "$tmp/$CASE"
    (cd "$tmp/$CASE" && timeout 300 sh "$CLI/$CASE.sh")
    rc=$?
    if [ $rc -ne 0 ]; then
        printf f >>"$TALLY"
        echo "FAIL $CASE: the script itself ended with status $rc"
    fi
    rm -rf "${tmp:?}/$CASE"
done
passed=$(tr -cd p <"$TALLY" | wc -c) failed=$(tr -cd f <"$TALLY" | wc -c) skipped=$(tr -cd s <"$TALLY" | wc -c)
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]

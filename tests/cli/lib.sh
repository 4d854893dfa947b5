# lib.sh - what a case script is written in. run.sh starts every script in an empty folder of its own, with the four programs
# first in PATH and these set: CLI (this folder), ROOT (the repository), TALLY (one letter per check: p f s).
#
#   ok CMD..                 exit 0
#   exits N CMD..            exit N
#   refused N WORD CMD..     exit N, one line on stderr that starts with the program and holds WORD (N = 2: and the "try .. --help"
#                            line behind it), and nothing called out* in this folder afterwards: commands that must fail write there
#   check WHAT CMD..         CMD (test, cmp, grep ..) succeeds; .out and .err stay those of the command before
#   skip WHY                 counted, and printed
#
# The last command's output is in ./.out and ./.err.
set -u

pass() {
    printf p >>"$TALLY"
}

fail() {
    printf f >>"$TALLY"
    echo "FAIL $CASE: $*" | sed "s,$ROOT/,,g"
    if [ -s .err ]; then head -3 .err | sed 's/^/     | /'; fi
}

skip() {
    printf s >>"$TALLY"
    echo "SKIP $CASE: $*"
}

exits() {
    want=$1
    shift
    "$@" >.out 2>.err
    rc=$?
    if [ $rc -eq "$want" ]; then pass; else fail "exit $rc instead of $want: $*"; fi
    return 0
}

ok() {
    exits 0 "$@"
}

refused() {
    want=$1 word=$2
    shift 2
    "$@" >.out 2>.err
    rc=$?
    why=
    if [ $rc -ne "$want" ]; then why="exit $rc instead of $want"; fi
    if [ "$(grep -cv "^try '$1.* --help'\$" .err)" -ne 1 ]; then why="$why, not one line on stderr"; fi
    if ! head -1 .err | grep -q "^$1[ a-z]*: "; then why="$why, stderr does not start with the program"; fi
    if [ "$want" -eq 2 ] && [ "$(sed -n '2p' .err | grep -c "^try '$1")" -ne 1 ]; then why="$why, no hint at --help"; fi
    if ! grep -qF -e "$word" .err; then why="$why, stderr does not name '$word'"; fi
    for f in out*; do
        if [ -e "$f" ]; then why="$why, left '$f' behind" && rm -rf "$f"; fi
    done
    if [ -z "$why" ]; then pass; else fail "${why#, }: $*"; fi
    return 0
}

check() {
    what=$1
    shift
    if "$@" >.check 2>&1; then pass; else fail "$what"; fi
}

have() {
    command -v "$1" >/dev/null 2>&1
}

bytes() {
    if [ -e "$1" ]; then wc -c <"$1"; else echo 0; fi
}

# flip FILE OFFSET: change one bit
flip() {
    old=$(od -An -tu1 -j "$2" -N 1 "$1" | tr -d ' ')
    printf "\\$(printf '%03o' $((old ^ 16)))" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}

# no_runs DB: it is not there, or a whole database without a run; removes it
no_runs() {
    if [ -e "$1" ]; then
        refused 1 'no runs in' kv-analyze export --db "$1"
        rm -f "$1"*
    fi
}

# A small trace: synth FILE [options]
synth() {
    f=$1
    shift
    kv-trace synth --layers 2 --q-heads 4 --kv-heads 2 --head-dim 16 --tokens 200 --prompt-tokens 160 "$@" -o "$f" ||
        fail "cannot make $f"
}

# N token ids as a JSON array, always the same ones
tokens() {
    awk -v n="$1" 'BEGIN { x = 7; for (i = 0; i < n; i++) { x = (x * 61 + 17) % 509; printf "%s%d", i ? "," : "[", x + 3 } print "]" }'
}

# The random-weight model of the goldens: 2 layers, 512 tokens of vocabulary
MODEL=$ROOT/tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf

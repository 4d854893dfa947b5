#!/bin/sh
# readme.sh BIN - the README's policy table is what kv-sim prints, and its commands on the samples run as shown.
# `readme.sh BIN --write` puts the table in.
set -u
bin=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
pass=0 fail=0
{ echo '<!-- kv-sim policies -->'; echo '```'; "$bin/kv-sim" policies; echo '```'; echo '<!-- end -->'; } >"$tmp/table"
if [ "${2:-}" = --write ]; then
    awk -v t="$tmp/table" '/^<!-- kv-sim policies -->/ {while ((getline l < t) > 0) print l; skip = 1} !skip {print} /^<!-- end -->/ {skip = 0}' README.md >"$tmp/new" && cp "$tmp/new" README.md
    exit
fi
sed -n '/^<!-- kv-sim policies -->/,/^<!-- end -->/p' README.md >"$tmp/have"
if cmp -s "$tmp/table" "$tmp/have"; then pass=$((pass + 1)); else
    echo "FAIL README.md: the policy table is not what kv-sim prints (sh tests/readme.sh build --write)"
    fail=$((fail + 1))
fi
sed -n '/^## Five more/,/^With your own/p' README.md | sed -n '/^```sh/,/^```/p' | grep -v '^```' | sed "s|build/my.db|$tmp/my.db|g; s|build/kept.npy|$tmp/kept.npy|g; s|^build/|$bin/|" >"$tmp/commands"
while read -r c; do
    if sh -c "$c" >"$tmp/out" 2>&1; then pass=$((pass + 1)); else
        echo "FAIL README.md: $c"
        tail -2 "$tmp/out"
        fail=$((fail + 1))
    fi
done <"$tmp/commands"
[ "$pass" -ge 5 ] || fail=$((fail + 1))
echo "$pass passed, $fail failed"
[ $fail -eq 0 ]

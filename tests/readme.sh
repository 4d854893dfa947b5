#!/bin/sh
# readme.sh BIN - the README's policy table is what kv-sim prints, and its commands on the samples and ways to add a policy work as shown.
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
sed -n '/^## Was it the budget/,/^## A page/p' README.md | sed -n '/^```sh/,/^```/p' | grep -v '^```' | sed "s|build/gap|$tmp/gap|g; s|^build/|$bin/|" >>"$tmp/commands"
while read -r c; do
    if KVTRACE_PLOTS=plots sh -c "$c" >"$tmp/out" 2>&1; then pass=$((pass + 1)); else
        echo "FAIL README.md: $c"
        tail -2 "$tmp/out"
        fail=$((fail + 1))
    fi
done <"$tmp/commands"
# sections whose blocks run as they stand
for section in 'Bring your own' 'Train an evictor' 'On a GPU'; do
    awk -v s="## $section" '/^## / {in_it = !index($0, s) ? 0 : 1} in_it && /^```/ {on = /^```sh/; next} in_it && on' README.md |
        sed "s|build/kv-|@/kv-|g; s|build/|$tmp/|g; s|@/kv-|$bin/kv-|g" >"$tmp/run"
    if [ -s "$tmp/run" ] && sh -e "$tmp/run" >"$tmp/out" 2>&1; then pass=$((pass + 1)); else
        echo "FAIL README.md: $section"
        tail -3 "$tmp/out"
        fail=$((fail + 1))
    fi
done
# the blocks of "Add one in ten minutes" but the last, which changes the sources; the plug-in and the mask are one policy
sed -n '/^### Add one/,/^## /p' README.md | awk -v to="$tmp/add" '/^```sh/ {n++; on = 1; next} /^```/ {on = 0} on {print > (to n)}'
for i in 1 2; do
    sed "s|build/mine|$tmp/mine|g; s|build/kv-|$bin/kv-|g" "$tmp/add$i" >"$tmp/run"
    if KVTRACE_PLOTS=plots sh -e "$tmp/run" >"$tmp/out" 2>&1; then pass=$((pass + 1)); else
        echo "FAIL README.md: way $i to add a policy"
        tail -3 "$tmp/out"
        fail=$((fail + 1))
    fi
done
"$bin/kv-sim" keep traces/samples/prose.kvt -p "plugin:$tmp/mine.so" -b 10% -o "$tmp/plugin.npy" >/dev/null 2>&1
"$bin/kv-sim" keep traces/samples/prose.kvt -p "mask:$tmp/mine.npy" -b 10% -o "$tmp/mask.npy" >/dev/null 2>&1
if [ -s "$tmp/mine/curves.svg" ] && cmp -s "$tmp/plugin.npy" "$tmp/mask.npy"; then pass=$((pass + 1)); else
    echo "FAIL README.md: no curve, or the plug-in and the mask keep different sets"
    fail=$((fail + 1))
fi
# three commands, then the ten queries on what they made
sed -n '/^### From a capture/,/^### Ten/p' README.md | sed -n '/^```sh/,/^```/p' | grep -v '^```' | sed "s|build/answer|$tmp/answer|g; s|build/kv-|$bin/kv-|g" >"$tmp/run"
if KVTRACE_PLOTS=plots sh -e "$tmp/run" >"$tmp/out" 2>&1 && [ -s "$tmp/answer/curves.svg" ]; then pass=$((pass + 1)); else
    echo "FAIL README.md: three commands to a figure"
    tail -3 "$tmp/out"
    fail=$((fail + 1))
fi
sed -n '/^```sql/,/^```/p' README.md | grep -v '^```' >"$tmp/queries"
python3 - "$tmp/answer.db" "$tmp/queries" <<'END'
import re, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
queries = [q for q in open(sys.argv[2]).read().split(";") if q.strip()]
assert len(queries) == 10, f"{len(queries)} queries"
for view, columns in re.findall(r"^\| `(v_(?:run|metric|slots))` \|[^|]*\| `([a-z0-9_ ]*)` \|$", open("README.md").read(), re.M):
    have = [row[1] for row in db.execute(f"PRAGMA table_info({view})")]
    assert columns.split() == have, f"{view} has the columns {' '.join(have)}"
for q in queries:
    # 9 has a row only where a policy keeps another number of bytes than asked
    assert db.execute(q).fetchall() or "kept_of_nominal" in q, f"nothing from {q}"
END
if [ $? -eq 0 ]; then pass=$((pass + 1)); else
    echo "FAIL README.md: a query"
    fail=$((fail + 1))
fi
[ "$pass" -ge 10 ] || fail=$((fail + 1))
echo "$pass passed, $fail failed"
[ $fail -eq 0 ]

# The tables as text, CSV and JSON: the same rows, the same bytes every time, and the database is not written.
. "$CLI/lib.sh"

synth t.kvt
synth u.kvt --seed 2
kv-sim run t.kvt u.kvt -p snapkv,recency,oracle -b 10%,50% --db r.db 2>/dev/null || fail 'cannot make r.db'
cp r.db before.db
chmod 444 r.db

rows() { # rows N COMMAND..: N rows in CSV, and as many in JSON
    n=$1
    shift
    ok kv-analyze "$@" --db r.db --csv
    check "$*: $n rows of CSV" test "$(wc -l <.out)" = $((n + 1))
    check "$*: the head line" test "$(sed -n '1{s/[a-z0-9_]*//g;s/,//g;p}' .out)" = ''
    cp .out first.csv
    ok kv-analyze "$@" --db r.db --csv
    check "$*: the same bytes again" cmp first.csv .out
    if have python3; then
        ok kv-analyze "$@" --db r.db --json
        cp .out rows.json
        check "$*: $n rows of JSON" python3 -c '
import csv, json, sys
a = json.load(open("rows.json"))
a = a["rows"] if isinstance(a, dict) else a
b = list(csv.DictReader(open("first.csv")))
assert len(a) == len(b) == int(sys.argv[1]) and all(list(y)[:len(x)] == list(x) for x, y in zip(a, b)), (len(a), len(b))' "$n"
    fi
}
rows 6 summary
rows 6 summary --metric recall
rows 3 summary -b 10%
rows 2 summary -p snapkv
rows 6 curve
rows 3 curve --trace t -b 50% --metric nats_lost
rows 6 layers -b 10%
rows 12 export --what run
rows 48 export --what slots

ok kv-analyze summary --db r.db
check 'a line for each policy and budget' test "$(grep -cE '^  (snapkv|recency|oracle) +[0-9.]+ +\[' .out)" = 6
ok kv-analyze curve --db r.db --metric recall
check 'the oracle is not beaten' grep -q oracle .out
ok kv-analyze layers --db r.db -b 50%
check 'a line for each layer' test "$(grep -cE '^ +[01] ' .out)" -ge 2
ok kv-analyze export --db r.db --what metric --jsonl
check 'a line for each metric row' test "$(wc -l <.out)" -gt 100
check 'the database is not written' cmp before.db r.db
check 'and nothing beside it' test -z "$(find . -name 'r.db?*')"

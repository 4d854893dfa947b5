# compare, power, recommend, heads, predict, merge: the same bytes twice, CSV and JSON alike, shards that join to the whole, and
# what is refused.
. "$CLI/lib.sh"

for i in 1 2 3 4; do synth t$i.kvt --seed $i; done
policies=full,snapkv,streaming,cake,oracle,oracle-global
run() {
    kv-sim run t?.kvt -p $policies -b 10%,30%,60% --detail head "$@" 2>/dev/null || fail "kv-sim run $*"
}
run --db r.db
run --db s1.db --shard 1/2
run --db s2.db --shard 2/2
cp r.db before.db
chmod 444 r.db

answer() { # answer N COMMAND..: N rows, in CSV and JSON, the same twice, and as text without complaint
    n=$1
    shift
    ok kv-analyze "$@" --db r.db --csv
    check "$*: $n rows" test "$(wc -l <.out)" = $((n + 1))
    cp .out first.csv
    ok kv-analyze "$@" --db r.db --csv
    check "$*: the same bytes again" cmp first.csv .out
    ok kv-analyze "$@" --db r.db --json
    if have python3; then
        cp .out rows.json
        check "$*: $n rows of JSON" python3 -c '
import json, sys
assert len(json.load(open("rows.json"))["rows"]) == int(sys.argv[1])' "$n"
    fi
    ok kv-analyze "$@" --db r.db
    check "$*: for a terminal" test "$(awk 'length > 150' .out | wc -l)" = 0
}
answer 1 compare cake snapkv
answer 1 compare cake snapkv -b 60% --margin 0.1
answer 4 compare --baseline snapkv
answer 8 compare cake streaming oracle oracle-global snapkv -b 30%,60%
answer 1 power cake snapkv -b 60% --difference 0.1 --metric recall
answer 1 power cake snapkv -b 60% --margin 0.5 --metric recall
answer 3 recommend --margin 0.5 --metric recall
answer 1 recommend --margin 0.5 --metric recall -p cake --page 1 --granularity kv_head
answer 8 heads cake snapkv -b 60%
answer 8 heads -b 30% --metric recall
ok kv-analyze layers --db r.db -b 60%
check 'layers tell how far the slots are from the oracle' grep -q 'oracle-global would keep elsewhere' .out
ok kv-analyze curve --db r.db --csv
check 'curves have a band' grep -q band_low .out
ok kv-analyze predict --db r.db --metric recall --csv
cp .out first.csv
ok kv-analyze predict --db r.db --metric recall --csv
check 'predict: the same bytes again' cmp first.csv .out
check 'the database is not written' cmp before.db r.db

same() { # same A.db B.db: all rows of the views, but for times
    for v in run metric slots; do
        for d in "$1" "$2"; do kv-analyze export --db "$d" --what $v --jsonl | sed 's/, "wall_s": [^}]*//' | sort >"$d.$v"; done
        check "$1 and $2 hold the same in v_$v" cmp "$1.$v" "$2.$v"
    done
}
ok kv-analyze merge s1.db s2.db -o whole.db
same whole.db r.db
ok kv-analyze merge r.db s2.db whole.db -o whole.db
same whole.db r.db
check 'nothing is left beside it' test -z "$(find . -name 'whole.db?*' ! -name 'whole.db.run' ! -name 'whole.db.metric' ! -name 'whole.db.slots')"

refused 2 'two policies' kv-analyze compare --db r.db
refused 2 'both sides' kv-analyze compare cake cake --db r.db
refused 1 "'snapvk'" kv-analyze compare cake snapvk --db r.db
refused 1 "'7%'" kv-analyze compare cake snapkv -b 7% --db r.db
refused 2 --margin kv-analyze compare cake snapkv --margin -1 --db r.db
refused 2 --margin kv-analyze recommend --db r.db
refused 2 --margin kv-analyze recommend --db r.db --margin 0
refused 2 --difference kv-analyze power cake snapkv --difference 0 --db r.db
refused 1 delta_nll kv-analyze predict --db r.db
refused 1 "'8'" kv-analyze recommend --margin 0.1 --page 8 --db r.db
refused 2 "'--margin'" kv-analyze summary --margin 1 --db r.db
refused 2 "'cake'" kv-analyze summary cake --db r.db
refused 2 -o kv-analyze merge s1.db
refused 2 databases kv-analyze merge -o out.db
refused 1 missing.db kv-analyze merge s1.db missing.db -o out.db
refused 1 t1.kvt kv-analyze merge s1.db t1.kvt -o out.db
refused 1 'not a regular file' kv-analyze merge s1.db -o /dev/null
kv-sim run t1.kvt t2.kvt t3.kvt -p snapkv -b 45% --db r2.db 2>/dev/null
kv-sim run t1.kvt t2.kvt t3.kvt t4.kvt -p cake -b 45% --db r2.db 2>/dev/null
refused 1 "trace 't4'" kv-analyze compare cake snapkv -b 45% --db r2.db
ok kv-analyze compare cake snapkv -b 45% --db r2.db --common
: >empty.db
head -c 20000 r.db >cut.db
for d in empty cut missing; do
    for c in 'compare a b' 'power a b' 'recommend --margin 1' heads predict; do
        # shellcheck disable=SC2086 # the words of a command
        refused 1 $d.db kv-analyze $c --db $d.db
    done
done

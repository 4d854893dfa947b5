# kv-sim run --gap and kv-analyze gap: the terms add up, parts stand apart from policies, words and figure as promised.
. "$CLI/lib.sh"

synth t.kvt --prompt-tokens 90
synth u.kvt --prompt-tokens 90 --seed 2
policies=snapkv:window=8,ada-snapkv:window=8,criticalkv:window=8,knorm:window=8,tova.decode
ok kv-sim run t.kvt u.kvt -p $policies -b 20%,50% --db plain.db
ok kv-analyze summary --db plain.db --csv
refused 1 'kv-sim run --gap' kv-analyze gap --db plain.db -b 20%
ok kv-sim run t.kvt u.kvt --gap -p $policies -b 20%,50% --db g.db
ok kv-sim run t.kvt u.kvt --gap -p $policies -b 20%,50% --db g.db
check 'nothing is computed twice' grep -q '^kv-sim: 0 new runs' .err
ok kv-analyze summary --db g.db --csv
check 'parts do not pose as policies' test "$(grep -c 'oracle=' .out)" = 0
check 'the oracle of the class stands beside each policy' grep -q ',layer,oracle-layer,' .out
check 'also of rules that drop row by row' grep -q ',match,oracle-match,' .out

ok kv-analyze gap --db g.db -b 20%
check 'three ways' test "$(grep -cE '^  (forward|reverse|mean): ' .out)" = 3
check 'a sentence for each policy of one cut' test "$(grep -c 'at 20% it loses .* the budget itself costs .* the ranking ' .out)" = 4
check 'kept sets that are no prefixes have one way' test "$(grep -c '^  criticalkv  ' .out)" = 1
ok kv-analyze gap --db g.db -b 20% --metric recall
check 'rules that drop for good' grep -q 'tova.decode: at 20% it loses .* dropping for good .* the rule ' .out
ok kv-analyze gap --db g.db -b 20%,50% --metric layer_error --csv
cp .out layer.csv
if have python3; then
    for metric in recall_contested recall layer_error; do
        ok kv-analyze gap --db g.db -b 20%,50% --metric $metric --json
        cp .out gap.json
        check "$metric: the terms add up" python3 -c '
import json
rows, n = json.load(open("gap.json"))["rows"], 0
for k in {(r["spec"], r["budget"], r["way"]) for r in rows}:
    t = {r["term"]: r["mean"] for r in rows if (r["spec"], r["budget"], r["way"]) == k}
    d = t["lost"] - sum(v for w, v in t.items() if w not in ("lost", "prediction", "aggregation"))
    assert abs(d) < 1e-12, (k, d)
    if "prediction" in t: assert abs(t["ranking"] - t["prediction"] - t["aggregation"]) < 1e-12, k
    n += 1
assert n >= 20, n'
        check "$metric: no part of a policy beats the oracle of what it measures" python3 -c '
import json, sys
for r in json.load(open("gap.json"))["rows"]:
    assert sys.argv[1] == "layer_error" or r["term"] in ("prediction", "aggregation") or r["mean"] > -1e-6, r' $metric
    done
fi
if have gnuplot; then
    ok kv-analyze plot gap --db g.db -b 20% -o figures
    check 'a figure' test -s figures/gap.svg -a -s figures/gap.png
    refused 1 'no data' kv-analyze plot gap --db plain.db -b 20% -o figures
else
    skip 'no gnuplot: no figure'
fi

# policies, metrics and selftest say what there is; --json parses.
. "$CLI/lib.sh"

ok kv-sim policies
check 'the table of policies' test "$(grep -cE '^(snapkv|cake|h2o|tova|pyramidkv|ada-snapkv|streaming|oracle) ' .out)" = 8
ok kv-sim policies cake
check 'one policy with its parameters' grep -qE '^ +gamma +200 ' .out
ok kv-sim policies cake:gamma=5
check 'the canonical string' grep -q 'spec .*cake:.*gamma=5,' .out
ok kv-sim metrics
check 'the table of metrics' test "$(grep -cE '^(recall|recall_contested|nats_lost|head_error|layer_error) ' .out)" = 5
if have python3; then
    ok sh -c 'kv-sim policies --json >p.json && kv-sim policies cake --json >c.json && kv-sim metrics --json >m.json'
    check '--json parses' python3 -c '
import json
p, c, m = (json.load(open(f + ".json")) for f in "pcm")
assert len(p) > 20 and "cake" in json.dumps(c) and {"recall", "layer_error"} <= {x["name"] for x in m}'
fi
synth t.kvt
kv-trace synth --layers 3 --q-heads 3 --kv-heads 1 --head-dim 8 --tokens 90 --prompt-tokens 60 -o u.kvt
ok kv-sim selftest t.kvt u.kvt
check 'selftest counts' grep -qE '^[1-9][0-9]* passed, 0 failed' .out

# Two kept sets on the prompt's words: counts and masses are those of kv-sim keep and of the attention map.
. "$CLI/lib.sh"

T="$ROOT/traces/samples/prose.kvt"
ok kv-analyze text "$T" -p snapkv,oracle -b 10%
check 'the four states and the mass' test "$(grep -cE '^  (both|A only|B only|neither) +[0-9.]+% +[0-9.]+%' .out)" = 4
check 'marks of each state' grep -q '\[-.*-\]' .out
check 'no colour in a pipe' test "$(grep -c "$(printf '\033')" .out)" = 0
cp .out first
ok kv-analyze text "$T" -p snapkv,oracle -b 10%
check 'the same bytes again' cmp first .out
ok kv-analyze text "$T" -p snapkv -b 10%
check 'the oracle stands in for B' grep -q '^A = snapkv at 10%   B = oracle at 10%' .out
ok kv-analyze text "$T" -p snapkv -b 10%,30%
check 'one policy at two budgets' grep -q 'B = snapkv at 30%' .out
ok kv-analyze text "$T" -p snapkv,h2o -b 10% --html text.html
check 'a page' grep -q '<div id="words"' text.html

if have python3 && python3 -c 'import numpy' 2>/dev/null; then
    LAYER=$(kv-trace info "$T" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["layers"][1])')
    ok kv-analyze text "$T" -p snapkv,ada-snapkv -b 10% --layer "$LAYER" --head 4 --json
    cp .out text.json
    ok kv-sim keep "$T" -p snapkv -b 10% --mask -o a.npy
    ok kv-sim keep "$T" -p ada-snapkv -b 10% --mask -o b.npy
    P=$(kv-trace info "$T" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["prompt_tokens"])')
    N=$(kv-trace info "$T" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["tokens"])')
    for h in 3 4 5; do ok kv-trace cat "$T" --stream q --layer "$LAYER" --head $h --rows "$P:$N" -o q$h.npy; done
    ok kv-trace cat "$T" --stream k --layer "$LAYER" --head 1 -o k.npy
    check 'counts and masses by hand' python3 -c '
import json, numpy as np
t = json.load(open("text.json")); v = t["view"]; P = v["P"]; l = t["layers"][0]; h = t["kv_heads"][0]
a = np.load("a.npy")[l, h, :P] != 0; b = np.load("b.npy")[l, h, :P] != 0
for x in t["tokens"]:
    i = x["token"]
    assert (x["both"], x["a_only"], x["b_only"], x["neither"]) == (int(a[i] and b[i]), int(a[i] and not b[i]), int(b[i] and not a[i]), int(not a[i] and not b[i])), x
k = np.load("k.npy").astype(np.float64).squeeze()
mass = 0
for h in (3, 4, 5):
    s = np.load(f"q{h}.npy").astype(np.float64).squeeze() @ k.T / np.sqrt(k.shape[1])
    s[np.arange(len(k))[None, :] > P + np.arange(len(s))[:, None]] = -np.inf
    p = np.exp(s - s.max(axis=1, keepdims=True))
    mass = mass + (p / p.sum(axis=1, keepdims=True)).mean(axis=0)[:P] / 3
assert np.allclose(mass, [x["mass"] for x in t["tokens"]], atol=2e-6), np.abs(mass - [x["mass"] for x in t["tokens"]]).max()'
else
    skip 'no numpy: counts and masses are not worked out by hand'
fi

refused 2 'needs a trace' kv-analyze text -p snapkv -b 10%
refused 2 'give -p' kv-analyze text "$T" -b 10%
refused 2 'at most 2' kv-analyze text "$T" -p a,b,c -b 10%
refused 1 'no layer 999' kv-analyze text "$T" -p snapkv -b 10% --layer 999
refused 1 'no head 99' kv-analyze text "$T" -p snapkv -b 10% --head 99
refused 1 'nothing.kvt' kv-analyze text nothing.kvt -p snapkv -b 10%
refused 1 'snapvk' kv-analyze text "$T" -p snapvk -b 10%

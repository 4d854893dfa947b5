# export --targets against the whole attention map, and what it refuses.
. "$CLI/lib.sh"
if ! python3 -c 'import numpy' 2>/dev/null; then
    skip 'python3 with numpy is not installed'
    exit 0
fi
cat >brute.py <<'END'
"""brute.py MAP.npy FOLDER A B THRESHOLD: every entry by its definition."""
import json, sys
import numpy as np
p, folder, (a, b), x = np.load(sys.argv[1]).astype(float), sys.argv[2], map(int, sys.argv[3:5]), float(sys.argv[5])
got = {n: np.load("%s/%s.npy" % (folder, n)) for n in ("mean", "max", "last", "rows")}
L, H, N = p.shape[0], p.shape[1], p.shape[3]
assert all(got[n].shape == (L, H, N) for n in ("mean", "max", "last")) and got["rows"].shape == (N,)
assert got["mean"].dtype == got["max"].dtype == np.float32 and got["last"].dtype == got["rows"].dtype == np.int32
d = json.load(open(folder + "/targets.json"))
assert d["measured_rows"] == [a, b] and d["shape"] == [L, H, N] and d["threshold"] == x
close = np.abs(p - x) < 1e-3 * x  # the map is rounded to float16
n = 0
for j in range(N):
    rows = range(max(a, j + 1), b)
    assert got["rows"][j] == len(rows)
    for l in range(L):
        for h in range(H):
            v = p[l, h, rows.start:rows.stop, j] if len(rows) else np.zeros(0)
            mean, most = (v.mean(), v.max()) if len(rows) else (0, 0)
            assert abs(got["mean"][l, h, j] - mean) < 1e-3 * mean + 1e-7, (l, h, j)
            assert abs(got["max"][l, h, j] - most) < 1e-3 * most + 1e-7, (l, h, j)
            hit = [i for i in rows if p[l, h, i, j] >= x]
            if not close[l, h, :, j].any():
                assert got["last"][l, h, j] == (hit[-1] if hit else -1), (l, h, j)
                n += 1
assert n > L * H * N * 0.9 and (got["last"] >= 0).any() and (got["last"] < 0).any()
END
synth a.kvt --tokens 90 --prompt-tokens 70
ok kv-trace cat a.kvt --stream map -o map.npy
ok kv-trace export --targets a.kvt -o one
check 'the decoded rows, by brute force' python3 brute.py map.npy one 70 90 0.01
ok kv-trace export --targets a.kvt --rows 1: --threshold 0.1 -o two
check 'every row, by brute force' python3 brute.py map.npy two 1 90 0.1
ok kv-trace export --targets a.kvt --rows 20:41 -o three
check 'some rows, by brute force' python3 brute.py map.npy three 20 41 0.01
ok kv-trace export --targets a.kvt -o again
check 'the same bytes again' sh -c 'for f in mean max last rows; do cmp one/$f.npy again/$f.npy || exit 1; done'

synth p.kvt --tokens 60 --prompt-tokens 60
refused 2 --rows kv-trace export --targets p.kvt -o out
refused 2 --targets kv-trace export p.kvt -o out
refused 2 FOLDER kv-trace export --targets a.kvt
refused 2 --threshold kv-trace export --targets a.kvt --threshold 0 -o out
refused 1 nowhere.kvt kv-trace export --targets nowhere.kvt -o out
echo x >file
refused 1 "'file'" kv-trace export --targets a.kvt -o file
python3 -c 'import numpy as np; m = np.tril(np.ones((1, 2, 8, 8), "f4")); np.save("m", m / m.sum(-1, keepdims=True))'
ok kv-trace import --map m.npy --prompt-tokens 5 -o map.kvt
exits 1 kv-trace export --targets map.kvt -o maps
check 'a map alone: nothing is written' test -z "$(ls maps)"

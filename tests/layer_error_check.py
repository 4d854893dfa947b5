"""layer_error of a replay against its definition in NumPy, on models that do something behind W_O: a norm (gemma2), a factor
(granite), neither (llama).

usage: layer_error_check.py BUILD_DIR FOLDER..     FOLDER: a model with tokens.json
Last line: 'N passed, N failed'."""
import json, os, sqlite3, subprocess, sys, tempfile
import numpy as np

build, passed, failed = sys.argv[1], 0, 0

def run(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=120)
    if r.returncode: sys.exit(f"FAIL {' '.join(map(str, args))}: {r.stderr.strip()[-300:]}\n0 passed, 1 failed")
    return r.stdout

for folder in sys.argv[2:]:
    name = os.path.basename(folder.rstrip("/"))
    with tempfile.TemporaryDirectory() as tmp:
        t = f"{tmp}/t.kvt"
        tokens = json.load(open(f"{folder}/tokens.json"))["prompts"][0]["tokens"]
        json.dump(tokens, open(f"{tmp}/t.json", "w"))
        P, N = len(tokens) * 2 // 3, len(tokens)
        run(f"{build}/kv-capture", "run", "-m", folder, "--tokens", f"{tmp}/t.json", "--prompt-tokens", P, "-o", t, "--dtype", "f32", "--wo", "embed",
            "--backend", "cpu")
        run(f"{build}/kv-sim", "keep", t, "-p", "streaming", "-b", 12, "-o", f"{tmp}/k.npy", "--mask")
        run(f"{build}/kv-sim", "run", t, "-p", "streaming", "-b", 12, "--db", f"{tmp}/r.db", "--metrics", "layer_error", "--backend", "cpu")
        def stream(s, *more):
            run(f"{build}/kv-trace", "cat", t, "--stream", s, "-o", f"{tmp}/s.npy", *more)
            return np.load(f"{tmp}/s.npy").astype(np.float64)
        info = json.loads(run(f"{build}/kv-trace", "info", t, "--json"))
        meta = info.get("metadata", info)
        q, k, v, wo, xnorm, kept = stream("q"), stream("k"), stream("v"), stream("wo"), stream("xnorm"), np.load(f"{tmp}/k.npy")
        group = q.shape[1] // k.shape[1]
        want = {}
        for l in range(q.shape[0]):
            if meta["window"][l]: continue # takes no part in eviction
            post = stream("post_norm", "--layer", l).reshape(-1, 2) if "post_norm_eps" in meta else None
            o = np.zeros((2, N - P, q.shape[1], q.shape[3]))
            for h in range(q.shape[1]):
                for i in range(P, N):
                    s = k[l, h // group, : i + 1] @ q[l, h, i] * meta["scale"]
                    if meta.get("softcap"): s = meta["softcap"] * np.tanh(s / meta["softcap"])
                    for which in range(2):
                        see = np.ones(i + 1, bool)
                        if which: see[:P] = kept[l, h * kept.shape[1] // q.shape[1], :P] != 0
                        p = np.where(see, np.exp(s - s[see].max()), 0)
                        o[which, i - P, h] = p / p.sum() @ v[l, h // group, : i + 1]
            y = o.reshape(2, N - P, -1) @ wo[l].T
            if post is not None:
                y = y + post[:, 1]
                y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + meta["post_norm_eps"]) * post[:, 0]
            change = np.linalg.norm(y[0] - y[1], axis=-1) * meta.get("out_scale", 1)
            want[l] = float((change / xnorm[l].ravel()[P:N]).mean())
        got = dict(sqlite3.connect(f"{tmp}/r.db").execute("SELECT layer, value FROM v_metric WHERE metric = 'layer_error' AND layer IS NOT NULL AND head IS NULL"))
        good = set(got) == set(want) and want and all(abs(got[l] - want[l]) <= 1e-5 * want[l] for l in want) and min(want.values()) > 1e-3
        passed, failed = passed + good, failed + (not good)
        print("ok  " if good else "FAIL", name, "norm" if "post_norm_eps" in meta else "", f"x {meta['out_scale']:g}" if "out_scale" in meta else "", got, want)
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed or not passed else 0)

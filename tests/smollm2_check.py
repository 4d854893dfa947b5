"""Compare captures of SmolLM2-135M-Instruct (Q4_1 GGUF) with reference values of another implementation.

usage: smollm2_check.py BUILD_DIR GOLDEN_DIR MODEL [cuda]
GOLDEN_DIR holds expected.json and its .npy files, computed with Hugging Face transformers in float32 on the dequantised
weights. Limits: about ten times the noise of that computation. Needs NumPy. Last line: 'N passed, N failed'."""
import json, os, sys, tempfile
import numpy as np
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from checks import check, close, run, tally

build, golden, model = sys.argv[1:4]
backend = sys.argv[4] if len(sys.argv) > 4 else "cpu"
tmp = tempfile.mkdtemp()

def stream(trace, s, *args):
    run(f"{build}/kv-trace", "cat", trace, "--stream", s, "-o", f"{tmp}/s.npy", *args)
    return np.load(f"{tmp}/s.npy")

for p in json.load(open(f"{golden}/expected.json")):
    name, pre = p["name"], f"{golden}/{p['name']}."
    load = lambda s: np.load(pre + s + ".npy")
    json.dump(p["tokens"], open(f"{tmp}/t.json", "w"))
    x = f"{tmp}/{name}.kvt"
    run(f"{build}/kv-capture", "run", "-m", model, "--tokens", f"{tmp}/t.json", "-o", x, "--dtype", "f32", "--backend", backend,
        "--logits", f"{tmp}/l.npy", "--logits-rows", ",".join(map(str, p["logit_rows"])))
    logits = np.load(f"{tmp}/l.npy")
    close(f"{name} logits", logits, load("logits_rows"), 1e-3)
    if p["logit_rows"][-1] == p["n_tokens"] - 1:
        ids = [i for i, _ in p["last_row_top20"]]
        close(f"{name} last row's 20 best logits", logits[-1][ids], [v for _, v in p["last_row_top20"]], 1e-3)
        check(f"{name} last row's best token", int(logits[-1].argmax()) == ids[0])
    nll = stream(x, "nll").ravel()[:p["n_tokens"] - 1]
    close(f"{name} nll", nll, load("nll").ravel(), 5e-4)
    close(f"{name} mean nll", nll.mean(dtype=np.float64), p["mean_nll"], 2e-5)
    close(f"{name} lse", stream(x, "lse"), load("lse_all_layers"), 5e-4)
    at = p["colsum_layers"]
    close(f"{name} colsum", stream(x, "colsum")[at], load("colsum_layers"), 5e-4)
    for s in "qkv" if "qkv_layers" in p else "":
        close(f"{name} {s}", stream(x, s)[p["qkv_layers"]], load(s), 5e-4)
    run(f"{build}/kv-capture", "run", "-m", model, "--tokens", f"{tmp}/t.json", "-o", x, "--dtype", "f32", "--backend", backend,
        "--record", "stats", "--decode", 32)
    got = stream(x, "tokens").ravel()[p["n_tokens"]:].tolist()
    check(f"{name} greedy continuation", got == p["greedy32"], "" if got == p["greedy32"] else f"{got}")
sys.exit(tally())

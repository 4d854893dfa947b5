"""Compare captures of a real model with reference values of another implementation.

usage: real_check.py BUILD_DIR EXPECTED.json MODEL [cpu|cuda]
EXPECTED.json: {sha256, prompts: [{text, tokens, nll, mean_nll, last_top_ids, last_top_logits, greedy16_after_128}]}, made with
Hugging Face transformers in float32 on the dequantised weights. Needs NumPy. Last line: 'N passed, N failed'."""
import json, os, sys, tempfile
import numpy as np
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from checks import check, close, run, tally

build, expected, model = sys.argv[1:4]
backend = sys.argv[4] if len(sys.argv) > 4 else "cpu"

want = json.load(open(expected))
with tempfile.TemporaryDirectory() as tmp:
    def capture(tokens, *args):
        json.dump(tokens, open(f"{tmp}/t.json", "w"))
        run(f"{build}/kv-capture", "run", "-m", model, "--tokens", f"{tmp}/t.json", "-o", f"{tmp}/x.kvt", "--record", "stats", "--dtype",
            "f32", "--backend", backend, *args)
    def stream(s):
        run(f"{build}/kv-trace", "cat", f"{tmp}/x.kvt", "--stream", s, "-o", f"{tmp}/s.npy")
        return np.load(f"{tmp}/s.npy").ravel()
    info = json.loads(run(f"{build}/kv-capture", "info", "-m", model, "--json"))
    check("the model is the one the values were made with", info["sha256"] == want["sha256"])
    for p in want["prompts"]:
        name, tokens = p["text"], p["tokens"]
        capture(tokens, "--logits", f"{tmp}/l.npy", "--logits-rows", len(tokens) - 1)
        nll = stream("nll")[:len(tokens) - 1]
        close(f"{name}: nll", nll, p["nll"], 2e-3)
        close(f"{name}: mean nll", nll.mean(dtype=np.float64), np.mean(p["nll"]), 1e-4)
        close(f"{name}: best logits of the last row", np.load(f"{tmp}/l.npy")[0][p["last_top_ids"]], p["last_top_logits"], 2e-3)
        capture(tokens[:128], "--decode", 16)
        got = stream("tokens")[128:].astype(int).tolist()
        check(f"{name}: greedy continuation", got == p["greedy16_after_128"], "" if got == p["greedy16_after_128"] else str(got))
sys.exit(tally())

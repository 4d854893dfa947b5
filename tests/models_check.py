"""What drive_models.py does not ask of the small models: the greedy continuation is the reference's, any number of threads
gives the same bytes, and so do the same weights as GGUF, whole and in parts.

usage: models_check.py BUILD_DIR DIR..     DIR/tiny/NAME/: folders with tokens.json and expected.json
Needs NumPy. Last line: 'N passed, N failed'."""
import glob, json, os, subprocess, sys, tempfile
import numpy as np
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hf_to_gguf import convert

build, passed, failed = sys.argv[1], 0, 0
NOT_IN_GGUF = {"qwen2_window": "no key for where the window begins", "qwen3_moe_plain": "no key for weights that do not add up to 1"}

def check(name, why=""):
    global passed, failed
    passed, failed = passed + (not why), failed + bool(why)
    if why: print("FAIL", name, why)

def run(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=120)
    return r.stderr.strip()[-250:] if r.returncode else ""

def capture(model, tokens, out, *more):
    json.dump(tokens, open(out + ".json", "w"))
    return run(f"{build}/kv-capture", "run", "-m", model, "--tokens", out + ".json", "-o", out, "--dtype", "f32", "--backend", "cpu", "--logits",
               out + ".npy", *more)

def stream(trace, s):
    why = run(f"{build}/kv-trace", "cat", trace, "--stream", s, "-o", trace + ".s.npy")
    if why: raise RuntimeError(why)
    return np.load(trace + ".s.npy")

with tempfile.TemporaryDirectory() as tmp:
    for d in sorted(g for top in sys.argv[2:] for g in glob.glob(f"{top}/tiny/*/")):
        name = os.path.basename(d[:-1])
        tokens = {p["name"]: p["tokens"] for p in json.load(open(d + "tokens.json"))["prompts"]}
        for p in json.load(open(d + "expected.json"))["prompts"]:
            want = p.get("greedy16", p.get("greedy"))
            unsure = [i for i, m in enumerate(p.get("greedy_margins", [])) if m < 1e-3]
            want = want[: unsure[0] if unsure else len(want)]
            why = capture(d, tokens[p["name"]], f"{tmp}/a.kvt", "--decode", len(want)) if want else ""
            got = stream(f"{tmp}/a.kvt", "tokens").ravel()[p["n_tokens"]:].astype(int).tolist() if want and not why else []
            check(f"{name}/{p['name']} greedy", why or ("" if got == want else f"{got} for {want}"))
        why = capture(d, tokens["p0"], f"{tmp}/a.kvt", "--threads", 1) or capture(d, tokens["p0"], f"{tmp}/b.kvt", "--threads", 3)
        check(f"{name} with 1 and 3 threads", why or ("" if open(f"{tmp}/a.kvt.npy", "rb").read() == open(f"{tmp}/b.kvt.npy", "rb").read()
              and all(np.array_equal(stream(f"{tmp}/a.kvt", s), stream(f"{tmp}/b.kvt", s)) for s in "qkv") else "not the same bytes"))
        if name in NOT_IN_GGUF: continue
        for p in tokens: # the second prompt may be one where longrope changes its factors
            why = capture(d, tokens[p], f"{tmp}/a.kvt")
            for parts in (1, 3):
                f = f"{tmp}/{name}.gguf"
                convert(d, f, parts)
                if parts == 3: f = f"{tmp}/{name}-00002-of-00003.gguf"
                why = why or capture(f, tokens[p], f"{tmp}/b.kvt")
                for s in "qkv" if not why else "":
                    if not why and not np.array_equal(stream(f"{tmp}/a.kvt", s), stream(f"{tmp}/b.kvt", s)): why = f"{s} differs"
                if not why and not np.array_equal(np.load(f"{tmp}/a.kvt.npy"), np.load(f"{tmp}/b.kvt.npy")): why = "logits differ"
                check(f"{name}/{p} as GGUF in {parts} part(s)", why)
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed or not passed else 0)

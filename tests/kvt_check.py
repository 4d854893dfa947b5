"""traces/kvt.py, reader and writer, against kv-trace on synthetic traces.

usage: kvt_check.py BUILD_DIR        from the repository root; last line: 'N passed, N failed'"""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, "traces")
sys.dont_write_bytecode = True
import kvt

program = os.path.join(sys.argv[1], "kv-trace")
passed = failed = 0


def check(what, good):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAIL", what)


def run(*args):
    return subprocess.run([program, *map(str, args)], check=True, capture_output=True)


with tempfile.TemporaryDirectory() as tmp:
    trace, arr = tmp + "/t.kvt", tmp + "/a.npy"

    def cat(stream, *args):
        run("cat", trace, "--stream", stream, "-o", arr, *args)
        return np.load(arr)

    run("synth", "--layers", 3, "--q-heads", 6, "--kv-heads", 2, "--head-dim", 16, "--tokens", 1500, "-o", trace)
    t = kvt.Trace(trace)
    info = json.loads(run("info", trace, "--json").stdout)
    check("content hash", info["content_sha256"] == t.content_sha256())
    check("metadata", all(info[k] == v for k, v in t.info.items()))
    check("streams", sorted(s["stream"] for s in info["streams"]) == sorted(t.streams()))
    for s, heads in (("q", 6), ("k", 2), ("v", 2)):
        a = cat(s)
        check(s, all(np.array_equal(a[l, h], t.read(s, l, h)) for l in range(3) for h in range(heads)))
        check(s + " rows", np.array_equal(a[1, 1, 1000:1100], t.read(s, 1, 1, rows=(1000, 1100))))
    check("wo", all(np.array_equal(cat("wo")[l], t.read("wo", l)) for l in range(3)))
    check("tokens", np.array_equal(cat("tokens"), t.read("tokens")))
    check("text", run("cat", trace, "--stream", "text").stdout == t.read("text"))
    # float32: four planes
    q = np.random.default_rng(1).standard_normal((2, 4, 70, 8)).astype(np.float32)
    for s in "qkv":
        np.save(f"{tmp}/{s}.npy", q if s == "q" else q[:, :2])
    run("import", "--q", tmp + "/q.npy", "--k", tmp + "/k.npy", "--v", tmp + "/v.npy", "-o", trace)
    t = kvt.Trace(trace)
    check("tokens unsplit", np.array_equal(np.arange(70), t.read("tokens")))
    check("f32", all(np.array_equal(q[l, h], t.read("q", l, h)) for l in range(2) for h in range(4)))
    # the writer: what it wrote is a sound trace, holds the same, and is cut into the same chunks as kv-trace's own
    for dtype in ("f32", "f16", "bf16"):
        n, rng = 2100, np.random.default_rng(2)
        arrays = {s: rng.standard_normal((2, h, n, 16)).astype(np.float32) for s, h in (("q", 4), ("k", 2), ("v", 2))}
        mine = f"{tmp}/{dtype}.kvt"
        with kvt.Writer(mine, kvt.new_info(2, 4, 2, 16, n, "mine", dtype, prompt_tokens=2000), provenance={"by": "test"}) as w:
            w.put("tokens", np.arange(n))
            for l in range(2):
                for s in "qkv":
                    w.put(s, arrays[s][l], layer=l)
            w.put("text", b"some text")
            check("no file before the end", not os.path.exists(mine))
        run("verify", "--deep", mine)
        t = kvt.Trace(mine)
        check("written content hash", json.loads(run("info", mine, "--json").stdout)["content_sha256"] == t.content_sha256())
        check("written rows", all(np.abs(t.read(s, l, h) - arrays[s][l, h]).max() <= {"f32": 0, "f16": 2e-3, "bf16": 2e-2}[dtype]
                                  for s in "qkv" for l in range(2) for h in range(2)))
        check("zstd reads it", subprocess.run(["zstd", "-tq", mine]).returncode == 0)
        if dtype == "bf16":
            continue
        for s in "qkv":
            np.save(f"{tmp}/{s}.npy", arrays[s].astype(np.float16 if dtype == "f16" else np.float32))
        run("import", "--q", tmp + "/q.npy", "--k", tmp + "/k.npy", "--v", tmp + "/v.npy", "--prompt-tokens", 2000, "-o", trace)
        same = [{f: c[f] for f in ("layer", "token_first", "token_count", "planes", "check")} for c in t.chunks if c["name"] in "qkv"]
        own = [{f: c[f] for f in same[0]} for c in kvt.Trace(trace).chunks if c["name"] in "qkv"]
        check("chunks as kv-trace cuts them", same == own)
    try:
        with kvt.Writer(mine + "x", t.info) as w:
            w.put("q", np.full((4, 10, 16), 1e6), layer=0, dtype="f16")
        check("f16 overflow", False)
    except kvt.Error:
        check("a writer that failed leaves no file, and what recover needs", not os.path.exists(mine + "x") and os.path.exists(mine + "x.partial"))
    # damage is noticed: every byte of the head, the first chunk, the index and the footer
    for s in "qkv":
        np.save(f"{tmp}/{s}.npy", q if s == "q" else q[:, :2])
    run("import", "--q", tmp + "/q.npy", "--k", tmp + "/k.npy", "--v", tmp + "/v.npy", "-o", trace)
    data = open(trace, "rb").read()
    at = [*range(0, 300, 7), *range(len(data) - 200, len(data), 3)]
    quiet = []
    for i in at:
        bad = bytearray(data)
        bad[i] ^= 4
        open(arr, "wb").write(bad)
        try:
            kvt.Trace(arr)
            quiet.append(i)
        except Exception:
            pass
    # chunk 0 is the metadata's first copy, which nobody reads: those bytes may change unnoticed here
    check("damage %s" % quiet, all(48 <= i < len(data) - 264 for i in quiet) and len(quiet) < len(at))
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed or not passed else 0)

"""traces/kvt.py against kv-trace cat on synthetic traces.

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
    # damage is noticed: every byte of the head, the first chunk, the index and the footer
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

"""Damaged models: refused by name, quickly, in little memory.

usage: malformed_check.py BUILD_DIR DIR [LIMIT_MB]
DIR/manifest.jsonl says what each file or folder of DIR is and what must happen: error (exit 1 or 2 and a message naming the
file), ok, or error_or_ok. Peak memory must stay below the file's size + LIMIT_MB (64; sanitizers need more). Last line:
'N passed, N failed'."""
import json, os, signal, sys, tempfile

build, top = sys.argv[1:3]
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 64
passed = failed = largest = 0


def start():
    """MB that the program takes beyond 32 before it has read anything: the libraries of a CUDA build alone are 200."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os.execv(f"{build}/kv-capture", ["kv-capture", "--version"])
    return max(0, os.wait4(pid, 0)[2].ru_maxrss / 1024 - 32)


libraries = start()
with tempfile.TemporaryDirectory() as tmp:
    json.dump([1, 2, 3, 4, 5], open(f"{tmp}/t.json", "w"))
    for line in open(f"{top}/manifest.jsonl"):
        m = json.loads(line)
        f = f"{top}/{m['file']}"
        size = sum(os.path.getsize(os.path.join(d, n)) for d, _, names in os.walk(f) for n in names) if os.path.isdir(f) else os.path.getsize(f)
        pid = os.fork()
        if not pid:
            err = os.open(f"{tmp}/err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(err, 2)
            signal.alarm(20)
            os.execv(f"{build}/kv-capture", ["kv-capture", "run", "-m", f, "--tokens", f"{tmp}/t.json", "-o", f"{tmp}/y.kvt", "--backend", "cpu"])
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        said = open(f"{tmp}/err", errors="replace").read()
        refused = code in (1, 2) and os.path.basename(f) in said and "ERROR:" not in said and len(said.splitlines()) == 1
        good = dict(ok=code == 0, error=refused, error_or_ok=code == 0 or refused)[m["expect"]]
        over = usage.ru_maxrss / 1024 - size / 2**20 - libraries
        largest = max(largest, over)
        if over > limit: good = False
        passed, failed = passed + good, failed + (not good)
        if not good: print("FAIL", m["file"], m["what"], "| exit", code, f"| {over:.0f} MB beyond its size |", said.strip()[-300:])
print(f"largest peak beyond the file's size: {largest:.0f} MB")
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed or not passed else 0)

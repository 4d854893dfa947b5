"""Files made to do harm: bombs, loops, links, names with escape sequences, HTML, SQL and shell in them (SECURITY.md).

usage: hostile_check.py BUILD_DIR
Needs NumPy and zstandard. Each program must end in SECONDS, with MEMORY_MB of memory to allocate (no limit under sanitizers), refuse in
one line where it must refuse, and put nothing on a terminal that the terminal would obey. Last line: 'N passed, N failed, N skipped'."""
import io, json, os, pty, re, resource, shutil, signal, sqlite3, struct, subprocess, sys, tempfile, threading, zipfile, zlib
import numpy as np
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(root, "traces"), os.path.join(root, "tests")]
import kvt

build = os.path.abspath(sys.argv[1])
SECONDS, MEMORY_MB = 60, 0 if "san-" in sys.argv[1] else 480 + 16 * os.cpu_count() # a thread has a stack
passed = failed = skipped = 0
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
EVIL = "e\x1b]0;owned\x07\x1b[2J\u202egnp\u200b\x9b1m"  # a title, a cleared screen, a reversed name, a C1 sequence

def check(good, what, why=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good: print("FAIL", what, "|", str(why)[-300:])

def run(*argv, env=None, memory=MEMORY_MB):
    """(exit status, stdout, stderr)"""
    def limit():
        if memory: resource.setrlimit(resource.RLIMIT_DATA, (memory << 20, memory << 20))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        p = subprocess.Popen([f"{build}/{argv[0]}", *argv[1:]], stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=tmp, preexec_fn=limit,
                             env=dict(os.environ, KVTRACE_PLOTS=f"{root}/plots", OPENBLAS_NUM_THREADS="1", **(env or {})))
        timer = threading.Timer(SECONDS, p.kill)
        timer.start()
        rc = p.wait()
        timer.cancel()
        out.seek(0), err.seek(0)
        return rc, out.read().decode(errors="surrogateescape"), err.read().decode(errors="surrogateescape")

def quiet(text): return not OBEYED.search(text.replace("\n", "").replace("\t", ""))

def refused(word, *argv, code=(1, 2), **more):
    rc, out, err = run(*argv, **more)
    lines = [l for l in err.splitlines() if not l.startswith("try '")]
    check(rc in code and len(lines) == 1 and word in err and quiet(err), " ".join(argv)[-120:],
          f"exit {rc}: {err.strip()} (wanted '{word}')")

def fine(*argv, **more):
    rc, out, err = run(*argv, **more)
    check(rc == 0 and quiet(out) and quiet(err), " ".join(argv)[-120:], f"exit {rc}: {err.strip()} {OBEYED.findall(out + err)[:3]}")
    return out

def write(name, data):
    path = f"{tmp}/{name}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").write(data)
    return path

def trace(name, tokens=64, **more):
    """A small trace with everything the reports read."""
    path, r = f"{tmp}/{name}.kvt", np.random.default_rng(1)
    info = dict(kvt.new_info(2, 2, 1, 8, tokens, "m", "f16", prompt_tokens=tokens - 8, prompt_id=name, category="c"), **more)
    text = b"<b>w\x1b[2J</script><script>alert(1)</script> " + b"x" * tokens
    with kvt.Writer(path, info) as w:
        w.put("tokens", np.arange(tokens)), w.put("text", text), w.put("offsets", np.minimum(np.arange(tokens + 1) * 3, len(text)))
        for l in range(2):
            for s, heads in (("q", 2), ("k", 1), ("v", 1)): w.put(s, r.standard_normal((heads, tokens, 8)), layer=l)
            w.put("xnorm", np.ones(tokens, "f4"), layer=l), w.put("wo", r.standard_normal((1, 16, 16)), layer=l)
    return path

class Raw(kvt.Writer):
    """A trace whose chunks say what they like: meta is given as bytes, chunks by record."""
    def _put_meta(self): self.chunk("meta", self.info["bytes"])
    def chunk(self, stream, raw, says=None, kind="u8"):
        a = np.frombuffer(raw, np.uint8).reshape(1, -1, 1)
        if says is None: return self._chunk(stream, a, 0, 0, 0, kvt.TYPES[kind])
        keep, kvt.RECORD = kvt.RECORD, Lying(kvt.RECORD, says)
        try: self._chunk(stream, a, 0, 0, 0, kvt.TYPES[kind])
        finally: kvt.RECORD = keep

class Lying:
    def __init__(self, record, says): self.record, self.says = record, says
    def pack(self, *v): return self.record.pack(*(self.says.get(f, x) for f, x in zip(kvt.FIELDS, v)))

def raw_trace(name, meta, chunks=()):
    info = {"bytes": meta, "tokens": 1}
    with Raw(f"{tmp}/{name}.kvt", info) as w:
        for c in chunks: w.chunk(*c)
    return f"{tmp}/{name}.kvt"

def bombs():
    good = json.dumps(kvt.new_info(1, 1, 1, 4, 4, "m", "f16")).encode()
    for command in (("info",), ("verify",), ("info", "--json")):
        refused("values", "kv-trace", command[0], raw_trace("meta_values", b'{"a":[' + b"[]," * (5 << 20) + b"[]]}"), *command[1:])
    refused("metadata of", "kv-trace", "info", raw_trace("meta_large", b'{"a":"' + b"x" * (20 << 20) + b'"}'))
    refused("size", "kv-trace", "cat", raw_trace("text", good, [("text", bytes(300 << 20))]), "--stream", "text")
    fine("kv-trace", "info", "--json", raw_trace("provenance", good, [("provenance", b"[" + b"[]," * (4 << 20) + b"[]]")]))
    for says in ({"raw": 1 << 63}, {"raw": (1 << 64) - 1}, {"stored": 1 << 63}, {"frames": 1 << 31}, {"token_count": 0xffffffff, "raw": 0xffffffff},
                 {"raw": 1 << 30, "token_count": 1 << 30}, {"width": 0xffffffff}, {"token_first": 1 << 63}):
        refused("trace", "kv-trace", "verify", "--deep", raw_trace("lies", good, [("text", b"abcd", says)]))
    # what a chunk may hold at most costs no more than three times that (trace.h)
    info = kvt.new_info(1, 1, 1, 64, 1 << 19, "m", "f16")
    with Raw(f"{tmp}/zeros.kvt", {"bytes": json.dumps(info).encode(), "tokens": 1}) as w:
        w.chunk("v", bytes(64 << 20), {"token_count": 1 << 19, "width": 64, "dtype": 1, "raw": 64 << 20})
    refused("", "kv-sim", "run", f"{tmp}/zeros.kvt", "-p", "snapkv", "-b", "5%", "--db", "zeros.db")
    fine("kv-trace", "verify", f"{tmp}/zeros.kvt", memory=MEMORY_MB and 300)
    fine("kv-trace", "verify", "--deep", f"{tmp}/zeros.kvt", memory=MEMORY_MB and 300)
    # zip members: larger than they say, than they can be, than the file
    array = io.BytesIO()
    np.save(array, np.zeros((1, 1, 4 << 20, 1), "f4"))
    for name, change in (("npz_short", dict(raw=100)), ("npz_2e62", dict(raw=1 << 62)), ("npz_packed", dict(packed=1 << 62)), ("npz_at", dict(at=1 << 62))):
        refused("cannot read array", "kv-trace", "import", "--map", npz(name, array.getvalue(), **change), "-o", "out.kvt")
    head = struct.pack("<6sBBH", b"\x93NUMPY", 1, 0, 118)
    for shape in ("(4611686018427387904, 4)", "(18446744073709551615,)", "(4294967296, 4294967296, 0)", "(" + "1," * 40 + ")"):
        refused("cannot read array", "kv-trace", "import", "--map", write("shape.npy", head + f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"), "-o", "out.kvt")
    # JSON of models
    refused("values", "kv-capture", "info", "-m", model("header", header=b'{"a":[' + b"[]," * (4 << 20) + b"[]]}"))
    tiny = model("vocabulary")
    write("vocabulary/tokenizer.json", b'{"a":[' + b"[]," * (9 << 20) + b"[]]}")
    refused("values", "kv-capture", "tokenize", "-m", tiny, "--text", "x")
    refused("", "kv-capture", "info", "-m", model("deep", config=b"[" * 100000))
    refused("values", "kv-capture", "run", "-m", LLAMA, "--prompts", write("deep.jsonl", b'{"id":"a","text":"x","more":[' + b"[]," * (2 << 20) + b"[]]}\n"), "-o", f"{tmp}/out")
    check(not os.path.exists(f"{tmp}/out.kvt") and not os.path.exists(f"{tmp}/out"), "nothing was written")

def npz(name, data, packed=None, raw=None, at=0):
    """One deflated member with 64-bit sizes."""
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = z.compress(data) + z.flush()
    local = struct.pack("<IHHHHHIIIHH", 0x04034b50, 45, 0, 8, 0, 0, zlib.crc32(data), 0, 0, 5, 0) + b"a.npy" + body
    extra = struct.pack("<HHQQQ", 1, 24, len(data) if raw is None else raw, len(body) if packed is None else packed, at)
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014b50, 45, 45, 0, 8, 0, 0, zlib.crc32(data), 0xffffffff, 0xffffffff, 5, len(extra), 0, 0, 0, 0, 0xffffffff) + b"a.npy" + extra
    return write(name + ".npz", local + entry + struct.pack("<IHHHHIIH", 0x06054b50, 0, 0, 1, 1, len(entry), len(local), 0))

def model(name, config=None, header=None, weights=True):
    """A copy of a golden folder, with one file replaced."""
    to = f"{tmp}/{name}"
    shutil.rmtree(to, ignore_errors=True)
    os.makedirs(to)
    for f in ("config.json", "model.safetensors"): shutil.copy(f"{root}/tests/golden/models_extra/tiny/qwen3/{f}", to)
    if config is not None: open(f"{to}/config.json", "wb").write(config)
    if header is not None: open(f"{to}/model.safetensors", "wb").write(struct.pack("<Q", len(header)) + header)
    if not weights: os.remove(f"{to}/model.safetensors")
    return to

def links():
    index = lambda shard: json.dumps({"weight_map": {"a": shard}}).encode()
    model("model"), model("index/sub")  # what the index must not reach is a whole model
    shutil.copy(f"{root}/tests/golden/models_extra/tiny/qwen3/config.json", f"{tmp}/index")
    for shard in ("../model/model.safetensors", f"{tmp}/model/model.safetensors", "sub/model.safetensors", "/etc/passwd", "..", ".x.safetensors", "model.safetensors.index.json", ""):
        write("index/model.safetensors.index.json", index(shard))
        refused("not a file of the folder", "kv-capture", "info", "-m", f"{tmp}/index")
    for shard in ("x\x1b[2J.safetensors", "\u202ex.safetensors"):
        write("index/model.safetensors.index.json", index(shard))
        refused("x", "kv-capture", "info", "-m", f"{tmp}/index")
    write("index/model.safetensors.index.json", json.dumps({"weight_map": {f"t{i}": f"m{i:05d}.safetensors" for i in range(9000)}}).encode())
    refused("m00000", "kv-capture", "info", "-m", f"{tmp}/index")
    for target in ("model.safetensors", "/dev/zero", "/dev/stdin", "."):  # a loop, what never ends, a folder
        m = model("link", weights=False)
        os.symlink(target, f"{m}/model.safetensors")
        refused("model.safetensors", "kv-capture", "info", "-m", m)
    for f in ("config.json", "tokenizer.json"):
        m = model("fifo")
        if os.path.exists(f"{m}/{f}"): os.remove(f"{m}/{f}")
        os.mkfifo(f"{m}/{f}")
        refused(f, "kv-capture", "tokenize", "-m", m, "--text", "x")
        os.remove(f"{m}/{f}"), os.symlink("/dev/zero", f"{m}/{f}")
        refused(f, "kv-capture", "tokenize", "-m", m, "--text", "x")
    secret = write("secret", b"the secret of another folder")
    m = model("peek", weights=False)
    os.symlink(secret, f"{m}/model.safetensors")
    rc, out, err = run("kv-capture", "info", "-m", m)
    check(rc == 1 and "the secret" not in out + err, "a link to what is no model shows nothing of it", err)
    for file in ("/dev/zero", "/proc/self/mem", ".", "nowhere"):
        refused(file, "kv-capture", "run", "-m", LLAMA, "--prompts", write("p.jsonl", json.dumps({"id": "a", "file": file}).encode()), "-o", "out", "--dry-run")
    for id in ("../x", "/x", "a/b", ".x", "-x", "", "a b", "a\nb"):
        refused("'id'", "kv-capture", "run", "-m", LLAMA, "--prompts", write("p.jsonl", json.dumps({"id": id, "text": "x"}).encode()), "-o", "out", "--dry-run")
    os.symlink("loop.kvt", f"{tmp}/loop.kvt")
    os.mkfifo(f"{tmp}/pipe.kvt")
    for t in ("loop.kvt", "pipe.kvt", "/dev/zero"): refused(t, "kv-trace", "verify", t), refused(t, "kv-trace", "recover", t, "out.kvt")

def terminal(*argv):
    """stdout and stderr as a terminal gets them; None where there are none to be had"""
    global skipped
    try: pid, fd = pty.fork()
    except OSError as e:
        skipped += 1
        print("SKIP hostile_check.py: no terminal:", e)
        return None
    if not pid:
        os.chdir(tmp)
        signal.alarm(SECONDS)
        os.execv(f"{build}/{argv[0]}", argv)
    out = b""
    while True:
        try: piece = os.read(fd, 65536)
        except OSError: break
        if not piece: break
        out += piece
    os.waitpid(pid, 0), os.close(fd)
    return out.decode(errors="surrogateescape").replace("\r\n", "\n")

def names():
    t = trace("evil", model=EVIL, arch=EVIL, prompt_id=EVIL, category=EVIL + "\nmodel     forged", **{EVIL: 1})
    other = trace("other")
    shown = f"{tmp}/x{EVIL.replace('/', '')}.kvt"
    shutil.copy(t, shown)
    out = fine("kv-trace", "info", t)
    check("\\x1b]0;owned\\x07" in out and "\\u{202e}" in out and len(re.findall("^model", out, re.M)) == 1, "info spells names out", out)
    check(json.loads(fine("kv-trace", "info", "--json", t))["model"] == EVIL, "info --json keeps names")
    for argv in (("info", shown), ("verify", shown), ("verify", "--deep", "--json", shown), ("slice", shown, "cut.kvt", "--layers", "0"), ("recover", shown, "saved.kvt")): fine("kv-trace", *argv)
    rc, out, err = run("kv-trace", "diff", t, other)
    check(rc == 0 and quiet(out + err) and "forged" not in out.split("metadata")[0], "diff spells names out", out)
    refused("no", "kv-trace", "cat", shown, "--stream", "map_window")
    refused("unknown", "kv-trace", EVIL)
    out = terminal("kv-trace", "cat", t, "--stream", "text")
    if out is not None: check(quiet(out) and "\\x1b[2J" in out, "cat --stream text on a terminal", out)
    check("\x1b[2J" in run("kv-trace", "cat", t, "--stream", "text")[1], "cat --stream text into a file is the text")
    fine("kv-sim", "run", shown, other, "-p", "snapkv,oracle,streaming", "-b", "10%,20%", "--db", "evil.db", "--gap", "--detail", "head")
    fine("kv-sim", "keep", shown, "-p", "snapkv", "-b", "10%", "-o", "keep.npy")
    out = terminal("kv-sim", "run", shown, "-p", "h2o", "-b", "10%", "--db", "evil.db")
    if out is not None: check(quiet(re.sub("\r[^\r]*\x1b\\[K", "", out)), "kv-sim run on a terminal", out)
    for c in (["summary"], ["curve", "--json"], ["layers"], ["gap"], ["heads", "snapkv", "streaming"], ["compare", "snapkv", "streaming"], ["recommend", "--margin", "0.1"]):
        fine("kv-analyze", *c, "--db", "evil.db", "--model", EVIL)
    refused("pilot", "kv-analyze", "power", "snapkv", "streaming", "--db", "evil.db", "--model", EVIL)
    fine("kv-analyze", "text", shown, "-p", "snapkv,streaming", "-b", "10%")
    refused("no", "kv-analyze", "summary", "--db", "evil.db", "--category", EVIL + "x")
    refused("no", "kv-analyze", "summary", "--db", "evil.db", "-p", EVIL)
    m = f"{tmp}/{EVIL.replace('/', '')}"
    shutil.copytree(model("named"), m)
    fine("kv-capture", "info", "-m", m), fine("kv-capture", "info", "--json", "-m", m)
    fine("kv-capture", "run", "-m", m, "--tokens", write("t.json", b"[1,2,3]"), "-o", f"{m}.kvt")
    fine("kv-capture", "tokenize", "-m", LLAMA, "--text", "a" + EVIL)
    prompts = write("id.jsonl", json.dumps({"id": "a\u202eb\x9bc", "text": "hello there", "category": EVIL}).encode())
    for more in (["--dry-run"], []): fine("kv-capture", "run", "-m", LLAMA, "--prompts", prompts, "-o", "batch", *more)
    return other

MARK = "<script>alert(1)</script>"
def pages(other):
    """Everything a database can name, as markup, as SQL, as commands of gnuplot."""
    for what, text in (("html", f"\"'><img src=x onerror=alert(1)>{MARK}&lt;"), ("sql", "x'); DROP TABLE run; --\"; DROP VIEW v_run; --"),
                       ("gnuplot", "`touch pwned`\"; system(\"touch pwned\"); $(touch pwned) {/=99 x} \\'@x %s %n")):
        t = trace("t_" + what, model=text, prompt_id=text, category=text)
        db = f"{tmp}/{what}.db"
        fine("kv-sim", "run", t, "-p", "snapkv,streaming,oracle", "-b", "10%,20%", "--db", db, "--detail", "head")
        h = sqlite3.connect(db)
        h.execute("UPDATE run SET policy = ? || policy, spec = ? || spec, verified = ?, granularity = ?, protect = ? WHERE policy = 'snapkv'", (text,) * 5)
        h.execute("UPDATE metric_name SET unit = ? WHERE name = 'recall'", (text,))
        h.commit()
        before = h.execute("SELECT count(*) FROM v_run").fetchone()
        h.close()
        for c in ("summary", "curve", "layers", "export", "heads"): fine("kv-analyze", c, "--db", db)
        csv = fine("kv-analyze", "summary", "--db", db, "--category", text, "-p", text + "snapkv", "--csv")
        check(len(csv.splitlines()) > 1, f"{what}: a name can be selected by itself", csv)
        refused("no", "kv-analyze", "summary", "--db", db, "--category", "' OR '1'='1")
        fine("kv-analyze", "merge", db, db, "-o", f"{what}-merged.db")
        for d in (db, f"{tmp}/{what}-merged.db"):
            h = sqlite3.connect(d)
            check(h.execute("SELECT count(*) FROM v_run").fetchone() == before, f"{what}: {d} still has its runs")
            h.close()
        pageful = []
        if shutil.which("gnuplot"):
            fine("kv-analyze", "plot", "-o", f"{what}-figures", "--db", db)
            check(os.path.exists(f"{tmp}/{what}-figures/curves.svg"), f"{what}: figures are drawn")
            pageful += [open(f"{tmp}/{what}-figures/{f}").read() for f in os.listdir(f"{tmp}/{what}-figures") if f.endswith(".svg")]
        fine("kv-analyze", "report", t, "-o", f"{what}.html", "--db", db)
        fine("kv-analyze", "text", t, "-p", "snapkv,streaming", "-b", "10%", "--html", f"{what}-text.html")
        pageful += [open(f"{tmp}/{f}").read() for f in (f"{what}.html", f"{what}-text.html")]
        for p in pageful:
            check(MARK not in p and "<img src=x" not in p and quiet(p), f"{what}: markup stays text", OBEYED.findall(p)[:3])
        # inside the page's own data a word must not end the script
        check(all(len(re.findall("<script", p)) == len(re.findall("</script", p)) for p in pageful), f"{what}: scripts end where they should")
        check(not os.path.exists(f"{tmp}/pwned"), f"{what}: nothing was run")

def schemas(other):
    """Databases whose views and triggers are somebody else's."""
    fine("kv-sim", "run", other, "-p", "snapkv,streaming", "-b", "10%", "--db", "plain.db")
    for what, policy, word in (("memory", "hex(zeroblob(200000000))", "too big"), ("loads", "load_extension('./evil.so')", "cannot"), ("writes", "writefile('pwned', 'x')", "cannot")):
        shutil.copy(f"{tmp}/plain.db", f"{tmp}/{what}.db")
        h = sqlite3.connect(f"{tmp}/{what}.db")
        view, = h.execute("SELECT sql FROM sqlite_schema WHERE name = 'v_run'").fetchone()
        columns = ", ".join(f"{policy} AS policy" if r[1] == "policy" else r[1] for r in h.execute("PRAGMA table_info(v_run)"))
        h.execute("DROP VIEW v_run"), h.execute(view.replace("v_run", "v_old", 1)), h.execute(f"CREATE VIEW v_run AS SELECT {columns} FROM v_old"), h.close()
        refused(word, "kv-analyze", "summary", "--db", f"{what}.db")
    check(not os.path.exists(f"{tmp}/pwned"), "a view runs nothing")
    shutil.copy(f"{tmp}/plain.db", f"{tmp}/trigger.db")
    h = sqlite3.connect(f"{tmp}/trigger.db")
    h.executescript("CREATE TRIGGER t AFTER INSERT ON run BEGIN DELETE FROM run; END"), h.close()
    fine("kv-analyze", "merge", "trigger.db", "plain.db", "-o", "merged.db")
    h = sqlite3.connect(f"{tmp}/merged.db")
    check(not h.execute("SELECT 1 FROM sqlite_schema WHERE type = 'trigger'").fetchall() and h.execute("SELECT count(*) FROM run").fetchone()[0] >= 2, "merge takes rows, not triggers")
    h.close()

def plugins(other):
    """Code is loaded from a path that was typed, and from nowhere else."""
    src = write("evil.c", b'#include <stdio.h>\n__attribute__((constructor)) static void owned(void) { FILE *f = fopen("pwned", "w"); if (f) fclose(f); }\n')
    if subprocess.run(["cc", "-shared", "-fPIC", "-o", f"{tmp}/evil.so", src]).returncode:
        check(False, "cc builds a shared object")
    refused("'/'", "kv-sim", "policies", "plugin:evil.so", env={"LD_LIBRARY_PATH": tmp})
    refused("unknown policy", "kv-sim", "policies", "evil.so")
    db = f"{tmp}/stored.db"
    fine("kv-sim", "run", other, "-p", "snapkv,streaming,oracle", "-b", "10%", "--db", db)
    h = sqlite3.connect(db)
    h.execute("UPDATE run SET policy = 'plugin.evil', spec = 'plugin.evil:file=./evil.so,sha256=' || hex(zeroblob(32)) WHERE policy = 'snapkv'"), h.commit(), h.close()
    for argv in (("summary",), ("curve",), ("gap",), ("layers",), ("report", other, "-o", "stored.html"), ("merge", db, "-o", "again.db")):
        run("kv-analyze", *argv, *([] if argv[0] == "merge" else ["--db", db]))
    run("kv-sim", "run", other, "-p", "h2o", "-b", "10%", "--db", db)
    check(not os.path.exists(f"{tmp}/pwned"), "what a database names is not loaded")
    run("kv-sim", "policies", "plugin:./evil.so")
    check(os.path.exists(f"{tmp}/pwned"), "(the same object, when its path is typed, is)")

LLAMA = f"{root}/tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf"
tmp = tempfile.mkdtemp(prefix="kv_hostile_")
try:
    bombs()
    links()
    other = names()
    pages(other)
    schemas(other)
    plugins(other)
finally:
    shutil.rmtree(tmp, ignore_errors=True)
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed or not passed else 0)

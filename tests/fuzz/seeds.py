"""First inputs of the fuzzers, small and valid, from the goldens and the programs (tests/fuzz/fuzz.h).

usage: seeds.py BUILD_DIR OUT      OUT/NAME/*: one folder a target
Then build/fuzz/fuzz_NAME -merge=1 tests/fuzz/corpus/NAME OUT/NAME keeps what adds coverage."""
import io, json, os, shutil, sqlite3, struct, subprocess, sys, tempfile, zipfile
import numpy as np
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(here, ".."), os.path.join(here, "../../traces")]
import hf_to_gguf, kvt

build, out = sys.argv[1:3]
tmp = tempfile.mkdtemp()
count = {}

def seed(target, data, kind="seed"):
    os.makedirs(f"{out}/{target}", exist_ok=True)
    count[target] = count.get(target, 0) + 1
    open(f"{out}/{target}/{kind}{count[target]:03d}", "wb").write(data)
    return data

def lie(target, data, *change):
    """The same with a text replaced, or bytes written over at a place: one step beyond what a check allows. These stay in the corpus."""
    for at, new in change:
        assert not isinstance(at, bytes) or at in data, (target, at)
        data = data.replace(at, new, 1) if isinstance(at, bytes) else data[:at] + new + data[at + len(new):]
    seed(target, data, "case")

# ------------------------------------------------------------------------------------------------ models
TINY = "tests/golden/models_extra/tiny"

def shrink(name):
    """A folder of the golden model with 8 tokens of vocabulary."""
    src, to = f"{TINY}/{name}", f"{tmp}/{name}"
    shutil.rmtree(to, ignore_errors=True)
    os.mkdir(to)
    c = json.load(open(f"{src}/config.json"))
    vocab = c["vocab_size"]
    c["vocab_size"] = 8
    head, data = {}, b""
    for k, (kind, a) in hf_to_gguf.read_folder(src).items():
        if a.ndim == 2 and a.shape[0] == vocab and any(w in k for w in ("embed", "lm_head", "wte")): a = a[:8]
        head[k] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [len(data), len(data) + a.nbytes]}
        data += a.tobytes()
    text = json.dumps(head).encode()
    json.dump(c, open(f"{to}/config.json", "w"))
    open(f"{to}/model.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data)
    return to, list(head)

class Vocabulary(hf_to_gguf.Writer):
    """Adds a vocabulary of 8 tokens to what the converter writes."""
    kind, pre = "gpt2", "gpt-2"
    def array(self, key, code, items): self.keys.append(self.string(key) + struct.pack("<IIQ", 9, code, len(items)) + b"".join(items))
    def save(self, path, keys, tensors):
        self.keys = list(keys)
        spm = self.kind == "llama"
        tokens = ["<unk>", "<s>", "</s>", "<0x41>", "\u2581", "a", "b", "ab"] if spm else ["a", "b", "ab", "\u0120", "\u0120a", "<s>", "</s>", "1"]
        self.put("tokenizer.ggml.model", "str", self.kind)
        if not spm: self.put("tokenizer.ggml.pre", "str", self.pre)
        self.array("tokenizer.ggml.tokens", 8, [self.string(t) for t in tokens])
        self.array("tokenizer.ggml.token_type", 5, [struct.pack("<i", t) for t in ([2, 3, 3, 6, 1, 1, 1, 1] if spm else [1, 1, 1, 1, 1, 3, 3, 1])])
        if spm: self.array("tokenizer.ggml.scores", 6, [struct.pack("<f", -i) for i in range(8)])
        else: self.array("tokenizer.ggml.merges", 8, [self.string("a b"), self.string("\u0120 a")])
        self.put("tokenizer.ggml.bos_token_id", "u32", 1); self.put("tokenizer.ggml.add_bos_token", "bool", 1)
        self.put("tokenizer.chat_template", "str", "{{ '<|im_start|>' }}")
        super().save(path, self.keys, tensors)

plain = hf_to_gguf.Writer
for i, name in enumerate(sorted(os.listdir(TINY))):
    folder, tensors = shrink(name)
    config, weights = (open(f"{folder}/{f}", "rb").read() for f in ("config.json", "model.safetensors"))
    seed("safetensors", config + b"\0\0" + weights)
    if i < 2:
        index = json.dumps({"weight_map": {t: "model-00001-of-00001.safetensors" for t in tensors}}).encode()
        seed("safetensors", config + b"\0" + index + b"\0" + weights)
    for kind, pre in [(None, None), ("gpt2", "llama-bpe"), ("llama", "")][:3 if i < 2 else 1]:
        hf_to_gguf.Writer = Vocabulary if kind else plain
        Vocabulary.kind, Vocabulary.pre = kind, pre
        hf_to_gguf.convert(folder, f"{tmp}/m.gguf")
        seed("gguf", open(f"{tmp}/m.gguf", "rb").read())
for f in ("array_nested_deep", "block_count_2"):
    data = open(f"tests/golden/models/malformed/gguf/{f}.gguf", "rb").read()
    if len(data) < 1 << 16: seed("gguf", data)

u32, u64 = lambda v: struct.pack("<I", v), lambda v: struct.pack("<Q", v)
folder, tensors = shrink("granite")
config, weights = (open(f"{folder}/{f}", "rb").read() for f in ("config.json", "model.safetensors"))
g = config + b"\0\0" + weights
alone = json.dumps({"a": {"dtype": "BF16", "shape": [8, 24], "data_offsets": [0, 384]}}).encode()
small = config + b"\0\0" + u64(len(alone) + 40) + alone + b" " * 40 + bytes(384) # room: the lies are longer
for old, new in ((b"[8, 24]", b"[8, 24, 1, 1, 1, 1]"), (b"[8, 24]", b"[4611686018427387904, 8]"), (b"[8, 24]", b"[-1, 8]"), (b"[0, 384]", b"[0, 99999999]"), (b"[0, 384]", b"[5, 4]"), (b"[0, 384]", b"[0, 385]")):
    lie("safetensors", small, (old, new), (b"}" + b" " * 40, b"}" + b" " * (40 - len(new) + len(old))))
for v in (1 << 63, len(alone) + 41 + 384, 0): lie("safetensors", small, (len(config) + 2, u64(v)))
for change in ((b'"vocab_size": 8', b'"vocab_size": 9'), (b'"num_hidden_layers": 2', b'"num_hidden_layers": 1000000'), (b'"num_attention_heads"', b'"num_attention_heads": 0, "x"'), (b'"hidden_size"', b'"hidden_size": 4294967296, "x"')):
    lie("safetensors", g, change)
seed("safetensors", config + b"\0" + json.dumps({"weight_map": {tensors[0]: "../x.safetensors"}}).encode() + b"\0" + weights, "case")
hf_to_gguf.Writer = Vocabulary
Vocabulary.kind, Vocabulary.pre = "gpt2", "gpt-2"
hf_to_gguf.convert(folder, f"{tmp}/m.gguf")
g = open(f"{tmp}/m.gguf", "rb").read()
g = g[:g.rindex(b"blk.") + 200]              # the lies are in front of the tensors' data
key = g.index(b"tokenizer.ggml.tokens") + 21 # type, element type, count, first string
name = g.index(b"token_embd.weight") + 17    # dimensions, sizes, type, offset
for change in [(8, u64(1 << 63))], [(16, u64(1 << 40))], [(24, u64(1 << 63))], [(24, u64(len(g)))], [(key, u32(99))], [(key + 4, u32(9))], [(key + 8, u64(1 << 62))], [(key + 8, u64(len(g)))], \
        [(key + 16, u64(len(g)))], [(name, u32(5))], [(name, u32(0))], [(name + 4, u64(1 << 63))], [(name + 4, u64(1 << 32)), (name + 12, u64(1 << 32))], [(name + 20, u32(99))], [(name + 24, u64(1 << 63))], \
        [(name + 12, u64(9))]: lie("gguf", g, *change)

TEXT = "It's 12345 caf\u00e9 \u4f60\u597d <|im_start|> x".encode()
for name in sorted(os.listdir("tests/golden/tokenizers")):
    path = f"tests/golden/tokenizers/{name}/tokenizer.json"
    if not os.path.exists(path): continue
    t = json.load(open(path))
    keep = {k: v for k, v in t["model"]["vocab"].items() if v < 300}
    t["model"]["vocab"] = keep
    pair = lambda m: m.split(" ") if isinstance(m, str) else m
    t["model"]["merges"] = [m for m in t["model"]["merges"] if all(x in keep for x in pair(m)) and "".join(pair(m)) in keep]
    t["added_tokens"] = [a for a in t["added_tokens"] if a["id"] < 300 or a["id"] > 2000][:6]
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "{{ '<|im_start|>' }} You are a helpful"}
    seed("tokenizer", json.dumps(t, ensure_ascii=False).encode() + b"\0" + json.dumps(config).encode() + b"\0" + TEXT)

    if name == "gpt2":
        g = seed("tokenizer", json.dumps(t).encode() + b"\0\0" + TEXT)
        first = json.dumps(list(keep)[0]).encode() + b": "
        for v in (b"300", b"-1", b"4294967296", b"1e3"): lie("tokenizer", g, (first, first + v + b', "zz": '))
        for old, new in ((b'"merges": [', b'"merges": [["zz", "a"], '), (b'"added_tokens": [', b'"added_tokens": [{"id": 299, "content": "a"}, '), (b'"added_tokens": [', b'"added_tokens": [{"id": -1, "content": "q"}, ')): lie("tokenizer", g, (old, new))

# ------------------------------------------------------------------------------------------------ traces
def sim(*args): subprocess.run([f"{build}/kv-sim", *args], check=True, capture_output=True)
def tr(*args): subprocess.run([f"{build}/kv-trace", *args], check=True, capture_output=True)

def chunks(path):
    """A trace as the target `chunks` takes it."""
    t = kvt.Trace(path)
    out = struct.pack("<I", len(json.dumps(t.info))) + json.dumps(t.info).encode()
    for c in t.chunks:
        if c["name"] == "meta": continue
        body, raw, at = t._at(c["offset"] + 88, 8 * c["frames"]), b"", c["offset"] + 96 + 8 * c["frames"]
        for stored, size in struct.iter_unpack("<II", body):
            raw += kvt._decompress(t._at(at, stored), size)
            at += stored
        out += kvt.RECORD.pack(*(c[f] for f in kvt.FIELDS)) + struct.pack("<I", len(raw)) + raw
    return out

SHAPES = [("1", "2", "1", "4", "24", "16"), ("2", "2", "2", "2", "9", "9"), ("1", "4", "2", "8", "48", "40")]
for layers, q, kv, d, n, prompt in SHAPES:
    tr("synth", "--layers", layers, "--q-heads", q, "--kv-heads", kv, "--head-dim", d, "--tokens", n, "--prompt-tokens", prompt, "-o", f"{tmp}/s.kvt")
    seed("trace", open(f"{tmp}/s.kvt", "rb").read())
    seed("chunks", chunks(f"{tmp}/s.kvt"))
seed("trace", open("tests/golden/v1.kvt", "rb").read())
seed("chunks", chunks("tests/golden/v1.kvt"))
info = kvt.new_info(1, 2, 1, 4, 12, "mine", "f16", prompt_tokens=8, evidence=[[0, 3]], question=[4, 6], post_norm_eps=1e-5, segments=[{"kind": "a", "start": 0, "end": 4}])
r = np.random.default_rng(1)
with kvt.Writer(f"{tmp}/w.kvt", info, {"host": "x"}) as w:
    w.put("tokens", np.arange(12)); w.put("offsets", np.arange(13)); w.put("text", b"hello, world"); w.put("nll", np.ones(11, "f4"))
    for s, heads in (("q", 2), ("k", 1), ("v", 1)): w.put(s, r.standard_normal((heads, 12, 4)))
    for s in ("lse", "colsum"): w.put(s, np.ones((2, 12 if s == "lse" else 8, 1), "f4"))
    w.put("rowstat", np.ones((2, 12, 4), "f4")); w.put("xnorm", np.ones(12, "f4")); w.put("map", np.tril(np.ones((2, 12, 12), "f2")))
    w.put("wo", r.standard_normal((1, 8, 8))); w.put("post_norm", np.ones((1, 8, 2), "f4"))
seed("trace", open(f"{tmp}/w.kvt", "rb").read())
seed("chunks", chunks(f"{tmp}/w.kvt"))

g = chunks(f"{tmp}/w.kvt")
k = 4 + struct.unpack("<I", g[:4])[0]
for n in range(14): # every chunk with one field of its record beyond what the metadata allows
    for field, v in (("layer", struct.pack("<H", 1)), ("head_first", struct.pack("<H", 2)), ("head_count", struct.pack("<H", 3)), ("token_first", u64(1)), ("token_count", u32(99)), ("width", u32(99))):
        at = k + {"layer": 10, "head_first": 12, "head_count": 14, "token_first": 16, "token_count": 24, "width": 32}[field]
        if (n + len(field)) % 4 == 0: lie("chunks", g, (at, v), (k + 48, bytes(8)), (k + 36, bytes(4)))
    k += 68 + struct.unpack("<I", g[k + 64:k + 68])[0]
    if k + 68 > len(g): break
for old, new in ((b'"tokens": 12', b'"tokens": 0'), (b'"tokens": 12', b'"tokens": 134217729'), (b'"prompt_tokens": 8', b'"prompt_tokens": 13'), (b'"layers": [0]', b'"layers": [1]'), (b'"head_dim": 4', b'"head_dim": 4096'), (b'"q_heads": 2', b'"q_heads": 3')):
    lie("chunks", u32(struct.unpack("<I", g[:4])[0] + len(new) - len(old)) + g[4:], (old, new))
g = open(f"{tmp}/w.kvt", "rb").read()
index = g.rindex(b"KVTINDX1") - 8
for at, v in ((index + 16, u32(71)), (index + 16, u32(144)), (index + 20, u32(99)), (index + 20, u32(0)), (len(g) - 64 + 16, u64(1 << 63)), (len(g) - 64 + 24, u64(8)), (len(g) - 64 + 32, u64(1 << 40))): lie("trace", g, (at, v))

# ------------------------------------------------------------------------------------------------ arrays, texts
def npy(a, version=(1, 0)):
    f = io.BytesIO()
    np.lib.format.write_array(f, a, version)
    return f.getvalue()

arrays = [np.zeros((2, 3, 4), t) for t in ("<f4", "<f2", "<f8", "u1", "<i4", "<u8", "?")] + [np.zeros(0, "f4"), np.array(1.5, "<f4")]
for a in arrays: seed("npy", b"\0" + npy(a))
seed("npy", b"\0" + npy(arrays[0], (2, 0)))
for save in (np.savez, np.savez_compressed):
    f = io.BytesIO()
    save(f, q=arrays[0], k=arrays[1])
    seed("npy", b"\1q" + f.getvalue()); seed("npy", b"\0" + f.getvalue())
head = json.dumps({"q": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}}).encode()
seed("npy", b"\1q" + struct.pack("<Q", len(head)) + head + bytes(8))

def shaped(shape): return b"\0" + struct.pack("<6sBBH", b"\x93NUMPY", 1, 0, 118) + f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}".ljust(117).encode() + b"\n"
for shape in ("1," * 7, "1," * 20, "4294967296,4294967296,0", "18446744073709551615,", "4611686018427387904,4", "-1,", "3"): seed("npy", shaped(shape) + bytes(4), "case")
g = seed("npy", b"\0" + npy(arrays[1]))
lie("npy", g, (9, struct.pack("<H", 65535))), lie("npy", g, (7, b"\2"))
f = io.BytesIO()
np.savez_compressed(f, q=arrays[0])
g, end = b"\0" + f.getvalue(), f.getvalue().rindex(b"PK\1\2") + 1
for at, v in ((end + 20, u32(1 << 31)), (end + 24, u32(1 << 31)), (end + 24, u32(1)), (end + 28, struct.pack("<H", 65535)), (end + 42, u32(1 << 31)), (len(g) - 6, u32(1 << 31)), (len(g) - 10, u32(1 << 31))): lie("npy", g, (at, v))
for old, new in ((b"[2, 2]", b"[2, 2, 1, 1, 1, 1, 1, 1]"), (b"[0, 8]", b"[0, 9]"), (b"[0, 8]", b"[-1, 7]")): lie("npy", b"\1q" + struct.pack("<Q", len(head) + len(new) - len(old)) + head + bytes(8), (old, new))

seed("prompts", b"".join(open("capture/prompts/samples.jsonl", "rb").readlines()[:2]))
full = {"id": "a-1", "category": "c", "text": " the needle is 7. What is it? 7", "prompt_end_byte": 29, "context_end_byte": 17, "evidence": [[1, 17]],
        "question_span": [18, 29], "sha256": "0" * 64, "bytes": 31, "question": "What?", "answer": "7"}
seed("prompts", json.dumps(full).encode() + b"\n" + json.dumps({"id": "b", "text": "x"}).encode() + b"\n\n")
del full["sha256"]
g = seed("prompts", json.dumps(full).encode())
for old, new in ((b"[[1, 17]]", b"[[1, 32]]"), (b"[[1, 17]]", b"[[2, 1]]"), (b"[18, 29]", b"[18, 99]"), (b": 29", b": 99"), (b": 17,", b": 30,"), (b'"a-1"', b'"../a"')): lie("prompts", g, (old, new))

names = [l.split()[0] for l in subprocess.run([f"{build}/kv-sim", "policies"], capture_output=True, text=True).stdout.splitlines() if l[:1].isalpha() or l[:2] == "  "]
known = [n for n in names if subprocess.run([f"{build}/kv-sim", "policies", n], capture_output=True).returncode == 0]
for i in range(0, len(known), 6):
    seed("specs", (",".join(known[i:i + 6]) + "\0" + "512,5%,64MiB,ratio=0.9,auto" + "\0" + "recall,layer_error" + "\0" + "1.5GiB").encode())
seed("specs", b"snapkv:window=16|32,kernel=5,h2o,mask:a.npy\0100%\0all\0" + b"18446744073709551616")
seed("specs", b"cake:heads=ada,alpha=0.2,protect_segment=evidence,skip_layers=0+1\0ratio=1\0recall_p10\0" + b"-1e308")
seed("specs", b"mask:a.npy\0" + b"1e9GB,0,1\0delta_nll\0" + b"7")

for policy in (b"cake:skip_layers=1024", b"cake:skip_layers=0+1+99999", b"snapkv:kernel=4294967296", b"snapkv:window=-1", b"h2o:", b":x=1", b"x=1", b"snapkv:window=" + b"1|" * 40): seed("specs", policy + b"\0" + b"101%,ratio=1.5\0x\0" + b"1e400", "case")
size = subprocess.run(["cc", "-x", "c", "-Isim", "-o", f"{tmp}/size", "-"], input=b'#include <stdio.h>\n#include "kvtrace_policy.h"\nint main(void){printf("%zu",sizeof(kv_plugin));}', check=True)
table = struct.pack("<5I", 1, int(subprocess.run([f"{tmp}/size"], capture_output=True).stdout), 3, 32, 1)
seed("plugin", table + b"\0mine\0what it keeps\0a paper\0power=1,floor=0.2\0power\0" + b"3")
seed("plugin", table + b"\x08mine\0what it keeps\0a paper\0\0window\0" + b"3")
seed("plugin", table + b"\0mine\0a\0b\0x=1\0x\0" + b"22")
for absent in (1, 2, 4, 8, 16): seed("plugin", table + bytes([absent]) + b"mine\0a\0b\0x=1\0x\0" + b"22", "case")
for params in (b"x", b"x=", b"=1", b"x=1,", b"x=1,x=2", b"window=1", b"x=1|2", b"y" * 41 + b"=1"): seed("plugin", table + b"\0mine\0a\0b\0" + params + b"\0x\0" + b"22", "case")
for at in range(5): lie("plugin", table + b"\0mine\0a\0b\0x=1\0x\0" + b"22", (4 * at, u32(1 << 31)))

# ------------------------------------------------------------------------------------------------ results
tr("synth", "--layers", "1", "--q-heads", "2", "--kv-heads", "1", "--head-dim", "4", "--tokens", "60", "--prompt-tokens", "56", "-o", f"{tmp}/r.kvt")
for i, (policy, detail) in enumerate([("snapkv,oracle", "run"), ("recency", "step")]):
    db = f"{tmp}/r{i}.db"
    sim("run", f"{tmp}/r.kvt", "-p", policy, "-b", "20%", "--db", db, "--detail", detail, "--metrics", "recall,layer_error")
    h = sqlite3.connect(db)
    h.execute("PRAGMA page_size = 1024"); h.execute("PRAGMA journal_mode = DELETE"); h.execute("VACUUM"); h.close()
    seed("merge", open(db, "rb").read())
# values that no kv-sim writes
db = f"{tmp}/bad.db"
shutil.copy(f"{tmp}/r0.db", db)
h = sqlite3.connect(db)
h.execute("PRAGMA ignore_check_constraints = ON")
h.execute("UPDATE run SET build = '', wall_s = 9e999, budget_frac = -9e999, detail = -1"), h.execute("UPDATE metric SET value = NULL, layer = -9223372036854775808, n = -1")
h.execute("UPDATE trace SET name = char(0), prompt = '', layers = '+'"), h.execute("UPDATE slots SET slots = -1"), h.commit(), h.execute("VACUUM"), h.close()
seed("merge", open(db, "rb").read(), "case")
shutil.rmtree(tmp)
for t in sorted(count):
    sizes = [os.path.getsize(f"{out}/{t}/{f}") for f in os.listdir(f"{out}/{t}")]
    print(f"{t:12s} {len(sizes):3d} inputs {sum(sizes):8d} bytes, largest {max(sizes)}")

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

def seed(target, data):
    os.makedirs(f"{out}/{target}", exist_ok=True)
    count[target] = count.get(target, 0) + 1
    open(f"{out}/{target}/seed{count[target]:03d}", "wb").write(data)

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

seed("prompts", b"".join(open("capture/prompts/samples.jsonl", "rb").readlines()[:2]))
full = {"id": "a-1", "category": "c", "text": " the needle is 7. What is it? 7", "prompt_end_byte": 29, "context_end_byte": 17, "evidence": [[1, 17]],
        "question_span": [18, 29], "sha256": "0" * 64, "bytes": 31, "question": "What?", "answer": "7"}
seed("prompts", json.dumps(full).encode() + b"\n" + json.dumps({"id": "b", "text": "x"}).encode() + b"\n\n")
del full["sha256"]
seed("prompts", json.dumps(full).encode())

names = [l.split()[0] for l in subprocess.run([f"{build}/kv-sim", "policies"], capture_output=True, text=True).stdout.splitlines() if l[:1].isalpha() or l[:2] == "  "]
known = [n for n in names if subprocess.run([f"{build}/kv-sim", "policies", n], capture_output=True).returncode == 0]
for i in range(0, len(known), 6):
    seed("specs", (",".join(known[i:i + 6]) + "\0" + "512,5%,64MiB,ratio=0.9,auto" + "\0" + "recall,layer_error" + "\0" + "1.5GiB").encode())
seed("specs", b"snapkv:window=16|32,kernel=5,h2o,mask:a.npy\0100%\0all\0" + b"18446744073709551616")
seed("specs", b"cake:heads=ada,alpha=0.2,protect_segment=evidence,skip_layers=0+1\0ratio=1\0recall_p10\0" + b"-1e308")
seed("specs", b"mask:a.npy\0" + b"1e9GB,0,1\0delta_nll\0" + b"7")

table = struct.pack("<5I", 1, 0, 3, 32, 1)
size = subprocess.run(["cc", "-x", "c", "-Isim", "-o", f"{tmp}/size", "-"], input=b'#include <stdio.h>\n#include "kvtrace_policy.h"\nint main(void){printf("%zu",sizeof(kv_plugin));}', check=True)
table = struct.pack("<5I", 1, int(subprocess.run([f"{tmp}/size"], capture_output=True).stdout), 3, 32, 1)
seed("plugin", table + b"\0mine\0what it keeps\0a paper\0power=1,floor=0.2\0power\0" + b"3")
seed("plugin", table + b"\x08mine\0what it keeps\0a paper\0\0window\0" + b"3")
seed("plugin", table + b"\0mine\0a\0b\0x=1\0x\0" + b"22")

# ------------------------------------------------------------------------------------------------ results
tr("synth", "--layers", "1", "--q-heads", "2", "--kv-heads", "1", "--head-dim", "4", "--tokens", "60", "--prompt-tokens", "56", "-o", f"{tmp}/r.kvt")
for i, (policy, detail) in enumerate([("snapkv,oracle", "run"), ("recency", "step")]):
    db = f"{tmp}/r{i}.db"
    sim("run", f"{tmp}/r.kvt", "-p", policy, "-b", "20%", "--db", db, "--detail", detail, "--metrics", "recall,layer_error")
    h = sqlite3.connect(db)
    h.execute("PRAGMA page_size = 1024"); h.execute("PRAGMA journal_mode = DELETE"); h.execute("VACUUM"); h.close()
    seed("merge", open(db, "rb").read())
shutil.rmtree(tmp)
for t in sorted(count):
    sizes = [os.path.getsize(f"{out}/{t}/{f}") for f in os.listdir(f"{out}/{t}")]
    print(f"{t:12s} {len(sizes):3d} inputs {sum(sizes):8d} bytes, largest {max(sizes)}")

"""Writes a GGUF of the shape of an 8B model, LAYERS of its layers, with Q4_K blocks at random, around the vocabulary and the other
keys of a small one. For timing loads.   usage: big_gguf.py SMALL.gguf OUT.gguf LAYERS"""
import struct, sys
import numpy as np

b = open(sys.argv[1], "rb").read()
layers = int(sys.argv[3])
WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
n_tensor, n_key = struct.unpack_from("<QQ", b, 8)
at = 24
def string(p): n = struct.unpack_from("<Q", b, p)[0]; return b[p + 8:p + 8 + n], p + 8 + n
def skip(kind, p):
    if kind == 8: return string(p)[1]
    if kind != 9: return p + WIDTH[kind]
    inner, n = struct.unpack_from("<IQ", b, p)
    p += 12
    if inner != 8: return p + n * WIDTH[inner]
    for _ in range(n): p = string(p)[1]
    return p
new = {b"llama.embedding_length": 4096, b"llama.block_count": layers, b"llama.feed_forward_length": 14336, b"llama.attention.head_count": 32,
       b"llama.attention.head_count_kv": 8, b"llama.rope.dimension_count": 128, b"llama.attention.key_length": 128, b"llama.attention.value_length": 128}
keys = []
for _ in range(n_key):
    start = at
    name, at = string(at)
    kind = struct.unpack_from("<I", b, at)[0]
    end = skip(kind, at + 4)
    keys.append(b[start:at + 4] + struct.pack("<I", new[name]) if name in new and kind == 4 else b[start:end])
    at = end
vocab = None
for _ in range(n_tensor):
    name, at = string(at)
    nd = struct.unpack_from("<I", b, at)[0]
    ne = struct.unpack_from(f"<{nd}Q", b, at + 4)
    if name == b"token_embd.weight": vocab = ne[1]
    at += 4 + 8 * nd + 12
tensors = [("token_embd.weight", (4096, vocab)), ("output_norm.weight", (4096,)), ("output.weight", (4096, vocab))]
for l in range(layers):
    tensors += [(f"blk.{l}.{n}.weight", s) for n, s in (("attn_norm", (4096,)), ("ffn_norm", (4096,)), ("attn_q", (4096, 4096)), ("attn_k", (4096, 1024)),
                ("attn_v", (4096, 1024)), ("attn_output", (4096, 4096)), ("ffn_gate", (4096, 14336)), ("ffn_up", (4096, 14336)), ("ffn_down", (14336, 4096)))]
r = np.random.default_rng(1)
block = r.integers(0, 256, (65536, 144), dtype=np.uint8)
block[:, 0:4] = np.frombuffer(np.float16([2e-4, 1e-3]).tobytes(), np.uint8)
block = block.tobytes()
head, offset = [], 0
def size(s): return s[0] * 4 if len(s) == 1 else s[0] * s[1] // 256 * 144
for name, s in tensors:
    head.append(struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(s)}QIQ", len(s), *s, 0 if len(s) == 1 else 12, offset))
    offset += (size(s) + 31) // 32 * 32
with open(sys.argv[2], "wb") as f:
    f.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(head))
    f.write(b"\0" * (-f.tell() % 32))
    for name, s in tensors:
        n = size(s)
        if len(s) == 1: f.write(np.ones(s[0], "<f4").tobytes())
        for k in range(0, n if len(s) == 2 else 0, len(block)): f.write(block[:min(len(block), n - k)])
        f.write(b"\0" * (-n % 32))

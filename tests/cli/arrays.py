"""The array files of trace-import.sh in the current folder: q k v wo map, and a spoilt relative for each mistake."""
import json
import struct
import zipfile

import numpy as np

r = np.random.default_rng(0)
q = r.standard_normal((2, 4, 40, 8)).astype("<f4")
k, v = q[:, :2] + np.float32(1), q[:, 2:] * np.float32(2)
wo = r.standard_normal((2, 32, 32)).astype("<f4")
attention = np.tril(r.random((2, 4, 40, 40)))
attention = (attention / attention.sum(-1, keepdims=True)).astype("<f4")
for name, a in dict(q=q, k=k, v=v, wo=wo, map=attention).items():
    np.save(name, a)
    np.save(name + "_half", a.astype("<f2"))


def spoilt(a, value):
    a = a.copy()
    a[1, 1, 3, 4] = value
    return a


np.save("k_short", k[:, :, :30])
np.save("k_three", np.concatenate([k, k[:, :1]], 1))
np.save("v_wide", np.concatenate([v, v], 3))
np.save("q_three_axes", q[0])
np.save("q_empty", q[:, :, :0])
np.save("q_int", q.astype("<i4"))
np.save("q_nan", spoilt(q, np.nan))
np.save("q_inf", spoilt(q, np.inf))
np.save("v_nan", spoilt(v, np.nan))
np.save("map_nan", spoilt(attention, np.nan))
np.save("q_big", q.astype(">f4"))
np.save("q_fortran", np.asfortranarray(q))
np.save("q_complex", q.astype("<c8"))
np.save("q_object", np.array([{"a": 1}], dtype=object), allow_pickle=True)
np.save("wo_narrow", wo[:, :, :30])
data = open("q.npy", "rb").read()
open("q_cut.npy", "wb").write(data[:900])
open("q_text.npy", "w").write("these are no numbers\n" * 20)
# a header that promises 128 TB
lie = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 4, 40, 8), }".ljust(117) + b"\n"
open("q_liar.npy", "wb").write(data[:10] + lie + data[128:])

# the same arrays in the other containers
np.savez("all.npz", q=q, k=k, v=v, map=attention)
np.savez_compressed("packed.npz", q=q, k=k, v=v)
np.savez("one.npz", k)
np.save("with:colon.npy", v)


def bf16(a):
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def safetensors(name, tensors, change=lambda head: head):
    head, data = {"__metadata__": {"by": "a test"}}, b""
    for key, (kind, a) in tensors.items():
        head[key] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [len(data), len(data) + a.nbytes]}
        data += a.tobytes()
    text = change(json.dumps(head)).encode()
    open(name, "wb").write(struct.pack("<Q", len(text)) + text + data)


three = {"layers.q": ("F32", q), "layers.k": ("F32", k), "layers.v": ("F32", v)}
safetensors("all.safetensors", three)
safetensors("bf16.safetensors", {n: ("BF16", bf16(a)) for n, a in (("q", q), ("k", k), ("v", v))})
np.save("q_bf16", (bf16(q).astype(np.uint32) << 16).view("<f4"))
safetensors("f8.safetensors", {"q": ("F8_E4M3", np.zeros((2, 4, 40, 8), np.uint8))})
safetensors("twice.safetensors", three, lambda h: h.replace("layers.k", "layers.q"))
safetensors("beyond.safetensors", three, lambda h: h.replace(str(q.nbytes), str(1 << 40)))
safetensors("negative.safetensors", three, lambda h: h.replace("[2, 4", "[-2, 4"))
safetensors("wrap.safetensors", three, lambda h: h.replace("[2, 4, 40, 8]", "[4611686018427387904, 16, 40, 8]"))
data = open("all.safetensors", "rb").read()
open("long.safetensors", "wb").write(struct.pack("<Q", 1 << 60) + data[8:])
data = open("all.npz", "rb").read()
open("cut.npz", "wb").write(data[:-30])
at = data.index(q.tobytes()[:64]) + 40
open("flipped.npz", "wb").write(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
data = open("packed.npz", "rb").read()
open("flipped_packed.npz", "wb").write(data[:900] + bytes([data[900] ^ 1]) + data[901:])
end = data.rindex(b"PK\1\2")
first = data.index(b"PK\1\2")
liar = bytearray(data)
liar[first + 24:first + 28] = struct.pack("<I", 0xFFFFFF00)  # claims 4 GB
open("bomb.npz", "wb").write(liar)
with zipfile.ZipFile("text.npz", "w") as z:
    z.writestr("q.npy", "these are no numbers")
with zipfile.ZipFile("bzip2.npz", "w", zipfile.ZIP_BZIP2) as z:
    z.write("q.npy")
with zipfile.ZipFile("empty.npz", "w"):
    pass

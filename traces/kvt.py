"""Reader and writer for .kvt traces, written from FORMAT.md alone. Needs NumPy and zstandard (or Python >= 3.14).

    import kvt
    t = kvt.Trace("a.kvt")
    t.info["tokens"], t.streams()            # metadata, {"q": [0, 1, ...layers], ...}
    q = t.read("q", layer=3, head=1)         # float32 [tokens, head_dim]
    ids = t.read("tokens")                   # uint32 [tokens]
    text = t.read("text")                    # bytes

    info = kvt.new_info(layers=2, q_heads=8, kv_heads=2, head_dim=64, tokens=100, model="mine", dtype="f16")
    with kvt.Writer("b.kvt", info) as w:     # the file appears whole when the block ends, or not at all
        w.put("tokens", ids)
        w.put("q", q, layer=0)               # [heads, rows, width] or [rows, width]; row=K: rows K, K+1, ...
        w.put("text", b"the prompt")

As a program: python3 kvt.py a.kvt [STREAM [LAYER [HEAD]]]
"""
import hashlib
import json
import os
import struct
import sys
import zlib

import numpy as np

# _compress[0]: level 1; [1]: for bytes in which nothing repeats (FORMAT.md, Payload). Both with a checksum.
try:
    import zstandard
    _decompress = lambda data, size: zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    _level = zstandard.ZstdCompressionParameters.from_level
    _compress = [zstandard.ZstdCompressor(compression_params=_level(1, write_checksum=1, **o)).compress
                 for o in ({}, {"min_match": 7, "hash_log": 6})]
except ImportError:
    from compression import zstd as _zstd
    _decompress = lambda data, size: _zstd.decompress(data)
    _o = _zstd.CompressionParameter
    _some = {_o.compression_level: 1, _o.checksum_flag: 1}
    _compress = [lambda data, o=o: _zstd.compress(data, options=o) for o in (_some, {**_some, _o.min_match: 7, _o.hash_log: 6})]

STREAMS = {1: "q", 2: "k", 3: "v", 4: "out", 5: "x", 6: "rowstat", 7: "colsum", 9: "map_window", 10: "map", 12: "wo",
           14: "tokens", 15: "logits", 16: "text", 17: "meta", 19: "xnorm", 20: "nll", 21: "colsum_ctx", 22: "offsets",
           23: "provenance", 24: "lse", 25: "post_norm"}
BYTES = {"text", "meta", "provenance"}
WHOLE = BYTES | {"tokens", "logits", "nll", "offsets"}
DTYPES = {0: ("<f4", 4), 1: ("<f2", 2), 2: ("<u2", 2), 3: ("u1", 1), 4: ("<u4", 4), 5: ("<i4", 4)}
RECORD = struct.Struct("<QHHHHQIBBBBIIQQII")
FIELDS = ("seq", "stream", "layer", "head_first", "head_count", "token_first", "token_count", "dtype", "filter",
          "planes", "flags", "width", "frames", "stored", "raw", "crc", "check")
ORDER = ("stream", "layer", "token_first", "head_first", "seq")


BLOCK_ROWS, BLOCK_BYTES, PLANE_MIN, CHECKPOINT = 1024, 64 << 20, 256, 256 << 20
TYPES = {"f32": 0, "f16": 1, "bf16": 2, "u8": 3, "u32": 4, "i32": 5}


class Error(Exception):
    pass


def _body(data, tag):
    """The body of one whole skippable frame without its CRC; checks magic, size, tag and CRC."""
    if len(data) < 20 or struct.unpack_from("<II", data) != (0x184D2A50, len(data) - 8) or data[8:16] != tag:
        raise Error("no %s frame where one should be" % tag.decode())
    if zlib.crc32(data[8:-4]) != struct.unpack_from("<I", data, len(data) - 4)[0]:
        raise Error("bad checksum of %s" % tag.decode())
    return data[8:-4]


class Trace:
    def __init__(self, path):
        self.path, self.f = path, open(path, "rb")
        size = os.fstat(self.f.fileno()).st_size
        if size < 48 + 40 + 64:
            raise Error("too short for a trace")
        head = _body(self._at(0, 48), b"KVTHEAD1")
        major, self.minor, _, incompat, _ = struct.unpack_from("<HHIQQ", head, 8)
        if major != 1 or incompat:
            raise Error("version %d, features %#x: not readable here" % (major, incompat))
        foot = _body(self._at(size - 64, 64), b"KVTFOOT1")
        at, n, count, self.n_token = struct.unpack_from("<QQQQ", foot, 8)
        if foot[40:48] != b"KVTDONE1" or at < 48 or n < 40 or at + n != size - 64:
            raise Error("bad footer")
        index = _body(self._at(at, n), b"KVTINDX1")
        entry_bytes, entries = struct.unpack_from("<II", index, 8)
        if entries != count or entry_bytes < 72 or 24 + entry_bytes * entries + 4 != len(index):
            raise Error("bad index")
        self.chunks = []
        for i in range(entries):
            c = dict(zip(FIELDS, RECORD.unpack_from(index, 24 + i * entry_bytes)))
            c["offset"] = struct.unpack_from("<Q", index, 24 + i * entry_bytes + 64)[0]
            c["name"] = STREAMS.get(c["stream"], "stream%d" % c["stream"])
            if c["offset"] + 96 + 8 * c["frames"] + c["stored"] > at:
                raise Error("a chunk leaves the file")
            self.chunks.append(c)
        self.info = json.loads(self.read("meta"))

    def _at(self, offset, n):
        self.f.seek(offset)
        data = self.f.read(n)
        if len(data) != n:
            raise Error("truncated")
        return data

    def streams(self):
        """Name -> the layers that have it ([0] for streams of the whole trace)."""
        out = {}
        for c in self.chunks:
            out.setdefault(c["name"], set()).add(c["layer"])
        return {k: sorted(v) for k, v in out.items()}

    def _head(self, c, h):
        """One head of a chunk: [token_count, width]."""
        n = c["frames"]
        body = _body(self._at(c["offset"], 96 + 8 * n), b"KVTCHNK1")
        if body[16:80] != RECORD.pack(*(c[f] for f in FIELDS)):
            raise Error("chunk header and index differ")
        table = np.frombuffer(body, "<u4", 2 * n, 80).reshape(n, 2)
        first = (h - c["head_first"]) * c["planes"]
        at = c["offset"] + 96 + 8 * n + int(table[:first, 0].sum())
        planes = []
        for stored, raw in table[first:first + c["planes"]]:
            data = _decompress(self._at(at, int(stored)), int(raw))
            if len(data) != raw:
                raise Error("frame of another size")
            planes.append(np.frombuffer(data, np.uint8))
            at += int(stored)
        kind, size = DTYPES[c["dtype"]]
        data = np.stack(planes, axis=-1).tobytes() if c["filter"] == 1 else planes[0].tobytes()
        a = np.frombuffer(data, kind)
        if c["dtype"] == 2:  # bfloat16: the upper half of a float32
            a = (a.astype(np.uint32) << 16).view(np.float32)
        elif kind == "<f2":
            a = a.astype(np.float32)
        return a.reshape(c["token_count"], c["width"])

    def read(self, stream, layer=0, head=0, rows=None):
        """Rows (default: all that are stored, which must be one run) of one head; bytes for byte streams."""
        if stream in WHOLE:
            layer = head = 0
        cs = [c for c in self.chunks if c["name"] == stream and c["layer"] == layer
              and c["head_first"] <= head < c["head_first"] + c["head_count"]]
        if not cs:
            raise KeyError("no %s for layer %d head %d" % (stream, layer, head))
        if stream in BYTES:
            return self._head(max(cs, key=lambda c: c["seq"]), 0).tobytes()  # the last one counts
        cs.sort(key=lambda c: c["token_first"])
        a, b = rows or (cs[0]["token_first"], cs[-1]["token_first"] + cs[-1]["token_count"])
        parts, at = [], a
        for c in cs:
            end = min(b, c["token_first"] + c["token_count"])
            if c["token_first"] <= at < end:
                parts.append(self._head(c, head)[at - c["token_first"]:end - c["token_first"]])
                at = end
        if at < b:
            raise KeyError("%s layer %d head %d: rows %d:%d are not stored" % (stream, layer, head, at, b))
        out = np.concatenate(parts)
        return out[:, 0] if out.shape[1] == 1 else out

    def content_sha256(self):
        last = max(c["seq"] for c in self.chunks if c["name"] == "meta")
        h = hashlib.sha256()
        for c in sorted(self.chunks, key=lambda c: [c[f] for f in ORDER]):
            if c["name"] == "provenance" or (c["name"] == "meta" and c["seq"] != last):
                continue
            h.update(RECORD.pack(*(dict(c, seq=0, stored=0, crc=0)[f] for f in FIELDS)))
        return h.hexdigest()


def _seal(tag, body):
    """A skippable frame: magic, size, tag, body, CRC."""
    data = tag + body
    return struct.pack("<II", 0x184D2A50, len(data) + 4) + data + struct.pack("<I", zlib.crc32(data))


def _encode(a, dtype):
    """An array as elements of the type; floats are rounded to nearest, ties to even."""
    a = np.asarray(a)
    if dtype == "bf16":
        u = np.ascontiguousarray(a, np.float32).view(np.uint32)
        a = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")
    else:
        wide = a
        with np.errstate(over="ignore"):
            a = np.ascontiguousarray(a, DTYPES[TYPES[dtype]][0])
        if dtype == "f16" and np.isinf(a).any() and not np.isinf(wide).any():
            raise Error("a value is too large for f16: record bf16 or f32")
    return a


def new_info(layers, q_heads, kv_heads, head_dim, tokens, model, dtype, **more):
    """Metadata with every needed key; layers: a count or a list of numbers; `more` replaces and adds keys."""
    numbers = list(range(layers)) if isinstance(layers, int) else list(layers)
    return {"model": model, "arch": "import", "record": "qkv", "dtype": dtype, "layers": numbers, "window": [0] * len(numbers),
            "n_layer_model": max(numbers) + 1, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "hidden": q_heads * head_dim, "tokens": tokens, "prompt_tokens": tokens, "context_tokens": 0, "scale": head_dim ** -0.5,
            "softcap": 0.0, "rope_theta": 0.0, "rope_dim": 0, "rope_mscale": 1.0, "obs_rows": 0, "evidence": [], "question": [0, 0],
            **more}


def wo_sha256(arrays, dtype):
    """The hash that names a W_O side file: arrays is {layer: [rows, width]}."""
    h = hashlib.sha256()
    for layer in sorted(arrays):
        rows, width = arrays[layer].shape
        h.update(struct.pack("<IIII", layer, rows, width, TYPES[dtype]))
        h.update(_encode(arrays[layer], dtype).tobytes())
    return h.hexdigest()


class Writer:
    """Append-only; what was written before a failure stays under PATH.partial, for `kv-trace recover`."""

    def __init__(self, path, info, provenance=None):
        self.path, self.partial, self.info = path, path + ".partial", dict(info)
        self.f, self.at, self.entries = open(self.partial, "wb"), 0, []
        self.ckpt_at, self.ckpt_prev, self.ckpt_from = 0, 0, 0
        self._write(_seal(b"KVTHEAD1", struct.pack("<HHIQQI", 1, 0, 0, 0, 0, 0)))
        self._put_meta()
        if provenance is not None:
            self.put("provenance", json.dumps(provenance).encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.finish()
        else:
            self.f.close()

    def _write(self, data):
        self.f.write(data)
        self.at += len(data)

    def _put_meta(self):
        self.put("meta", json.dumps(self.info, sort_keys=True, separators=(",", ":")).encode())

    def _index(self, tag, entries, previous):
        self._write(_seal(tag, struct.pack("<IIQ", 72, len(entries), previous) + b"".join(entries) + bytes(4)))

    def put(self, stream, a, layer=0, head=0, row=0, dtype=None):
        """Rows row, row+1, ... of a stream. dtype: what to store; default as FORMAT.md says, `dtype` of the metadata where it
        leaves that open."""
        if stream in BYTES:
            a, dtype = np.frombuffer(bytes(a), np.uint8).reshape(1, -1, 1), "u8"
        a = np.asarray(a)
        if a.ndim == 1:
            a = a[None, :, None]
        elif a.ndim == 2:
            a = a[:, :, None] if stream in ("lse", "colsum", "colsum_ctx") else a[None]
        if dtype is None:
            dtype = {"tokens": "u32", "offsets": "u32", "map": "f16", "map_window": "f16"}.get(
                stream, self.info["dtype"] if stream in ("q", "k", "v", "out", "x", "wo") else "f32")
        heads, rows, width = a.shape
        size = DTYPES[TYPES[dtype]][1]
        step = rows if stream in BYTES else max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(1, heads * width * size)))
        for at in range(0, max(rows, 1), max(step, 1)):
            self._chunk(stream, _encode(a[:, at:at + step], dtype), layer, head, row + at, TYPES[dtype])

    def _chunk(self, stream, a, layer, head, row, dtype):
        heads, rows, width = a.shape
        number = {v: k for k, v in STREAMS.items()}[stream]
        size = a.dtype.itemsize
        split = size > 1 and rows * width >= PLANE_MIN
        planes = size if split else 1
        pack = _compress[split and layer > 0 and stream in ("q", "k", "v", "out", "x")]
        data, table, check = [], b"", 0
        for h in range(heads):
            raw = np.frombuffer(a[h].tobytes(), np.uint8)
            for p in range(planes):
                frame = pack((raw[p::size] if split else raw).tobytes())
                check = zlib.crc32(frame[-4:], check)
                table += struct.pack("<II", len(frame), len(raw) // planes)
                data.append(frame)
        data = b"".join(data)
        record = RECORD.pack(len(self.entries), number, layer, head, heads, row, rows, dtype, int(split), planes, 0, width,
                             heads * planes, len(data), heads * rows * width * size, zlib.crc32(data), check)
        if self.at - self.ckpt_at >= CHECKPOINT:
            at = self.at
            self._index(b"KVTCKPT1", self.entries[self.ckpt_from:], self.ckpt_prev)
            self.ckpt_from, self.ckpt_prev, self.ckpt_at = len(self.entries), at, at
        self.entries.append(record + struct.pack("<Q", self.at))
        self._write(_seal(b"KVTCHNK1", struct.pack("<II", 64, 0) + record + table + bytes(4)))
        self._write(data)

    def finish(self):
        """Metadata once more (self.info may have changed), index, footer; then the file gets its name."""
        self._put_meta()
        at = self.at
        self._index(b"KVTINDX1", self.entries, 0)
        self._write(_seal(b"KVTFOOT1", struct.pack("<QQQQ", at, self.at - at, len(self.entries), self.info["tokens"])
                          + b"KVTDONE1" + bytes(4)))
        self.f.flush()
        os.fsync(self.f.fileno())
        self.f.close()
        os.replace(self.partial, self.path)


if __name__ == "__main__":
    t = Trace(sys.argv[1])
    if len(sys.argv) == 2:
        print(json.dumps(t.info, indent=2), t.streams(), t.content_sha256(), sep="\n")
    else:
        print(t.read(sys.argv[2], *map(int, sys.argv[3:5])))

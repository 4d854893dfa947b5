"""Reader for .kvt traces, written from FORMAT.md alone. Needs NumPy and zstandard (or Python >= 3.14).

    import kvt
    t = kvt.Trace("a.kvt")
    t.info["tokens"], t.streams()            # metadata, {"q": [0, 1, ...layers], ...}
    q = t.read("q", layer=3, head=1)         # float32 [tokens, head_dim]
    ids = t.read("tokens")                   # uint32 [tokens]
    text = t.read("text")                    # bytes

As a program: python3 kvt.py a.kvt [STREAM [LAYER [HEAD]]]
"""
import hashlib
import json
import os
import struct
import sys
import zlib

import numpy as np

try:
    import zstandard
    _decompress = lambda data, size: zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
except ImportError:
    from compression import zstd as _zstd
    _decompress = lambda data, size: _zstd.decompress(data)

STREAMS = {1: "q", 2: "k", 3: "v", 4: "out", 5: "x", 6: "rowstat", 7: "colsum", 9: "map_window", 10: "map", 12: "wo",
           14: "tokens", 15: "logits", 16: "text", 17: "meta", 19: "xnorm", 20: "nll", 21: "colsum_ctx", 22: "offsets",
           23: "provenance", 24: "lse"}
BYTES = {"text", "meta", "provenance"}
WHOLE = BYTES | {"tokens", "logits", "nll", "offsets"}
DTYPES = {0: ("<f4", 4), 1: ("<f2", 2), 2: ("<u2", 2), 3: ("u1", 1), 4: ("<u4", 4), 5: ("<i4", 4)}
RECORD = struct.Struct("<QHHHHQIBBBBIIQQII")
FIELDS = ("seq", "stream", "layer", "head_first", "head_count", "token_first", "token_count", "dtype", "filter",
          "planes", "flags", "width", "frames", "stored", "raw", "crc", "check")
ORDER = ("stream", "layer", "token_first", "head_first", "seq")


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


if __name__ == "__main__":
    t = Trace(sys.argv[1])
    if len(sys.argv) == 2:
        print(json.dumps(t.info, indent=2), t.streams(), t.content_sha256(), sep="\n")
    else:
        print(t.read(sys.argv[2], *map(int, sys.argv[3:5])))

"""The .npy files of trace-import.sh in the current folder: q k v wo map, and a spoilt relative for each mistake."""
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

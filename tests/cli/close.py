"""close.py A.db B.db: both databases have the same metric rows, and the values agree to 1e-6, whatever the policies are called.
value_distance divides by the mass that was lost, which may be next to nothing: 1 %."""
import math
import sqlite3
import sys


def rows(path):
    db = sqlite3.connect("file:%s?mode=ro" % path, uri=True)
    sql = "SELECT trace, %s budget, metric, layer, head, step, value FROM v_metric"
    key = "" if "--policy" in sys.argv else "spec,"
    return {r[:-1]: r[-1] for r in db.execute(sql % key)}


def tol(key):
    return 0.01 if "value_distance" in key else 1e-6


a, b = rows(sys.argv[1]), rows(sys.argv[2])
off = [
    (k, a[k], b[k])
    for k in a.keys() & b.keys()
    if a[k] != b[k] and (None in (a[k], b[k]) or not math.isclose(a[k], b[k], abs_tol=1e-6, rel_tol=tol(k)))
]
print(len(a), "rows,", len(a.keys() ^ b.keys()), "on one side only,", len(off), "differ", *off[:3], sep="\n")
sys.exit(not a or a.keys() != b.keys() or bool(off))

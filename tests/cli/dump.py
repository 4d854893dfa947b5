"""dump.py DB: everything a results database says through its views, sorted, without the build and the wall times."""
import sqlite3
import sys

db = sqlite3.connect("file:%s?mode=ro" % sys.argv[1], uri=True)
for view in "v_run", "v_metric", "v_slots":
    names = [c[1] for c in db.execute("PRAGMA table_info(%s)" % view) if c[1] not in ("build", "wall_s")]
    rows = sorted(repr(r) for r in db.execute("SELECT %s FROM %s" % (", ".join(names), view)))
    print(view, *names)
    print(*rows, sep="\n")

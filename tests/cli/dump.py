"""dump.py DB: everything a results database says through its views, sorted, without the build and the wall times."""
import sqlite3
import sys


def views(path):
    """{view: (column names, sorted rows)}; run_id stands first in every row."""
    db = sqlite3.connect("file:%s?mode=rw" % path, uri=True)
    out = {}
    for view in "v_run", "v_metric", "v_slots":
        names = [c[1] for c in db.execute("PRAGMA table_info(%s)" % view) if c[1] not in ("build", "wall_s")]
        rows = db.execute("SELECT %s FROM %s" % (", ".join(names), view)) if names else []  # none: nothing was ever stored
        out[view] = names, sorted(repr(r) for r in rows)
    db.close()
    return out


if __name__ == "__main__":
    for view, (names, rows) in views(sys.argv[1]).items():
        print(view, *names)
        print(*rows, sep="\n")

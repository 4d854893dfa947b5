# Figures: svg, png and the data behind each; the same bytes every time; without gnuplot the data and a clear line.
. "$CLI/lib.sh"

synth t.kvt
synth u.kvt --seed 2
kv-sim run t.kvt u.kvt -p snapkv,recency,cake,oracle -b 5%,20%,50% --detail step --gap --db r.db 2>/dev/null || fail 'cannot make r.db'

# no gnuplot in PATH
mkdir nothing
KV_ANALYZE=$(command -v kv-analyze)
PATH=nothing "$KV_ANALYZE" plot curve --db r.db -o bare >.out 2>.err
check 'no gnuplot: exit 1' test $? -eq 1
check 'no gnuplot: one line that names the package' test "$(grep -c '^kv-analyze: .*gnuplot-nox' .err)/$(wc -l <.err)" = 1/1
check 'no gnuplot: no figure' test -z "$(find . -name '*.svg*' -o -name '*.png*')"
check 'no gnuplot: the data is there' test -s bare/curve.csv

if ! have gnuplot; then
    skip 'gnuplot is not installed: no figure was drawn'
    exit 0
fi
ok kv-analyze plot all --db r.db -o one
ok kv-analyze plot all --db r.db -o two
check 'twice: the same files' diff -r one two
for n in "$ROOT"/plots/*.sql; do
    n=$(basename "$n" .sql)
    if [ $n = nll ]; then continue; fi # needs a model: sim-closed.sh
    check "$n.svg is one" grep -q '</svg>' "one/$n.svg"
    check "$n.png is one" test "$(head -c 4 "one/$n.png" | tail -c 3)" = PNG
    check "$n.csv has data" test "$(wc -l <"one/$n.csv")" -gt 1
done
ok kv-analyze plot attention --trace-file t.kvt -p snapkv -b 20% --layer 1 --head 2 -o one
check 'attention.svg is one' grep -q '</svg>' one/attention.svg
ok kv-analyze plot attention --trace-file t.kvt -p snapkv -b 20% --layer 1 --head 2 -o two
check 'attention twice: the same files' diff -r one two
ok kv-analyze plot cake --trace-file t.kvt -b 20% -o one
check 'cake.svg is one' grep -q '</svg>' one/cake.svg
ok kv-analyze plot cake --trace-file t.kvt -b 20% -o two
check 'cake twice: the same files' diff -r one two
# errors of the full cache alone are all 0: nothing to draw on a logarithmic axis
ok kv-sim run t.kvt -p full -b 20% --db full.db
ok kv-analyze plot curve --db full.db --metric layer_error -o full
# 300 rows: two to a point, each the mean of its rows
synth long.kvt --tokens 500 --prompt-tokens 200
ok kv-sim run long.kvt -p snapkv,full -b 20% --detail step --metrics recall --db long.db
ok kv-analyze plot staleness --db long.db -o long
if have python3; then
    check 'staleness: a point is the mean of its rows' python3 -c '
import csv, sqlite3
db = sqlite3.connect("long.db")
points = [r for r in csv.DictReader(open("long/staleness.csv")) if r["policy"] == "snapkv"]
rows = [v for v, in db.execute("SELECT value FROM v_metric WHERE policy = \"snapkv\" AND metric = \"recall\" AND step IS NOT NULL AND layer IS NULL ORDER BY step")]
assert len(rows) == 300 and len(points) == 150, (len(rows), len(points))
for i, p in enumerate(points):
    assert float(p["step"]) == 2 * i + 0.5 and abs(float(p["mean"]) - (rows[2 * i] + rows[2 * i + 1]) / 2) < 1e-12, p'
fi
check 'no leftovers' test -z "$(find . -name '*.partial' -o -name '*.tmp' -o -name '*.gp')"
if have python3; then
    check 'every svg is well-formed' python3 -c '
import glob, xml.dom.minidom
[xml.dom.minidom.parse(f) for f in glob.glob("one/*.svg")]'
fi

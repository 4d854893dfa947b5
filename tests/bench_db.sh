#!/bin/sh
# bench_db.sh BIN [DIR] - a results database of 5 million metric rows (28 policies x 20 budgets x 24 prompts, 12 metrics by 30 layers),
# made with sqlite3 from sim/schema.sql, and the time kv-analyze takes for what a report asks of it. CSV: what,seconds (CPU).
set -eu
bin=$1
dir=${2:-$(mktemp -d)}
mkdir -p "$dir"
db=$dir/five-million.db
[ -f "$db" ] || {
    rm -f "$db.new"
    {
        cat sim/schema.sql
        cat <<'END'
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
BEGIN;
CREATE TEMP TABLE n AS WITH RECURSIVE c (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i < 99) SELECT i FROM c;
INSERT INTO trace SELECT i + 1, printf('%064x', i), 'trace' || i, 'model', 'llama', 'p' || i, 'family' || (i % 12), 1200, 100, '0', 9, 3, 64
FROM n WHERE i < 24;
INSERT INTO metric_name SELECT i + 1, CASE i WHEN 0 THEN 'layer_error' WHEN 1 THEN 'recall' WHEN 2 THEN 'head_error' WHEN 3 THEN 'recall_contested'
WHEN 4 THEN 'delta_nll' ELSE 'metric' || i END, 'unit', CASE WHEN i IN (1, 3) THEN 'higher' ELSE 'lower' END FROM n WHERE i < 12;
INSERT INTO run (run_id, trace_id, policy, spec, base, corner, target, oracle, verified, budget, budget_tokens, budget_frac, granularity, page, cut, protect,
rows, kept_slots, kept_bytes, mean_bytes, peak_bytes, nominal_bytes, full_bytes, prefill_bytes, read_bytes, overspent, seed, detail, wanted, build, wall_s)
SELECT printf('%08x%08x%08x%08x', t.i * 2654435761 % 4294967296, p.i, b.i, t.i), t.i + 1, p.name, p.name || ':window=32', p.name || ':window=32', '', '', '',
'definition', ((b.i + 1) * 5) || '%', 60 * (b.i + 1), 0.05 * (b.i + 1), 'kv_head', 1, 'prompt', 'none', 100, 5400 * (b.i + 1), 1382400 * (b.i + 1),
1382400.0 * (b.i + 1), 1382400 * (b.i + 1), 1382400 * (b.i + 1), 27648000.0, 27648000, 1382400.0 * (b.i + 1), 0, 0, 1, 4095, 'bench', 0.1
FROM n b, n t, (SELECT i, CASE i WHEN 0 THEN 'full' WHEN 1 THEN 'oracle' WHEN 2 THEN 'oracle-layer' WHEN 3 THEN 'oracle-global' WHEN 4 THEN 'snapkv'
WHEN 5 THEN 'cake' ELSE 'policy' || i END AS name FROM n WHERE i < 28) p WHERE b.i < 20 AND t.i < 24 ORDER BY t.i, p.i, b.i;
INSERT INTO metric SELECT r.id, m.metric_id, l.i - 1, -1, -1,
abs(m.metric_id + 20.0 / (r.budget_frac * 100 + 3) + (r.id * 7919 + l.i * 104729 + m.metric_id * 1299709) % 1000 / 5000.0 - l.i / 100.0), 100
FROM run r, metric_name m, n l WHERE l.i < 31 ORDER BY r.id, m.metric_id, l.i;
INSERT INTO slots (run, layer, head, slots, bytes, read_bytes) SELECT r.id, l.i, h.i, r.budget_tokens + (CASE r.policy WHEN 'cake' THEN l.i - 15 WHEN 'oracle-global' THEN 3 * h.i ELSE 0 END),
256 * r.budget_tokens, 256.0 * r.budget_tokens FROM run r, n l, n h WHERE l.i < 30 AND h.i < 3 ORDER BY r.id, l.i, h.i;
COMMIT;
END
    } | sqlite3 "$db.new" >/dev/null
    mv "$db.new" "$db"
}
echo "# $(sqlite3 "$db" 'SELECT count(*) FROM metric') metric rows, $(sqlite3 "$db" 'SELECT count(*) FROM run') runs, $(($(wc -c <"$db") >> 20)) MiB, $(date +%F)"
echo what,seconds
total=0
clock() {
    what=$1
    shift
    s=$( ("$@" >/dev/null 2>"$dir/err" || echo failed; times) | awk '/failed/ {bad = 1} {for (i = 1; i <= NF; i++) {split($i, t, /[ms]/); s += 60 * t[1] + t[2]}} END {printf bad ? "failed" : "%.2f", s}')
    total=$(echo "$total $s" | awk '{print $1 + $2}')
    echo "$what,$s"
}
for m in layer_error recall head_error recall_contested; do clock "curve $m" "$bin/kv-analyze" curve --db "$db" -m $m --json; done
clock "summary layer_error" "$bin/kv-analyze" summary --db "$db" -m layer_error
clock "compare all with snapkv, curves" "$bin/kv-analyze" compare --db "$db" --baseline snapkv --json
clock "compare all with snapkv at 10%" "$bin/kv-analyze" compare --db "$db" --baseline snapkv -b 10% --json
clock "recommend" "$bin/kv-analyze" recommend --db "$db" --margin 1.5
clock "layers" "$bin/kv-analyze" layers --db "$db" -b 10% --json
echo "total,$total"
clock "report, the whole page" "$bin/kv-analyze" report --db "$db" -o "$dir/report.html"
clock "predict, 11 metrics with delta_nll" "$bin/kv-analyze" predict --db "$db" --json
[ -n "${2:-}" ] || rm -rf "$dir"

-- results.db: one row a run, metrics by layer and head, slots kept. Programs and people read the views at the end: they are
-- the contract, the tables may change under them. Wall times and the build stand in columns of their own, so that everything else of
-- two databases can be compared byte for byte.
PRAGMA application_id = 0x4b565452; -- "KVTR"
PRAGMA user_version   = 3;

CREATE TABLE trace (
    trace_id      INTEGER PRIMARY KEY,
    sha256        TEXT NOT NULL UNIQUE,   -- content hash of the trace (provenance left out)
    name          TEXT NOT NULL,          -- file name without folder and ".kvt"
    model         TEXT NOT NULL,
    arch          TEXT NOT NULL,
    prompt        TEXT NOT NULL,          -- prompt id, or the name
    category      TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    decode_tokens INTEGER NOT NULL,
    layers        TEXT NOT NULL,          -- recorded layers, "0+3+7"
    q_heads       INTEGER NOT NULL,
    kv_heads      INTEGER NOT NULL,
    head_dim      INTEGER NOT NULL
) STRICT;

CREATE TABLE run (
    id            INTEGER PRIMARY KEY,
    run_id        TEXT NOT NULL UNIQUE,   -- 32 hex digits: hash of trace content, canonical spec, budget, cut, rows, metrics' definitions, seed
    trace_id      INTEGER NOT NULL REFERENCES trace,
    policy        TEXT NOT NULL,          -- "cake"
    spec          TEXT NOT NULL,          -- canonical: every parameter filled in
    base          TEXT NOT NULL,          -- spec of the policy whose parts the oracle took over; else the run's own spec
    corner        TEXT NOT NULL,          -- those parts, "rank+heads" (sim/oracle.h); "" = an ordinary run
    target        TEXT NOT NULL,          -- what the oracle maximised: "recall" or "recall_contested"; "" = an ordinary run
    oracle        TEXT NOT NULL,          -- spec of the oracle that bounds the run's class; "" = none
    verified      TEXT NOT NULL,          -- "authors' code", "definition", "not verified: ..." : how the policy was checked
    budget        TEXT NOT NULL,          -- as given: "5%", "512", "ratio=0.9"
    budget_tokens INTEGER NOT NULL,       -- C: tokens per KV head and layer, on average over the layers that evict
    budget_frac   REAL NOT NULL,          -- C / tokens at the cut
    granularity   TEXT NOT NULL,          -- query_head | kv_head | layer
    page          INTEGER NOT NULL,
    cut           TEXT NOT NULL,          -- prompt | context
    protect       TEXT NOT NULL,          -- "none" or "sink=4,recent=32"
    rows          INTEGER NOT NULL,       -- query rows measured
    kept_slots    INTEGER NOT NULL,       -- (layer, KV head, token) slots right after the cut, over the layers that evict
    kept_bytes    INTEGER NOT NULL,       -- K and V of them, in the trace's dtype
    mean_bytes    REAL NOT NULL,          -- mean over the measured rows, tokens after the cut included
    peak_bytes    INTEGER NOT NULL,       -- sum over layers of the most that a row saw
    nominal_bytes INTEGER NOT NULL,       -- C x layers x KV heads x bytes of a slot
    full_bytes    REAL NOT NULL,          -- mean over the measured rows of a full cache of KV heads, same layers
    prefill_bytes INTEGER NOT NULL,       -- held at most while the prompt goes through, every layer cut as soon as its count is known
    read_bytes    REAL NOT NULL,          -- K and V that one decode step reads: mean over the measured rows, in whole pages
    matched_tokens INTEGER,               -- --match-bytes: the budget the policy was run at, NULL = the one asked for
    overspent     INTEGER NOT NULL,       -- 1 = more slots than nominal
    seed          INTEGER NOT NULL,
    detail        INTEGER NOT NULL,       -- 0 = run, 1 = layer, 2 = head, 3 = step: how finely the metrics are stored
    wanted        INTEGER NOT NULL,       -- bit set of the metrics asked for
    build         TEXT NOT NULL,          -- version, commit, compiler, CUDA or not
    wall_s        REAL NOT NULL           -- this run's share of the replay
) STRICT;
CREATE INDEX run_trace ON run (trace_id, policy);
CREATE INDEX run_base ON run (trace_id, base);

CREATE TABLE metric_name (
    metric_id INTEGER PRIMARY KEY,
    name      TEXT NOT NULL,
    unit      TEXT NOT NULL,              -- layer_error of traces without ||x|| has a unit of its own
    better    TEXT NOT NULL,              -- "higher" | "lower" | "none"
    UNIQUE (name, unit)
) STRICT;

CREATE TABLE metric (
    run       INTEGER NOT NULL REFERENCES run ON DELETE CASCADE,
    metric_id INTEGER NOT NULL REFERENCES metric_name,
    layer     INTEGER NOT NULL,           -- number in the model; -1 = aggregated
    head      INTEGER NOT NULL,           -- query head; -1 = aggregated
    step      INTEGER NOT NULL,           -- measured row; -1 = aggregated
    value     REAL,                       -- NULL = undefined
    n         INTEGER NOT NULL,           -- samples behind value
    PRIMARY KEY (run, metric_id, layer, head, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE slots (
    run   INTEGER NOT NULL REFERENCES run ON DELETE CASCADE,
    layer INTEGER NOT NULL,
    head  INTEGER NOT NULL,               -- unit of the granularity: query head, KV head, or 0
    slots INTEGER NOT NULL,               -- tokens kept by this unit right after the cut
    bytes INTEGER NOT NULL,
    read_bytes REAL NOT NULL,             -- that one decode step reads of them and of later tokens: mean over the measured rows, in whole pages
    PRIMARY KEY (run, layer, head)
) STRICT, WITHOUT ROWID;

CREATE VIEW v_run AS
SELECT r.run_id, t.name AS trace, t.sha256 AS trace_sha256, t.model, t.arch, t.prompt, t.category, t.prompt_tokens,
       t.decode_tokens, r.policy, r.spec, r.oracle, r.verified, r.budget, r.budget_tokens, r.budget_frac, r.granularity, r.page, r.cut,
       r.protect, r.rows, r.kept_slots, r.kept_bytes, r.mean_bytes, r.peak_bytes, r.nominal_bytes, r.full_bytes,
       r.prefill_bytes, r.read_bytes, r.matched_tokens, r.overspent,
       r.seed, r.build, r.wall_s
FROM run r JOIN trace t USING (trace_id) WHERE r.corner = '';

-- CROSS JOIN keeps this order: from a run and a metric straight to its rows, where SQLite without statistics reads them all.
CREATE VIEW v_metric AS
SELECT r.run_id, t.name AS trace, t.model, t.prompt, t.category, r.policy, r.spec, r.budget, r.budget_tokens, r.budget_frac,
       n.name AS metric, n.unit, n.better, nullif(m.layer, -1) AS layer, nullif(m.head, -1) AS head,
       nullif(m.step, -1) AS step, m.value, m.n
FROM run r CROSS JOIN metric_name n CROSS JOIN metric m ON m.run = r.id AND m.metric_id = n.metric_id JOIN trace t USING (trace_id)
WHERE r.corner = '';

CREATE VIEW v_slots AS
SELECT r.run_id, s.layer, s.head, s.slots, s.bytes, s.read_bytes FROM slots s JOIN run r ON r.id = s.run WHERE r.corner = '';

-- Policies with parts taken over by an oracle (kv-sim run --gap) stand apart, so that nobody takes them for policies. run_id is the
-- policy's own run, v_run.run_id; corner "" is that run itself.
-- The oracles of a class that drops row by row stand here too: "drops" and "drops+steps".
CREATE VIEW v_corner AS
WITH pair AS (
    SELECT p.id AS own, c.id AS other, c.corner, c.target FROM run p
    JOIN run c ON c.trace_id = p.trace_id AND c.base = p.spec AND c.budget = p.budget AND c.cut = p.cut AND c.rows = p.rows
    WHERE p.corner = ''
    UNION ALL
    SELECT p.id, c.id, iif(c.spec = p.oracle, 'drops', 'drops+steps'), 'recall' FROM run p
    JOIN run b ON b.trace_id = p.trace_id AND b.spec = p.oracle AND b.budget = p.budget AND b.cut = p.cut AND b.rows = p.rows
    JOIN run c ON c.trace_id = p.trace_id AND c.budget = p.budget AND c.cut = p.cut AND c.rows = p.rows
              AND c.spec IN (b.spec, b.oracle)
    WHERE p.oracle LIKE 'oracle-match:%' AND p.spec <> p.oracle)
SELECT p.run_id, c.run_id AS corner_run_id, x.corner, x.target, c.kept_slots, n.name AS metric, n.unit, n.better,
       nullif(m.layer, -1) AS layer, nullif(m.head, -1) AS head, nullif(m.step, -1) AS step, m.value, m.n
FROM pair x JOIN run p ON p.id = x.own JOIN run c ON c.id = x.other
JOIN metric m ON m.run = c.id JOIN metric_name n USING (metric_id);

-- Where the loss of a run comes from (metrics.md 5.3). loss = distance from the full cache; the terms of a way add up to "lost".
--   forward   ranking, then heads, then layers handed to the oracle; ranking = prediction + aggregation
--   reverse   layers, then heads, then ranking
--   mean      of all six orders (Shapley)
-- staticness is what choosing anew for every row would still gain, budget what no choice could keep. recall_contested is taken apart
-- with oracles of recall_contested, every other metric with those of recall. Rules that drop for good, row by row, have forward
-- only: ranking = against the best sequence of drops (oracle-match), staticness = that against every row's own best.
CREATE VIEW v_gap AS
WITH loss AS (
    SELECT run_id, metric, unit, corner, CASE better WHEN 'higher' THEN 1 - value ELSE value END AS loss
    FROM v_corner
    WHERE layer IS NULL AND head IS NULL AND step IS NULL AND better <> 'none'
      AND (target = '' OR target = CASE metric WHEN 'recall_contested' THEN metric ELSE 'recall' END)),
at AS (
    SELECT run_id, metric, unit, max(iif(corner = '', loss, NULL)) AS p, max(iif(corner = 'window', loss, NULL)) AS w,
           max(iif(corner IN ('rank', 'drops'), loss, NULL)) AS r, max(iif(corner = 'heads', loss, NULL)) AS h,
           max(iif(corner = 'layers', loss, NULL)) AS l, max(iif(corner = 'rank+heads', loss, NULL)) AS rh,
           max(iif(corner = 'rank+layers', loss, NULL)) AS rl, max(iif(corner = 'heads+layers', loss, NULL)) AS hl,
           max(iif(corner IN ('rank+heads+layers', 'drops'), loss, NULL)) AS rhl,
           max(iif(corner IN ('rank+heads+layers+steps', 'drops+steps'), loss, NULL)) AS s
    FROM loss GROUP BY run_id, metric, unit),
term (way, term, place) AS (
    VALUES ('forward', 'lost', 0), ('forward', 'ranking', 1), ('forward', 'prediction', 2), ('forward', 'aggregation', 3),
           ('forward', 'heads', 4), ('forward', 'layers', 5), ('forward', 'staticness', 6), ('forward', 'budget', 7),
           ('reverse', 'lost', 0), ('reverse', 'ranking', 1), ('reverse', 'heads', 4), ('reverse', 'layers', 5),
           ('reverse', 'staticness', 6), ('reverse', 'budget', 7),
           ('mean', 'lost', 0), ('mean', 'ranking', 1), ('mean', 'heads', 4), ('mean', 'layers', 5),
           ('mean', 'staticness', 6), ('mean', 'budget', 7)),
every AS (
    SELECT run_id, metric, unit, way, term, place,
           CASE term WHEN 'lost' THEN p WHEN 'prediction' THEN p - w WHEN 'aggregation' THEN w - r
                     WHEN 'staticness' THEN rhl - s WHEN 'budget' THEN s
           ELSE CASE way || ' ' || term
                WHEN 'forward ranking' THEN p - r
                WHEN 'forward heads' THEN r - rh
                WHEN 'forward layers' THEN rh - rhl
                WHEN 'reverse ranking' THEN hl - rhl
                WHEN 'reverse heads' THEN l - hl
                WHEN 'reverse layers' THEN p - l
                WHEN 'mean ranking' THEN (2 * (p - r) + (h - rh) + (l - rl) + 2 * (hl - rhl)) / 6
                WHEN 'mean heads' THEN (2 * (p - h) + (r - rh) + (l - hl) + 2 * (rl - rhl)) / 6
                WHEN 'mean layers' THEN (2 * (p - l) + (r - rl) + (h - hl) + 2 * (rh - rhl)) / 6 END END AS value
    FROM at JOIN term
    WHERE p IS NOT NULL AND s IS NOT NULL AND (way = 'forward' OR hl IS NOT NULL))
SELECT run_id, metric, unit, way, term, place, value FROM every WHERE value IS NOT NULL;

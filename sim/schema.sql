-- results.db: one row a run, metrics by layer and head, slots kept. Programs and people read the views at the end: they are
-- the contract, the tables may change under them. Wall times and the build stand in columns of their own, so that everything else of
-- two databases can be compared byte for byte.
PRAGMA application_id = 0x4b565452; -- "KVTR"
PRAGMA user_version   = 1;

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
    overspent     INTEGER NOT NULL,       -- 1 = more slots than nominal
    seed          INTEGER NOT NULL,
    detail        INTEGER NOT NULL,       -- 0 = run, 1 = layer, 2 = head: how finely the metrics are stored
    wanted        INTEGER NOT NULL,       -- bit set of the metrics asked for
    build         TEXT NOT NULL,          -- version, commit, compiler, CUDA or not
    wall_s        REAL NOT NULL           -- this run's share of the replay
) STRICT;
CREATE INDEX run_trace ON run (trace_id, policy);

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
    PRIMARY KEY (run, layer, head)
) STRICT, WITHOUT ROWID;

CREATE VIEW v_run AS
SELECT r.run_id, t.name AS trace, t.sha256 AS trace_sha256, t.model, t.arch, t.prompt, t.category, t.prompt_tokens,
       t.decode_tokens, r.policy, r.spec, r.verified, r.budget, r.budget_tokens, r.budget_frac, r.granularity, r.page, r.cut,
       r.protect, r.rows, r.kept_slots, r.kept_bytes, r.mean_bytes, r.peak_bytes, r.nominal_bytes, r.full_bytes, r.overspent,
       r.seed, r.build, r.wall_s
FROM run r JOIN trace t USING (trace_id);

CREATE VIEW v_metric AS
SELECT r.run_id, t.name AS trace, t.model, t.prompt, t.category, r.policy, r.spec, r.budget, r.budget_tokens, r.budget_frac,
       n.name AS metric, n.unit, n.better, nullif(m.layer, -1) AS layer, nullif(m.head, -1) AS head,
       nullif(m.step, -1) AS step, m.value, m.n
FROM metric m JOIN run r ON r.id = m.run JOIN trace t USING (trace_id) JOIN metric_name n USING (metric_id);

CREATE VIEW v_slots AS
SELECT r.run_id, s.layer, s.head, s.slots, s.bytes FROM slots s JOIN run r ON r.id = s.run;

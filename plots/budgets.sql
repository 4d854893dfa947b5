-- budgets: what each layer is given, relative to the same budget spread evenly. One row per run and layer.
-- metric: none
WITH given AS (
    SELECT s.run_id, s.layer, sum(s.bytes) AS bytes
    FROM v_slots s JOIN v_run x ON x.run_id = s.run_id
    WHERE x.budget = :budget
    GROUP BY s.run_id, s.layer),
size AS (SELECT run_id, count(*) AS layers FROM given GROUP BY run_id)
SELECT r.model, g.layer, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, r.budget,
       r.category || '/' || r.prompt AS prompt,
       CAST(g.bytes AS REAL) * r.kept_slots / nullif(r.kept_bytes, 0) AS slots,
       CAST(r.nominal_bytes AS REAL) / s.layers * r.kept_slots / nullif(r.kept_bytes, 0) AS uniform_slots,
       CAST(g.bytes AS REAL) * s.layers / nullif(r.nominal_bytes, 0) AS value
FROM v_run r JOIN given g ON g.run_id = r.run_id JOIN size s ON s.run_id = r.run_id
WHERE r.budget = :budget
  AND ((:policies IS NULL AND r.policy IN ('pyramidkv', 'cake', 'lava', 'oracle-global'))
       OR r.policy IN (SELECT value FROM json_each(:policies)) OR r.spec IN (SELECT value FROM json_each(:policies)))
  AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
  AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
  AND (:model IS NULL OR r.model = :model)
ORDER BY r.policy, r.spec, g.layer, r.run_id;

-- staleness: one metric against the decode step at one budget: how a set chosen once ages. A line per policy; more than 200 rows
-- are averaged in bins of equal width. Needs kv-sim run --detail step.
-- metric: recall_contested layer_error recall
WITH chosen AS (
    SELECT * FROM v_run r
    WHERE r.budget = :budget
      AND (:policies IS NULL OR r.policy IN (SELECT value FROM json_each(:policies))
                             OR r.spec IN (SELECT value FROM json_each(:policies)))
      AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
      AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
      AND (:model IS NULL OR r.model = :model)),
bin AS (SELECT (max(rows) + 199) / 200 AS width FROM chosen)
SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, m.metric, m.unit, r.budget, b.width,
       m.step / b.width * b.width + (b.width - 1) / 2.0 AS step, r.category || '/' || r.prompt AS prompt, m.better,
       avg(m.value) AS value
FROM chosen r CROSS JOIN bin b CROSS JOIN v_metric m ON m.run_id = r.run_id
WHERE m.metric = :metric AND m.layer IS NULL AND m.head IS NULL AND m.step IS NOT NULL
GROUP BY r.run_id, m.metric, m.unit, m.step / b.width
ORDER BY r.policy, r.spec, 12, r.run_id;

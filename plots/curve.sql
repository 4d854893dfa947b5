-- curve: one metric against the bytes kept, a line per policy. One row per run; the program takes the mean and the interval
-- over prompts (see README.md).
SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, m.metric, m.unit, r.budget,
       r.category || '/' || r.prompt AS prompt,
       r.budget_frac, r.mean_bytes AS bytes, r.full_bytes, r.mean_bytes / r.full_bytes AS frac, m.better, m.value
FROM v_run r JOIN v_metric m ON m.run_id = r.run_id
WHERE m.metric = :metric AND m.layer IS NULL AND m.head IS NULL AND m.step IS NULL
  AND (:policies IS NULL OR r.policy IN (SELECT value FROM json_each(:policies))
                         OR r.spec IN (SELECT value FROM json_each(:policies)))
  AND (:budgets IS NULL OR r.budget IN (SELECT value FROM json_each(:budgets)))
  AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
  AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
  AND (:model IS NULL OR r.model = :model)
ORDER BY r.policy, r.spec, r.budget_frac, r.run_id;

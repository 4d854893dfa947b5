-- nll: what the model lost (delta_nll, needs kv-sim run --model) against what the cheap metric says (layer_error); a line per
-- policy, a point per budget. One row per run; the program takes the means over prompts.
-- metric: none
SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, 'delta_nll' AS metric, y.unit, x.unit AS x_unit, r.budget,
       r.category || '/' || r.prompt AS prompt,
       r.budget_frac, r.mean_bytes AS bytes, x.value AS x, y.better, y.value
FROM v_run r JOIN v_metric x ON x.run_id = r.run_id JOIN v_metric y ON y.run_id = r.run_id
WHERE x.metric = 'layer_error' AND x.layer IS NULL AND x.head IS NULL AND x.step IS NULL AND x.value IS NOT NULL
  AND y.metric = 'delta_nll' AND y.layer IS NULL AND y.head IS NULL AND y.step IS NULL
  AND (:policies IS NULL OR r.policy IN (SELECT value FROM json_each(:policies))
                         OR r.spec IN (SELECT value FROM json_each(:policies)))
  AND (:budgets IS NULL OR r.budget IN (SELECT value FROM json_each(:budgets)))
  AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
  AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
  AND (:model IS NULL OR r.model = :model)
ORDER BY r.policy, r.spec, r.budget_frac, r.run_id;

-- gap: the loss of each policy taken apart at one budget (v_gap, forward), mean over prompts. Needs kv-sim run --gap.
-- metric: recall_contested recall
SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, g.unit, r.budget, g.term, g.place,
       r.category || '/' || r.prompt AS prompt, r.budget_frac, g.value
FROM v_gap g JOIN v_run r ON r.run_id = g.run_id
WHERE g.metric = :metric AND g.way = 'forward' AND r.budget = :budget
  AND (:policies IS NULL OR r.policy IN (SELECT value FROM json_each(:policies))
       OR r.spec IN (SELECT value FROM json_each(:policies)))
  AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
  AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
  AND (:model IS NULL OR r.model = :model)
ORDER BY r.policy, r.spec, g.place, r.run_id;

-- heads: one metric by layer and query head, for one variant of one policy at one budget, mean over prompts.
-- metric: head_error recall_contested recall nats_lost
-- policy: cake snapkv h2o
SELECT m.layer, m.head, r.spec, r.category || '/' || r.prompt AS prompt, m.unit, m.value
FROM v_run r JOIN v_metric m ON m.run_id = r.run_id
WHERE m.metric = :metric AND m.layer IS NOT NULL AND m.head IS NOT NULL AND m.step IS NULL
  AND (r.policy = :policy OR r.spec = :policy) AND r.budget = :budget
  AND (r.spec, r.page, r.cut, r.protect) =
      (SELECT x.spec, x.page, x.cut, x.protect FROM v_run x
       WHERE (x.policy = :policy OR x.spec = :policy) AND x.budget = :budget AND (:model IS NULL OR x.model = :model)
       ORDER BY x.spec, x.page, x.cut, x.protect LIMIT 1)
  AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))
  AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))
  AND (:model IS NULL OR r.model = :model)
ORDER BY m.layer, m.head, r.run_id;

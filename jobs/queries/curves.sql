-- Training curves of the policy of the run, or of the round, and what its steps cost.
WITH told AS (
    SELECT key, step, metric, value FROM metrics WHERE NOT starts_with(metric, 'heldout/')
    UNION ALL
    SELECT key, step, measure, value FROM speeds
)
SELECT step, metric, value FROM told
WHERE key IN (SELECT key FROM runs WHERE step = 'optimize')
ORDER BY metric, step

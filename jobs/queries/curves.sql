-- Training curves of the policy of the run, or of the round.
SELECT step, metric, value FROM metrics
WHERE key IN (SELECT key FROM runs WHERE step = 'optimize') AND NOT starts_with(metric, 'heldout/')
ORDER BY metric, step

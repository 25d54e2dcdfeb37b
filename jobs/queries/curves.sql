-- Training curves of the run's own policy.
SELECT step, metric, value FROM metrics
WHERE key IN (SELECT key FROM runs WHERE step = 'optimize') AND NOT starts_with(metric, 'heldout/')
ORDER BY metric, step

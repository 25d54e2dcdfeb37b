-- Training curves of every policy: loss, margins, log-probs, and what its steps cost, for one run by --run.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run FROM runs WHERE step = 'optimize' GROUP BY stage, key),
told AS (
    SELECT stage, key, step, metric, value FROM metrics WHERE NOT starts_with(metric, 'heldout/')
    UNION ALL
    SELECT stage, key, step, measure, value FROM speeds
)
SELECT run, step, metric, value FROM told JOIN named USING (stage, key)
ORDER BY run, metric, step

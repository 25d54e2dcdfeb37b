-- Training curves of every policy: loss, margins, log-probs and throughput; choose one run with --run.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run FROM runs WHERE step = 'optimize' GROUP BY stage, key),
summary AS (
    SELECT stage, key, step, metric, value FROM metrics WHERE NOT starts_with(metric, 'heldout/')
    UNION ALL
    SELECT stage, key, step, measure, value FROM speeds
)
SELECT run, step, metric, value FROM summary JOIN step_names USING (stage, key)
ORDER BY run, metric, step

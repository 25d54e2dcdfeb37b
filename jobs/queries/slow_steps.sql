-- The twenty slowest steps, with rows and tokens per second, and the mean number of busy workers.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key)
SELECT run, step, stage, key, seconds, wall_seconds, seconds / nullif(wall_seconds, 0) AS busy,
    rows / nullif(seconds, 0) AS rows_per_second, tokens / nullif(seconds, 0) AS tokens_per_second, bytes
FROM step_names JOIN steps USING (stage, key)
ORDER BY seconds DESC, run, step
LIMIT 20

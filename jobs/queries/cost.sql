-- Time of each run by stage, the most expensive first; share: of the run's GPU-seconds, or CPU-seconds without a GPU.
SELECT run, stage, count(*) AS steps, sum(rows)::BIGINT AS rows, sum(rejects)::BIGINT AS rejects, sum(seconds)::DOUBLE AS seconds,
    sum(wall_seconds)::DOUBLE AS wall_seconds, sum(gpu_seconds)::DOUBLE AS gpu_seconds,
    sum(cpu_seconds)::DOUBLE AS cpu_seconds,
    coalesce(
        sum(gpu_seconds)::DOUBLE / nullif(sum(sum(gpu_seconds)) OVER (PARTITION BY run), 0),
        sum(cpu_seconds)::DOUBLE / nullif(sum(sum(cpu_seconds)) OVER (PARTITION BY run), 0)
    ) AS share,
    sum(tokens)::BIGINT AS tokens, sum(ranker_calls)::BIGINT AS ranker_calls
FROM (SELECT DISTINCT run, stage, key FROM runs)
    -- Sums of decimals are exact, whatever the order in which threads come.
    JOIN (
        SELECT * REPLACE (
            seconds::DECIMAL(18, 3) AS seconds, wall_seconds::DECIMAL(18, 3) AS wall_seconds,
            gpu_seconds::DECIMAL(18, 3) AS gpu_seconds, cpu_seconds::DECIMAL(18, 3) AS cpu_seconds
        ) FROM steps
    ) USING (stage, key)
GROUP BY run, stage
ORDER BY run, gpu_seconds DESC, cpu_seconds DESC, stage

-- Time of each run by stage, the most expensive first; share: of the run's GPU-seconds, or CPU-seconds without a GPU.
SELECT run, stage, count(*) AS steps, sum(rows)::BIGINT AS rows, sum(rejects)::BIGINT AS rejects, sum(seconds) AS seconds,
    sum(wall_seconds) AS wall_seconds, sum(gpu_seconds) AS gpu_seconds, sum(cpu_seconds) AS cpu_seconds,
    coalesce(
        sum(gpu_seconds) / nullif(sum(sum(gpu_seconds)) OVER (PARTITION BY run), 0),
        sum(cpu_seconds) / nullif(sum(sum(cpu_seconds)) OVER (PARTITION BY run), 0)
    ) AS share,
    sum(tokens)::BIGINT AS tokens, sum(ranker_calls)::BIGINT AS ranker_calls
FROM (SELECT DISTINCT run, stage, key FROM runs) JOIN steps USING (stage, key)
GROUP BY run, stage
ORDER BY run, gpu_seconds DESC, cpu_seconds DESC, stage

-- Length of responses and how they end, by step; if many end by length, max_tokens is too small.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), counts AS (
    SELECT stage, key, finish_reason, n_tokens, count(*) AS n FROM candidates GROUP BY ALL
), cumulative AS (
    SELECT *, sum(n) OVER (PARTITION BY stage, key, finish_reason ORDER BY n_tokens) AS n_up_to,
        sum(n) OVER (PARTITION BY stage, key, finish_reason) AS n_reason, sum(n) OVER (PARTITION BY stage, key) AS n_step
    FROM counts
), summary AS (
    SELECT stage, key, finish_reason, sum(n)::BIGINT AS n, sum(n) / any_value(n_step) AS share,
        sum(n * n_tokens) / sum(n) AS mean_tokens, min(n_tokens) FILTER (n_up_to >= 0.5 * n_reason) AS median,
        min(n_tokens) FILTER (n_up_to >= 0.95 * n_reason) AS p95, max(n_tokens) AS most
    FROM cumulative GROUP BY stage, key, finish_reason
)
SELECT run, step, finish_reason, n, share, mean_tokens, median, p95, most
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step, finish_reason

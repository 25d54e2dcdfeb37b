-- How long responses are and how they end, by step: many that end by length were cut, and max_tokens is too small.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), sized AS (
    SELECT stage, key, finish_reason, n_tokens, count(*) AS n FROM candidates GROUP BY ALL
), placed AS (
    SELECT *, sum(n) OVER (PARTITION BY stage, key, finish_reason ORDER BY n_tokens) AS upto,
        sum(n) OVER (PARTITION BY stage, key, finish_reason) AS own, sum(n) OVER (PARTITION BY stage, key) AS whole
    FROM sized
), told AS (
    SELECT stage, key, finish_reason, sum(n)::BIGINT AS n, sum(n) / any_value(whole) AS share,
        sum(n * n_tokens) / sum(n) AS mean_tokens, min(n_tokens) FILTER (upto >= 0.5 * own) AS median,
        min(n_tokens) FILTER (upto >= 0.95 * own) AS p95, max(n_tokens) AS most
    FROM placed GROUP BY stage, key, finish_reason
)
SELECT run, step, finish_reason, n, share, mean_tokens, median, p95, most
FROM told JOIN named USING (stage, key)
ORDER BY run, step, finish_reason

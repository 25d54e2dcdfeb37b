-- What is another sample worth? Expected best reward among n of a prompt's candidates, averaged over prompts.
-- Of N rewards in order, the i-th is the best of n drawn without replacement with probability C(i-1, n-1) / C(N, n).
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), ranked AS (
    SELECT stage, key, prompt_id, reward, row_number() OVER by_reward AS i, count(*) OVER (PARTITION BY stage, key, prompt_id) AS m
    FROM rewards WINDOW by_reward AS (PARTITION BY stage, key, prompt_id ORDER BY reward)
), by_rank AS (
    SELECT stage, key, i, m, count(*) AS prompts, sum(reward) AS reward FROM ranked GROUP BY stage, key, i, m
), summary AS (
    SELECT stage, key, n, sum(prompts) FILTER (i = m)::BIGINT AS prompts,
        sum(reward * exp(lgamma(i) - lgamma(i - n + 1) - lgamma(m + 1) + lgamma(m - n + 1)) * n)
            / sum(prompts) FILTER (i = m) AS best
    FROM by_rank, (VALUES (1), (2), (4), (8), (16), (32), (64), (128)) AS sizes(n)
    WHERE i >= n AND n <= m
    GROUP BY stage, key, n
)
SELECT run, step, n, prompts, best, best - lag(best) OVER (PARTITION BY stage, key ORDER BY n) AS gained
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step, n

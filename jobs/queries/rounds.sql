-- Does another round help? Win rates, KL and length of every round, and its gain in gold win rate.
WITH summary AS (
    SELECT run, round,
        any_value(value) FILTER (metric = 'gold_win') AS gold_win, any_value(value) FILTER (metric = 'proxy_win') AS proxy_win,
        any_value(value) FILTER (metric = 'gold') AS gold_reward, any_value(value) FILTER (metric = 'kl') AS kl,
        any_value(value) FILTER (metric = 'n_tokens') AS tokens
    FROM runs JOIN evaluations USING (stage, key) WHERE round IS NOT NULL AND NOT starts_with(step, 'evaluate_')
    GROUP BY run, round
)
SELECT run, round, gold_win, proxy_win, gold_reward, kl, tokens,
    gold_win - lag(gold_win) OVER (PARTITION BY run ORDER BY round) AS gained
FROM summary
ORDER BY run, round

-- Does another round pay? Wins, KL and length of every round in order, and what its gold wins gained on the one before.
WITH told AS (
    SELECT run, round,
        any_value(value) FILTER (metric = 'gold_win') AS gold_win, any_value(value) FILTER (metric = 'proxy_win') AS proxy_win,
        any_value(value) FILTER (metric = 'gold') AS gold_reward, any_value(value) FILTER (metric = 'kl') AS kl,
        any_value(value) FILTER (metric = 'n_tokens') AS tokens
    FROM runs JOIN evaluations USING (stage, key) WHERE round IS NOT NULL
    GROUP BY run, round
)
SELECT run, round, gold_win, proxy_win, gold_reward, kl, tokens,
    gold_win - lag(gold_win) OVER (PARTITION BY run ORDER BY round) AS gained
FROM told
ORDER BY run, round

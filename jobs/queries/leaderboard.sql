-- Every run compared with the SFT policy on held-out prompts: win rates, gold reward, KL, length, and seconds.
-- One row per round (rest@2). Win rates are fractions, at temperature 1, and as `sample` draws and greedily; _low and _high are 95 % intervals. seconds: working time of all steps of the run; own_seconds: of those that no other run uses.
WITH costs AS (
    -- Sums of decimals are exact: those of doubles depend on the order in which threads come, and a page on how one is rounded.
    SELECT run, sum(seconds::DECIMAL(18, 3))::DOUBLE AS seconds,
        coalesce(sum(seconds::DECIMAL(18, 3)) FILTER (n_runs = 1), 0)::DOUBLE AS own_seconds
    FROM (SELECT *, count(*) OVER (PARTITION BY stage, key) AS n_runs FROM (SELECT DISTINCT run, stage, key FROM runs))
    JOIN steps USING (stage, key)
    GROUP BY run
),
others AS (
    SELECT run, round AS of_round,
        any_value(value) FILTER (metric = 'gold_win' AND step = 'evaluate_as_sampled') AS gold_win_as_sampled,
        any_value(low) FILTER (metric = 'gold_win' AND step = 'evaluate_as_sampled') AS gold_win_as_sampled_low,
        any_value(high) FILTER (metric = 'gold_win' AND step = 'evaluate_as_sampled') AS gold_win_as_sampled_high,
        any_value(value) FILTER (metric = 'gold_win' AND step = 'evaluate_greedy') AS gold_win_greedy,
        any_value(low) FILTER (metric = 'gold_win' AND step = 'evaluate_greedy') AS gold_win_greedy_low,
        any_value(high) FILTER (metric = 'gold_win' AND step = 'evaluate_greedy') AS gold_win_greedy_high,
        any_value(value) FILTER (metric = 'proxy_win' AND step = 'evaluate_as_sampled') AS proxy_win_as_sampled,
        any_value(low) FILTER (metric = 'proxy_win' AND step = 'evaluate_as_sampled') AS proxy_win_as_sampled_low,
        any_value(high) FILTER (metric = 'proxy_win' AND step = 'evaluate_as_sampled') AS proxy_win_as_sampled_high,
        any_value(value) FILTER (metric = 'proxy_win' AND step = 'evaluate_greedy') AS proxy_win_greedy,
        any_value(low) FILTER (metric = 'proxy_win' AND step = 'evaluate_greedy') AS proxy_win_greedy_low,
        any_value(high) FILTER (metric = 'proxy_win' AND step = 'evaluate_greedy') AS proxy_win_greedy_high
    FROM runs JOIN evaluations USING (stage, key)
    GROUP BY run, round
),
judged AS ( -- by a judge called gold, where `evaluate` has no gold reward
    SELECT run, round AS of_round, any_value(value) AS gold, any_value(low) AS gold_low, any_value(high) AS gold_high
    FROM runs JOIN evaluations USING (stage, key)
    WHERE metric = 'gold_win' AND step = 'evaluate_by_gold'
    GROUP BY run, round
)
SELECT
    runs.run || coalesce('@' || round, '') AS run,
    coalesce(any_value(value) FILTER (metric = 'gold_win'), any_value(judged.gold)) AS gold_win,
    coalesce(any_value(low) FILTER (metric = 'gold_win'), any_value(gold_low)) AS gold_win_low,
    coalesce(any_value(high) FILTER (metric = 'gold_win'), any_value(gold_high)) AS gold_win_high,
    any_value(value) FILTER (metric = 'proxy_win') AS proxy_win,
    any_value(low) FILTER (metric = 'proxy_win') AS proxy_win_low,
    any_value(high) FILTER (metric = 'proxy_win') AS proxy_win_high,
    any_value(value) FILTER (metric = 'gold') AS gold_reward,
    any_value(low) FILTER (metric = 'gold') AS gold_reward_low,
    any_value(high) FILTER (metric = 'gold') AS gold_reward_high,
    any_value(value) FILTER (metric = 'kl') AS kl_nats,
    any_value(value) FILTER (metric = 'n_tokens') AS tokens,
    max(n) AS prompts,
    any_value(COLUMNS(others.* EXCLUDE (run, of_round))),
    any_value(seconds) AS seconds,
    any_value(own_seconds) AS own_seconds
FROM runs JOIN evaluations USING (stage, key) JOIN costs USING (run)
    JOIN others ON others.run = runs.run AND others.of_round IS NOT DISTINCT FROM round
    LEFT JOIN judged ON judged.run = runs.run AND judged.of_round IS NOT DISTINCT FROM round
WHERE NOT starts_with(step, 'evaluate_')
GROUP BY runs.run, round
ORDER BY gold_win DESC, any_value(value) FILTER (metric = 'proxy_win') DESC,
    runs.run, round

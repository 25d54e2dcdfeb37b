-- Every evaluation of every run and round: at temperature 1, as `sample` draws, greedy, and those of your own.
-- Win rates are fractions; _low and _high are 95 % intervals, over the prompts that were evaluated.
SELECT
    runs.run || coalesce('@' || round, '') AS run,
    step,
    any_value(value) FILTER (metric = 'gold_win') AS gold_win,
    any_value(low) FILTER (metric = 'gold_win') AS gold_win_low,
    any_value(high) FILTER (metric = 'gold_win') AS gold_win_high,
    any_value(value) FILTER (metric = 'proxy_win') AS proxy_win,
    any_value(low) FILTER (metric = 'proxy_win') AS proxy_win_low,
    any_value(high) FILTER (metric = 'proxy_win') AS proxy_win_high,
    any_value(value) FILTER (metric = 'gold') AS gold_reward,
    any_value(value) FILTER (metric = 'gold_baseline') AS gold_reward_baseline,
    any_value(value) FILTER (metric = 'n_tokens') AS tokens,
    max(n) AS prompts
FROM runs JOIN evaluations USING (stage, key)
WHERE stage != 'win_rate' -- of the judges of a config: query judges
GROUP BY runs.run, round, step
ORDER BY step, gold_win DESC, proxy_win DESC, runs.run, round

-- Win rates of every run and round by gold, proxy and other judges, with 95 % intervals, highest gold win rate first.
-- By its main evaluation, against what that compares with; of the judges of a config, against the SFT policy.
SELECT runs.run || coalesce('@' || round, '') AS run, metric, value, low, high
FROM runs JOIN evaluations USING (stage, key) LEFT JOIN steps USING (stage, key)
WHERE (metric IN ('gold_win', 'proxy_win') AND NOT starts_with(step, 'evaluate_'))
    OR (stage = 'win_rate' AND steps.options ->> 'against' = 'sft' AND metric = (steps.options ->> 'judge') || '_win')
ORDER BY max(value) FILTER (metric = 'gold_win') OVER (PARTITION BY runs.run, round) DESC, runs.run, round, metric

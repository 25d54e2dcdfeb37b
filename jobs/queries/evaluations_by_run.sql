-- Win rates of every run and round, by its main evaluation, with 95 % intervals, highest gold win rate first.
SELECT runs.run || coalesce('@' || round, '') AS run, metric, value, low, high
FROM runs JOIN evaluations USING (stage, key)
WHERE metric IN ('gold_win', 'proxy_win') AND NOT starts_with(step, 'evaluate_')
ORDER BY max(value) FILTER (metric = 'gold_win') OVER (PARTITION BY runs.run, round) DESC, runs.run, round, metric

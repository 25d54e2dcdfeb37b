-- Win rates of every run, best gold first.
SELECT run, metric, value, low, high FROM runs JOIN evaluations USING (stage, key)
WHERE metric IN ('gold_win', 'proxy_win')
ORDER BY max(value) FILTER (metric = 'gold_win') OVER (PARTITION BY run) DESC, run, metric

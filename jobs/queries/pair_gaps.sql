-- Gap between chosen and rejected in nats, by rule, and the share of pairs that are near ties.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), gaps AS (
    SELECT stage, key, rule, count(*) AS pairs, count(DISTINCT prompt_id) AS prompts, avg(gap) AS mean_gap,
        quantile_cont(gap, [0.1, 0.5, 0.9]) AS tenths,
        avg((abs(gap) < 0.1)::INTEGER) AS near_ties, avg(1 / (1 + exp(-gap))) AS chosen_better
    FROM pairs GROUP BY stage, key, rule
)
SELECT run, step, rule, pairs, prompts, mean_gap, tenths[1] AS p10, tenths[2] AS median, tenths[3] AS p90, near_ties,
    chosen_better
FROM gaps JOIN step_names USING (stage, key)
ORDER BY run, step, rule

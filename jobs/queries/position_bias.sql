-- Does the ranker prefer a position? Its logits with the baseline first and second, and how often their signs differ.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), summary AS (
    SELECT stage, key, count(*) AS n, avg(logit_ab - logit_ba) / 2 AS bias, avg(abs(logit_ab - logit_ba)) AS mean_difference,
        avg((sign(logit_ab) <> sign(logit_ba))::INTEGER) AS flipped, corr(logit_ab, logit_ba) AS correlation
    FROM rewards WHERE logit_ab IS NOT NULL AND logit_ba IS NOT NULL
    GROUP BY stage, key
)
SELECT run, step, n, bias, mean_difference, flipped, correlation
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step

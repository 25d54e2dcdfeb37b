-- Margin of the frozen reference by rule: log-prob of the chosen response minus that of the rejected one, in nats.
-- One side after the other: a plan that joined both sides of `scored` first would do so on the model, and there may be only one.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), scored AS (
    SELECT candidate_id, model, any_value(logp) AS logp FROM reference GROUP BY candidate_id, model
), halves AS MATERIALIZED (
    SELECT pairs.stage, pairs.key, rule, rejected_id, model, logp FROM pairs JOIN scored ON candidate_id = chosen_id
), summary AS (
    SELECT stage, key, rule, halves.model, count(*) AS pairs, avg(halves.logp - rejected.logp) AS mean_margin,
        stddev_samp(halves.logp - rejected.logp) AS spread, avg((halves.logp > rejected.logp)::INTEGER) AS already_right
    FROM halves JOIN scored AS rejected ON rejected.candidate_id = rejected_id AND rejected.model = halves.model
    GROUP BY stage, key, rule, halves.model
)
SELECT run, step, rule, left(model, 12) AS model, pairs, mean_margin, spread, already_right
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step, rule, model

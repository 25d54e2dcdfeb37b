-- What the frozen reference makes of each pair: the chosen response's log-prob minus the rejected one's, nats, by rule.
-- Side by side: a plan that joined the sides first would join them on the model alone, of which there may be just one.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), scored AS (
    SELECT candidate_id, model, any_value(logp) AS logp FROM reference GROUP BY candidate_id, model
), halves AS MATERIALIZED (
    SELECT pairs.stage, pairs.key, rule, rejected_id, model, logp FROM pairs JOIN scored ON candidate_id = chosen_id
), told AS (
    SELECT stage, key, rule, halves.model, count(*) AS pairs, avg(halves.logp - rejected.logp) AS mean_margin,
        stddev_samp(halves.logp - rejected.logp) AS spread, avg((halves.logp > rejected.logp)::INTEGER) AS already_right
    FROM halves JOIN scored AS rejected ON rejected.candidate_id = rejected_id AND rejected.model = halves.model
    GROUP BY stage, key, rule, halves.model
)
SELECT run, step, rule, left(model, 12) AS model, pairs, mean_margin, spread, already_right
FROM told JOIN named USING (stage, key)
ORDER BY run, step, rule, model

-- What the frozen reference makes of each pair: the chosen response's log-prob minus the rejected one's, nats, by rule.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), scored AS (
    SELECT candidate_id, model, any_value(logp) AS logp FROM reference GROUP BY candidate_id, model
), told AS (
    SELECT pairs.stage, pairs.key, rule, chosen.model, count(*) AS pairs, avg(chosen.logp - rejected.logp) AS mean_margin,
        stddev_samp(chosen.logp - rejected.logp) AS spread, avg((chosen.logp > rejected.logp)::INTEGER) AS already_right
    FROM pairs JOIN scored AS chosen ON chosen.candidate_id = chosen_id
    JOIN scored AS rejected ON rejected.candidate_id = rejected_id AND rejected.model = chosen.model
    GROUP BY pairs.stage, pairs.key, rule, chosen.model
)
SELECT run, step, rule, left(model, 12) AS model, pairs, mean_margin, spread, already_right
FROM told JOIN named USING (stage, key)
ORDER BY run, step, rule, model

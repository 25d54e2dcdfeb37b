-- Do direct comparisons of two candidates agree with their rewards? Share by distance of the rewards, in nats.
-- One side after the other: a plan that joined both sides of `scored` first would do so on the key, and there may be only one.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), scored AS (
    SELECT stage, key, candidate_id, reward FROM rewards
    WHERE candidate_id IN (SELECT left_id FROM comparisons UNION ALL SELECT right_id FROM comparisons)
), halves AS MATERIALIZED (
    SELECT comparisons.stage, comparisons.key, right_id, logit, scored.key AS rewards_key, reward
    FROM comparisons JOIN scored ON candidate_id = left_id
    WHERE (comparisons.key, scored.key) IN (SELECT (left_run.key, right_run.key) FROM runs AS left_run JOIN runs AS right_run USING (run))
), summary AS (
    SELECT halves.stage, halves.key, logit, rewards_key, halves.reward - other.reward AS difference
    FROM halves JOIN scored AS other ON other.candidate_id = right_id AND other.key = rewards_key
)
SELECT run, step, rewards_key, CASE WHEN abs(difference) < 0.5 THEN 'less than 0.5' WHEN abs(difference) < 1 THEN '0.5 to 1'
        WHEN abs(difference) < 2 THEN '1 to 2' ELSE '2 or more' END AS nats_apart,
    count(*) AS comparisons, avg((sign(logit) = sign(difference))::INTEGER) AS agree, avg(abs(logit)) AS mean_logit
FROM summary JOIN step_names USING (stage, key)
WHERE difference <> 0
GROUP BY run, step, rewards_key, nats_apart
ORDER BY run, step, rewards_key, min(abs(difference))

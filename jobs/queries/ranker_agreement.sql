-- Does a direct comparison of two candidates say what their rewards say? Agreement by how far apart the rewards are.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), scored AS (
    SELECT stage, key, candidate_id, reward FROM rewards
    WHERE candidate_id IN (SELECT left_id FROM comparisons UNION ALL SELECT right_id FROM comparisons)
), told AS (
    SELECT comparisons.stage, comparisons.key, better.key AS rewards_key, logit, better.reward - other.reward AS difference
    FROM comparisons JOIN scored AS better ON better.candidate_id = left_id
    JOIN scored AS other ON other.candidate_id = right_id AND other.key = better.key
    WHERE (comparisons.key, better.key) IN (SELECT (ours.key, theirs.key) FROM runs AS ours JOIN runs AS theirs USING (run))
)
SELECT run, step, rewards_key, CASE WHEN abs(difference) < 0.5 THEN 'less than 0.5' WHEN abs(difference) < 1 THEN '0.5 to 1'
        WHEN abs(difference) < 2 THEN '1 to 2' ELSE '2 or more' END AS nats_apart,
    count(*) AS comparisons, avg((sign(logit) = sign(difference))::INTEGER) AS agree, avg(abs(logit)) AS mean_logit
FROM told JOIN named USING (stage, key)
WHERE difference <> 0
GROUP BY run, step, rewards_key, nats_apart
ORDER BY run, step, rewards_key, min(abs(difference))

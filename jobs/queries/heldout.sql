-- Loss and accuracy of trained models on held-out examples, such as the ranker on held-out pairs.
-- longer_one: the share of these pairs whose chosen response has more tokens, one half where both have as many.
WITH trained AS (
    SELECT run || coalesce('@' || round, '') AS run, step, stage, key, steps.inputs ->> 'heldout' AS examples
    FROM runs JOIN steps USING (stage, key)
),
measured AS (
    SELECT run, trained.step, stage, key, replace(metric, 'heldout/', '') AS metric, value
    FROM trained JOIN metrics USING (stage, key) LEFT JOIN policies USING (stage, key)
    WHERE starts_with(metric, 'heldout/') AND metrics.step = coalesce(policies.steps, metrics.step) -- of what was saved
),
sides AS (
    SELECT key, steps.inputs ->> 'candidates' AS origin, responses[pair.chosen + 1].candidate_id AS chosen,
           responses[pair.rejected + 1].candidate_id AS rejected
    FROM (SELECT key, responses, unnest(pairs) AS pair FROM examples
          WHERE key IN (SELECT examples FROM trained)) JOIN steps USING (key)
),
longer AS (
    SELECT sides.key, avg(CASE WHEN a.n_tokens = b.n_tokens THEN 0.5 ELSE (a.n_tokens > b.n_tokens)::INT END) AS value
    FROM sides
    JOIN candidates AS a ON a.key = origin AND a.candidate_id = chosen
    JOIN candidates AS b ON b.key = origin AND b.candidate_id = rejected
    GROUP BY sides.key
)
SELECT min(run) AS run, step, metric, any_value(value) AS value
FROM (
    SELECT * FROM measured WHERE metric IN ('loss', 'token_accuracy', 'accuracy')
    UNION ALL
    SELECT run, step, stage, trained.key, 'longer_one', value
    FROM trained JOIN longer ON longer.key = trained.examples
)
GROUP BY stage, key, step, metric
ORDER BY run, step, metric

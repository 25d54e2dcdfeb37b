-- Loss and accuracy of trained models on held-out examples, such as the ranker on held-out pairs.
SELECT min(run) AS run, step, metric, any_value(value) AS value
FROM (SELECT run || coalesce('@' || round, '') AS run, runs.step, stage, key, replace(metric, 'heldout/', '') AS metric, value
      FROM runs JOIN metrics USING (stage, key) WHERE starts_with(metric, 'heldout/'))
WHERE metric IN ('loss', 'token_accuracy', 'accuracy')
GROUP BY stage, key, step, metric
ORDER BY run, step, metric

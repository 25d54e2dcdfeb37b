-- One row a trained policy that was measured on held-out preferences and on held-out demonstrations.
SELECT
    CASE runs.step WHEN 'optimize' THEN run || coalesce('@' || round, '') ELSE runs.step END AS policy,
    any_value(value) FILTER (metric = 'heldout/loss') AS preference_loss,
    any_value(value) FILTER (metric = 'heldout/imitation/loss') AS imitation_loss,
    any_value(value) FILTER (metric = 'heldout/accuracy') AS preference_accuracy
FROM runs JOIN metrics USING (stage, key)
GROUP BY ALL
HAVING preference_loss IS NOT NULL AND imitation_loss IS NOT NULL
ORDER BY policy

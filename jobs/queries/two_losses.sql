-- Held-out losses of the policies that were measured on preferences and on demonstrations, one row per policy.
-- A step other than `optimize` is named by its step, followed by its run if several policies have that name.
WITH measured AS (
    SELECT
        min(CASE runs.step WHEN 'optimize' THEN run || coalesce('@' || round, '') ELSE runs.step END) AS name,
        min(run || coalesce('@' || round, '')) AS run,
        any_value(value) FILTER (metric = 'heldout/loss') AS preference_loss,
        any_value(value) FILTER (metric = 'heldout/imitation/loss') AS imitation_loss,
        any_value(value) FILTER (metric = 'heldout/accuracy') AS preference_accuracy
    FROM runs JOIN metrics USING (stage, key) LEFT JOIN policies USING (stage, key)
    WHERE metrics.step = coalesce(policies.steps, metrics.step) -- of what was saved, not of evaluations during training
    GROUP BY stage, key
    HAVING preference_loss IS NOT NULL AND imitation_loss IS NOT NULL
)
SELECT
    name || CASE WHEN count(*) OVER (PARTITION BY name) > 1 THEN ' (' || run || ')' ELSE '' END AS policy,
    preference_loss, imitation_loss, preference_accuracy
FROM measured
ORDER BY policy

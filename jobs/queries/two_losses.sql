-- Held-out losses of policies that were measured on preferences and on demonstrations, over seeds, and their cost.
-- One row per policy; those that differ in seeds alone are one. A step other than `optimize` is named by its step, followed by its run if several have that name. _se: standard error over seeds. distance: 0 has both losses as low as each objective reaches alone, 1 has one of them as high as the other objective alone leaves it; of runs with the same start, data and options (mix `joint` with weights 1 and 0), whatever else the store holds. seconds: of the training. optima_seconds: of the trainings whose optima it reads. cost: both together over the training.
WITH measured AS (
    SELECT stage, key,
        any_value(value) FILTER (metric = 'heldout/loss') AS preference_loss,
        any_value(value) FILTER (metric = 'heldout/imitation/loss') AS imitation_loss,
        any_value(value) FILTER (metric = 'heldout/accuracy') AS preference_accuracy
    FROM metrics LEFT JOIN policies USING (stage, key)
    WHERE metrics.step = coalesce(policies.steps, metrics.step) -- of what was saved, not of evaluations during training
    GROUP BY stage, key
    HAVING preference_loss IS NOT NULL AND imitation_loss IS NOT NULL
),
trained AS (
    SELECT measured.*, steps.seconds,
        options ->> '$.mix.name' AS mix, (options ->> '$.mix.weight')::DOUBLE AS weight,
        coalesce(optima.seconds, 0) AS optima_seconds,
        -- What trainings of one table have in common: all but the mix, and the optima that it reads.
        json_merge_patch(options, '{"mix": null}') || json_merge_patch(
            inputs, '{"preference_optimum": null, "imitation_optimum": null}'
        ) AS setting,
        md5(json_merge_patch(options, '{"seed": null, "mix": {"weight": null}}') || json_merge_patch(
            inputs, '{"preference_optimum": null, "imitation_optimum": null}'
        )) AS front
    FROM measured JOIN steps USING (stage, key) LEFT JOIN (
        SELECT reader.stage, reader.key, sum(optimum.seconds) AS seconds
        FROM steps AS reader JOIN steps AS optimum
            ON optimum.key IN (reader.inputs ->> 'preference_optimum', reader.inputs ->> 'imitation_optimum')
        GROUP BY ALL
    ) AS optima USING (stage, key)
),
alone AS (
    SELECT setting,
        min(preference_loss) FILTER (weight = 1) AS best_preference, min(imitation_loss) FILTER (weight = 0) AS best_imitation,
        min(preference_loss) FILTER (weight = 0) AS worst_preference, min(imitation_loss) FILTER (weight = 1) AS worst_imitation
    FROM trained WHERE mix = 'joint' AND weight IN (0, 1)
    GROUP BY setting
),
named AS (
    SELECT stage, key, min(coalesce(method, key)) AS method,
        min(CASE step WHEN 'optimize' THEN run || coalesce('@' || round, '') ELSE step END) AS name,
        min(run || coalesce('@' || round, '')) AS run
    FROM runs GROUP BY stage, key
),
policies_of_methods AS (
    SELECT method, count(*) AS seeds, min(name) AS name, min(run) AS run, any_value(front) AS front,
        any_value(mix) AS mix, any_value(weight) AS weight,
        avg(preference_loss) AS preference_loss, stddev_samp(preference_loss) / sqrt(count(*)) AS preference_loss_se,
        avg(imitation_loss) AS imitation_loss, stddev_samp(imitation_loss) / sqrt(count(*)) AS imitation_loss_se,
        avg(preference_accuracy) AS preference_accuracy,
        avg(distance) AS distance, stddev_samp(distance) / sqrt(count(*)) AS distance_se,
        avg(best_preference) AS ideal_preference_loss, avg(best_imitation) AS ideal_imitation_loss,
        avg(seconds) AS seconds, avg(optima_seconds) AS optima_seconds
    FROM (
        SELECT *, CASE WHEN worst_preference > best_preference AND worst_imitation > best_imitation THEN sqrt(
            pow((preference_loss - best_preference) / (worst_preference - best_preference), 2)
            + pow((imitation_loss - best_imitation) / (worst_imitation - best_imitation), 2)
        ) END AS distance
        FROM trained JOIN named USING (stage, key) LEFT JOIN alone USING (setting)
    )
    GROUP BY method
)
SELECT
    name || CASE WHEN count(*) OVER (PARTITION BY name) > 1 THEN ' (' || run || ')' ELSE '' END AS policy,
    * EXCLUDE (method, name, run, front),
    (seconds + optima_seconds) / nullif(seconds, 0) AS cost, front
FROM policies_of_methods
ORDER BY policy

-- Acceptance rate and effective sample size of each prompt's selection, the lowest first.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), selected AS (
    SELECT stage, key, prompt_id, count(*) AS kept, max(round) + 1 AS passes, any_value(beta) AS beta,
        any_value(acceptance) AS acceptance, any_value(ess) AS ess, avg(reward) AS mean_reward
    FROM selections GROUP BY stage, key, prompt_id
)
SELECT run, step, prompt_id, kept, passes, beta, acceptance, ess, mean_reward
FROM selected JOIN step_names USING (stage, key)
ORDER BY acceptance NULLS LAST, ess NULLS LAST, run, step, prompt_id

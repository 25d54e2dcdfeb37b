-- Does the ranker prefer length? Correlation of reward and tokens, over all candidates and within prompts.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), lengths AS (
    SELECT prompt_id, candidate_id, any_value(n_tokens) AS n FROM candidates GROUP BY prompt_id, candidate_id
), per_prompt AS (
    SELECT rewards.stage, rewards.key, count(*) AS m, sum(n) AS x, sum(reward) AS y, sum(n * n) AS xx,
        sum(reward * reward) AS yy, sum(n * reward) AS xy,
        count(*) * covar_pop(n, reward) AS within_xy, count(*) * var_pop(n) AS within_xx, count(*) * var_pop(reward) AS within_yy
    FROM rewards JOIN lengths USING (prompt_id, candidate_id)
    GROUP BY rewards.stage, rewards.key, prompt_id
), summary AS (
    SELECT stage, key, count(*) AS prompts, sum(m)::BIGINT AS candidates, sum(x) / sum(m) AS mean_tokens, sum(y) / sum(m) AS mean_reward,
        (sum(xy) - sum(x) * sum(y) / sum(m)) / nullif(sqrt(
            greatest(sum(xx) - sum(x) ** 2 / sum(m), 0) * greatest(sum(yy) - sum(y) ** 2 / sum(m), 0)), 0) AS overall,
        sum(within_xy) / nullif(sqrt(sum(within_xx) * sum(within_yy)), 0) AS within_prompts
    FROM per_prompt GROUP BY stage, key
)
SELECT run, step, prompts, candidates, mean_tokens, mean_reward, overall, within_prompts
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step

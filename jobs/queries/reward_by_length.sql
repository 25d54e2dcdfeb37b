-- Does the ranker like length? Correlation of reward and tokens, over all candidates and within a prompt's own.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), lengths AS (
    SELECT prompt_id, candidate_id, any_value(n_tokens) AS n FROM candidates GROUP BY prompt_id, candidate_id
), prompts_own AS (
    SELECT rewards.stage, rewards.key, count(*) AS m, sum(n) AS x, sum(reward) AS y, sum(n * n) AS xx,
        sum(reward * reward) AS yy, sum(n * reward) AS xy,
        count(*) * covar_pop(n, reward) AS within_xy, count(*) * var_pop(n) AS within_xx, count(*) * var_pop(reward) AS within_yy
    FROM rewards JOIN lengths USING (prompt_id, candidate_id)
    GROUP BY rewards.stage, rewards.key, prompt_id
), told AS (
    SELECT stage, key, count(*) AS prompts, sum(m)::BIGINT AS candidates, sum(x) / sum(m) AS mean_tokens, sum(y) / sum(m) AS mean_reward,
        (sum(xy) - sum(x) * sum(y) / sum(m)) / nullif(sqrt(
            greatest(sum(xx) - sum(x) ** 2 / sum(m), 0) * greatest(sum(yy) - sum(y) ** 2 / sum(m), 0)), 0) AS overall,
        sum(within_xy) / nullif(sqrt(sum(within_xx) * sum(within_yy)), 0) AS within_prompts
    FROM prompts_own GROUP BY stage, key
)
SELECT run, step, prompts, candidates, mean_tokens, mean_reward, overall, within_prompts
FROM told JOIN named USING (stage, key)
ORDER BY run, step

-- Strength of the selection, by the rewards that it read, averaged over prompts; choose one run with --run.
SELECT count(DISTINCT prompt_id) AS prompts, count(*) AS kept, avg(reward) AS mean_reward_kept,
    (SELECT avg(reward) FROM rewards WHERE key IN (SELECT inputs ->> 'rewards' FROM steps WHERE stage = 'select')) AS mean_reward_all,
    avg(acceptance) AS first_pass_acceptance, avg(ess) AS effective_sample_size, max(round) + 1 AS passes
FROM selections HAVING count(*) > 0

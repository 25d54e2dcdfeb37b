-- Every run beside the SFT policy: wins, gold reward, KL and length on held-out prompts, and the seconds it took.
-- A round is a row of its own (rest@2). seconds: of work in all steps of the run; own_seconds: in those that no other run shares.
WITH costs AS (
    SELECT run, sum(seconds) AS seconds, coalesce(sum(seconds) FILTER (owners = 1), 0) AS own_seconds
    FROM (SELECT *, count(*) OVER (PARTITION BY stage, key) AS owners FROM (SELECT DISTINCT run, stage, key FROM runs))
    JOIN steps USING (stage, key)
    GROUP BY run
)
SELECT
    run || coalesce('@' || round, '') AS run,
    any_value(printf('%.1f %% [%.1f, %.1f]', 100 * value, 100 * low, 100 * high)) FILTER (metric = 'gold_win') AS gold_win,
    any_value(printf('%.1f %% [%.1f, %.1f]', 100 * value, 100 * low, 100 * high)) FILTER (metric = 'proxy_win') AS proxy_win,
    any_value(printf('%.2f [%.2f, %.2f]', value, low, high)) FILTER (metric = 'gold') AS gold_reward,
    any_value(printf('%.1f', value)) FILTER (metric = 'kl') AS kl_nats,
    any_value(printf('%.1f', value)) FILTER (metric = 'n_tokens') AS tokens,
    any_value(n) AS prompts,
    any_value(printf('%.1f', seconds)) AS seconds,
    any_value(printf('%.1f', own_seconds)) AS own_seconds
FROM runs JOIN evaluations USING (stage, key) JOIN costs USING (run)
GROUP BY runs.run, round
ORDER BY any_value(value) FILTER (metric = 'gold_win') DESC, any_value(value) FILTER (metric = 'proxy_win') DESC,
    runs.run, round

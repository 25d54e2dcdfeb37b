-- One row a run: wins, gold reward, KL and length against the SFT policy on held-out prompts.
SELECT
    run,
    any_value(printf('%.1f %% [%.1f, %.1f]', 100 * value, 100 * low, 100 * high)) FILTER (metric = 'gold_win') AS gold_win,
    any_value(printf('%.1f %% [%.1f, %.1f]', 100 * value, 100 * low, 100 * high)) FILTER (metric = 'proxy_win') AS proxy_win,
    any_value(printf('%.2f [%.2f, %.2f]', value, low, high)) FILTER (metric = 'gold') AS gold_reward,
    any_value(printf('%.1f', value)) FILTER (metric = 'kl') AS kl_nats,
    any_value(printf('%.1f', value)) FILTER (metric = 'n_tokens') AS tokens,
    any_value(n) AS prompts
FROM runs JOIN evaluations USING (stage, key)
GROUP BY run
ORDER BY any_value(value) FILTER (metric = 'gold_win') DESC, any_value(value) FILTER (metric = 'proxy_win') DESC, run

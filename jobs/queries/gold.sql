-- Gold reward of every run on held-out prompts: of its policy, of the SFT policy, and the gain, paired by prompt.
-- _low and _high are 95 % intervals. Of a reward of 0 and 1, the first two are shares of right responses.
SELECT
    run || coalesce('@' || round, '') AS run,
    any_value(value) FILTER (metric = 'gold') AS policy,
    any_value(low) FILTER (metric = 'gold') AS policy_low,
    any_value(high) FILTER (metric = 'gold') AS policy_high,
    any_value(value) FILTER (metric = 'gold_baseline') AS sft,
    any_value(low) FILTER (metric = 'gold_baseline') AS sft_low,
    any_value(high) FILTER (metric = 'gold_baseline') AS sft_high,
    any_value(value) FILTER (metric = 'gold_gain') AS gain,
    any_value(low) FILTER (metric = 'gold_gain') AS gain_low,
    any_value(high) FILTER (metric = 'gold_gain') AS gain_high,
    max(n) AS prompts
FROM runs JOIN evaluations USING (stage, key)
WHERE metric IN ('gold', 'gold_baseline', 'gold_gain') AND NOT starts_with(step, 'evaluate_')
GROUP BY runs.run, round
ORDER BY gain DESC, runs.run, round

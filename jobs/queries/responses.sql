-- Three held-out prompts: the SFT policy's response beside the trained policy's.
WITH texts AS (SELECT candidate_id, any_value(text) AS text FROM candidates GROUP BY candidate_id)
SELECT any_value(prompts.text) AS prompt, base.text AS baseline, ours.text AS response, gold_baseline, gold
FROM outcomes JOIN prompts USING (prompt_id)
JOIN texts AS ours ON ours.candidate_id = outcomes.candidate_id
JOIN texts AS base ON base.candidate_id = outcomes.baseline_id
WHERE outcomes.k = 0
GROUP BY prompt_id, base.text, ours.text, gold_baseline, gold
ORDER BY prompt_id
LIMIT 3

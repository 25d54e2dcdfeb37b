-- Three held-out prompts with the responses of the SFT policy and the trained policy; choose one run with --run.
WITH sampled AS (SELECT * FROM outcomes WHERE k = 0 ORDER BY prompt_id, stage, key LIMIT 3),
texts AS (
    SELECT candidate_id, any_value(coalesce(raw_text, text)) AS text FROM candidates
    WHERE candidate_id IN (SELECT candidate_id FROM sampled UNION ALL SELECT baseline_id FROM sampled)
    GROUP BY candidate_id
),
prompt_texts AS (
    SELECT prompt_id, any_value(text) AS text FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM sampled) GROUP BY prompt_id
)
SELECT prompt_texts.text AS prompt, base.text AS baseline, policy.text AS response, gold_baseline, gold
FROM sampled JOIN prompt_texts USING (prompt_id)
JOIN texts AS policy ON policy.candidate_id = sampled.candidate_id
JOIN texts AS base ON base.candidate_id = sampled.baseline_id
ORDER BY prompt_id, sampled.stage, sampled.key

-- Three held-out prompts with the responses of the SFT policy and the trained policy; choose one run with --run.
-- gold_baseline is the mean of all of the SFT policy's responses to the prompt.
WITH sampled AS (
    SELECT outcomes.*, min(baseline_id) AS baseline_id
    FROM outcomes JOIN steps USING (stage, key)
    LEFT JOIN judgements ON judgements.key = steps.inputs ->> 'judgements' -- not those of the other judges of a config
        AND judgements.prompt_id = outcomes.prompt_id AND judgements.candidate_id = outcomes.candidate_id
    WHERE outcomes.k = 0 AND (outcomes.stage, outcomes.key) IN (SELECT (stage, key) FROM runs WHERE NOT starts_with(step, 'evaluate_')) GROUP BY ALL ORDER BY prompt_id, outcomes.stage, outcomes.key LIMIT 3
),
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
LEFT JOIN texts AS base ON base.candidate_id = sampled.baseline_id
ORDER BY prompt_id, sampled.stage, sampled.key

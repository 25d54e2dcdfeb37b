-- Three held-out prompts with the SFT policy's response beside the trained policy's, for one run by --run.
WITH shown AS (SELECT * FROM outcomes WHERE k = 0 ORDER BY prompt_id, stage, key LIMIT 3),
texts AS (
    SELECT candidate_id, any_value(text) AS text FROM candidates
    WHERE candidate_id IN (SELECT candidate_id FROM shown UNION ALL SELECT baseline_id FROM shown)
    GROUP BY candidate_id
),
asked AS (
    SELECT prompt_id, any_value(text) AS text FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM shown) GROUP BY prompt_id
)
SELECT asked.text AS prompt, base.text AS baseline, ours.text AS response, gold_baseline, gold
FROM shown JOIN asked USING (prompt_id)
JOIN texts AS ours ON ours.candidate_id = shown.candidate_id
JOIN texts AS base ON base.candidate_id = shown.baseline_id
ORDER BY prompt_id, shown.stage, shown.key

-- Training prompts without a pair, in runs that form pairs of candidates, with the reasons of their rejects.
WITH steps_of_runs AS (SELECT DISTINCT run, stage, key FROM runs),
selected_by AS ( -- of several rewards, the one that counts, where it has the prompt
    SELECT DISTINCT run, inputs ->> 'rewards' AS key, true AS counts
    FROM steps JOIN steps_of_runs USING (stage, key) WHERE stage = 'select'
),
scored AS (
    SELECT run, prompt_id, coalesce(sum(n) FILTER (counts), max(n))::BIGINT AS candidates,
        max(high) FILTER (counts) - min(low) FILTER (counts) AS spread
    FROM (SELECT stage, key, prompt_id, count(*) AS n, min(reward) AS low, max(reward) AS high FROM rewards GROUP BY ALL)
    JOIN steps_of_runs USING (stage, key) LEFT JOIN selected_by USING (run, key) GROUP BY run, prompt_id
),
selected AS (SELECT run, prompt_id, count(*) AS kept FROM selections JOIN steps_of_runs USING (stage, key) GROUP BY run, prompt_id),
paired AS (SELECT DISTINCT run, prompt_id FROM pairs JOIN steps_of_runs USING (stage, key)),
reasons AS (
    SELECT run, prompt_id, string_agg(DISTINCT reason, ', ' ORDER BY reason) AS reject_reasons
    FROM rejects JOIN steps_of_runs USING (stage, key) WHERE prompt_id IS NOT NULL GROUP BY run, prompt_id
),
texts AS (SELECT prompt_id, any_value(text) AS text FROM prompts WHERE split = 'train' GROUP BY prompt_id)
SELECT run, prompt_id, candidates, coalesce(kept, 0) AS kept, spread, reject_reasons, text
FROM scored JOIN texts USING (prompt_id) LEFT JOIN selected USING (run, prompt_id) LEFT JOIN reasons USING (run, prompt_id)
ANTI JOIN paired USING (run, prompt_id)
WHERE run IN (SELECT run FROM paired SEMI JOIN scored USING (run, prompt_id))
ORDER BY run, prompt_id

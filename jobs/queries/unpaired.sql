-- Training prompts whose candidates made no pair, in runs that make pairs of candidates: what was kept and left out.
WITH own AS (SELECT DISTINCT run, stage, key FROM runs),
scored AS (
    SELECT run, prompt_id, sum(n)::BIGINT AS candidates, max(high) - min(low) AS spread
    FROM (SELECT stage, key, prompt_id, count(*) AS n, min(reward) AS low, max(reward) AS high FROM rewards GROUP BY ALL)
    JOIN own USING (stage, key) GROUP BY run, prompt_id
),
kept AS (SELECT run, prompt_id, count(*) AS kept FROM selections JOIN own USING (stage, key) GROUP BY run, prompt_id),
paired AS (SELECT DISTINCT run, prompt_id FROM pairs JOIN own USING (stage, key)),
why AS (
    SELECT run, prompt_id, string_agg(DISTINCT reason, ', ' ORDER BY reason) AS left_out
    FROM rejects JOIN own USING (stage, key) WHERE prompt_id IS NOT NULL GROUP BY run, prompt_id
),
texts AS (SELECT prompt_id, any_value(text) AS text FROM prompts WHERE split = 'train' GROUP BY prompt_id)
SELECT run, prompt_id, candidates, coalesce(kept, 0) AS kept, spread, left_out, text
FROM scored JOIN texts USING (prompt_id) LEFT JOIN kept USING (run, prompt_id) LEFT JOIN why USING (run, prompt_id)
ANTI JOIN paired USING (run, prompt_id)
WHERE run IN (SELECT run FROM paired SEMI JOIN scored USING (run, prompt_id))
ORDER BY run, prompt_id

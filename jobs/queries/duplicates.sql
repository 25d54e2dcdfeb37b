-- How many candidates are twins, the same tokens drawn again for the same prompt, by step.
WITH named AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), responses AS (
    SELECT stage, key, list_histogram(list(hash(token_ids))) AS copies FROM candidates GROUP BY stage, key, prompt_id
), prompts_own AS (
    SELECT stage, key, cardinality(copies) AS different, list_sum(map_values(copies)) AS n, list_max(map_values(copies)) AS most
    FROM responses
), told AS (
    SELECT stage, key, count(*) AS prompts, sum(n)::BIGINT AS candidates, sum(different)::BIGINT AS different,
        1 - sum(different) / sum(n) AS twins, count(*) FILTER (different < n) AS prompts_with_twins,
        count(*) FILTER (different = 1 AND n > 1) AS prompts_all_alike, max(most)::BIGINT AS most_of_one
    FROM prompts_own GROUP BY stage, key
)
SELECT run, step, prompts, candidates, different, twins, prompts_with_twins, prompts_all_alike, most_of_one
FROM told JOIN named USING (stage, key)
ORDER BY run, step

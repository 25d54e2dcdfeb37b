-- Duplicates by step: share of candidates that repeat the tokens of another candidate of the same prompt.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), responses AS (
    SELECT stage, key, list_histogram(list(hash(token_ids))) AS copies FROM candidates GROUP BY stage, key, prompt_id
), prompt_counts AS (
    SELECT stage, key, cardinality(copies) AS different, list_sum(map_values(copies)) AS n, list_max(map_values(copies)) AS most
    FROM responses
), summary AS (
    SELECT stage, key, count(*) AS prompts, sum(n)::BIGINT AS candidates, sum(different)::BIGINT AS different,
        1 - sum(different) / sum(n) AS duplicates, count(*) FILTER (different < n) AS prompts_with_duplicates,
        count(*) FILTER (different = 1 AND n > 1) AS prompts_all_alike, max(most)::BIGINT AS most_of_one
    FROM prompt_counts GROUP BY stage, key
)
SELECT run, step, prompts, candidates, different, duplicates, prompts_with_duplicates, prompts_all_alike, most_of_one
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step

-- The fifty held-out prompts on which the ranker (proxy) and the gold reward disagree most.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), summary AS (
    SELECT stage, key, prompt_id, count(*) AS responses, avg(proxy_win) AS proxy_win, avg(gold_win) AS gold_win,
        avg(gold - gold_baseline) AS gold_gain
    FROM outcomes WHERE gold_win IS NOT NULL GROUP BY stage, key, prompt_id
), texts AS (SELECT prompt_id, any_value(text) AS text FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM summary) GROUP BY prompt_id)
SELECT run, prompt_id, responses, proxy_win, gold_win, proxy_win - gold_win AS too_kind, gold_gain, text
FROM summary JOIN step_names USING (stage, key) LEFT JOIN texts USING (prompt_id)
WHERE proxy_win <> gold_win AND NOT starts_with(step, 'evaluate_')
ORDER BY abs(too_kind) DESC, too_kind DESC, run, prompt_id
LIMIT 50

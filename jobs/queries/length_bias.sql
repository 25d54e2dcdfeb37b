-- Are chosen responses longer? Mean tokens of chosen and rejected by rule, and how often the longer one was chosen.
WITH step_names AS (SELECT stage, key, min(run || coalesce('@' || round, '')) AS run, min(step) AS step FROM runs GROUP BY stage, key), lengths AS (
    SELECT candidate_id, any_value(n_tokens) AS n FROM candidates
    WHERE candidate_id IN (SELECT chosen_id FROM pairs UNION ALL SELECT rejected_id FROM pairs)
    GROUP BY candidate_id
), summary AS (
    SELECT pairs.stage, pairs.key, rule, count(*) AS pairs, avg(chosen.n) AS chosen_tokens, avg(rejected.n) AS rejected_tokens,
        avg((chosen.n > rejected.n)::INTEGER) FILTER (chosen.n <> rejected.n) AS longer_chosen,
        corr(gap, chosen.n - rejected.n) AS gap_and_length
    FROM pairs JOIN lengths AS chosen ON chosen.candidate_id = chosen_id
    JOIN lengths AS rejected ON rejected.candidate_id = rejected_id
    GROUP BY pairs.stage, pairs.key, rule
)
SELECT run, step, rule, pairs, chosen_tokens, rejected_tokens, longer_chosen, gap_and_length
FROM summary JOIN step_names USING (stage, key)
ORDER BY run, step, rule

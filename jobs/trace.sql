-- sampled: best, middle and worst by the reward that selects
WITH selected_by AS (SELECT inputs ->> 'rewards' AS key FROM steps WHERE stage = 'select')
SELECT candidate_id, k, round(reward, 3) AS reward, n_tokens, finish_reason, coalesce(raw_text, text) AS text
FROM candidates JOIN rewards USING (prompt_id, candidate_id)
WHERE prompt_id = {prompt_id} AND (rewards.key IN (SELECT key FROM selected_by) OR NOT EXISTS (SELECT 1 FROM selected_by))
QUALIFY row_number() OVER (ORDER BY reward DESC) IN (1, 2, 3, count(*) OVER () // 2, count(*) OVER ())
ORDER BY reward DESC

-- selected, in order of acceptance
SELECT draw, round AS pass, candidate_id, round(reward, 3) AS reward, round(acceptance, 3) AS acceptance,
    round(ess, 1) AS ess, any_value(coalesce(raw_text, text)) AS text
FROM selections JOIN candidates USING (prompt_id, candidate_id)
WHERE prompt_id = {prompt_id}
GROUP BY ALL
ORDER BY draw

-- compared by the ranker
SELECT round, left_id, right_id, round(logit, 3) AS logit
FROM comparisons
WHERE prompt_id = {prompt_id}
ORDER BY ALL

-- pairs
SELECT rule, chosen_id, rejected_id, round(gap, 3) AS gap
FROM pairs
WHERE prompt_id = {prompt_id}
ORDER BY gap DESC

-- responses of pairs that no reward or selection shows above
SELECT response, candidate_id, n_tokens, coalesce(raw_text, text) AS text
FROM (
    SELECT DISTINCT prompt_id, 'chosen' AS response, chosen_id AS candidate_id FROM pairs
    UNION ALL
    SELECT DISTINCT prompt_id, 'rejected' AS response, rejected_id AS candidate_id FROM pairs
) JOIN candidates USING (prompt_id, candidate_id)
WHERE prompt_id = {prompt_id}
    AND candidate_id NOT IN (SELECT candidate_id FROM selections WHERE prompt_id = {prompt_id})
    AND candidate_id NOT IN (SELECT candidate_id FROM rewards WHERE prompt_id = {prompt_id})
ORDER BY ALL

-- reference log-probs
SELECT candidate_id, round(logp, 3) AS logp, n_tokens, dtype, left(model, 12) AS model
FROM reference
WHERE prompt_id = {prompt_id}
ORDER BY logp DESC

-- training example
SELECT len(prompt_ids) AS prompt_tokens, len(responses) AS responses, len(pairs) AS pairs
FROM examples
WHERE prompt_id = {prompt_id}

-- held-out prompt: the policy compared with the baseline
SELECT k, proxy_win, gold_win, round(gold, 2) AS gold, round(gold_baseline, 2) AS gold_baseline, round(kl, 2) AS kl,
    any_value(coalesce(raw_text, text)) AS text
FROM outcomes JOIN candidates USING (prompt_id, candidate_id, k)
WHERE prompt_id = {prompt_id}
GROUP BY ALL
ORDER BY k

-- rejected
SELECT stage, reason, candidate_id, place, detail
FROM rejects
WHERE prompt_id = {prompt_id}
ORDER BY ALL

-- Pairs of one step of each table, by its key, in the order of their ids. `position` orders duplicates of a pair in the data.
WITH flat AS (
    SELECT prompt_id, prompt_ids, responses, unnest(pairs) AS pair, generate_subscripts(pairs, 1) AS position
    FROM examples WHERE key = '{examples}'
), sides AS (
    SELECT *, responses[pair.chosen + 1] AS chosen, responses[pair.rejected + 1] AS rejected,
        responses[pair.chosen + 1].candidate_id AS chosen_id, responses[pair.rejected + 1].candidate_id AS rejected_id
    FROM flat
), origins AS (
    SELECT prompt_id, chosen_id, rejected_id, max(gap) AS gap, max(rule) AS rule FROM pairs WHERE key = '{pairs}' GROUP BY ALL
), prompt_texts AS (
    SELECT prompt_id, text, chat FROM prompts WHERE key = '{prompts}'
), scores AS (
    SELECT candidate_id, reward FROM rewards WHERE key = '{rewards}'
)
SELECT prompt_id, chosen_id, rejected_id, text, chat, prompt_ids,
    chosen.token_ids AS chosen_ids, rejected.token_ids AS rejected_ids, chosen.mask AS chosen_mask,
    rejected.mask AS rejected_mask, pair.weight, pair.label, gap, rule,
    winner.reward AS chosen_reward, loser.reward AS rejected_reward,
    chosen.ref_logp AS ref_chosen_logps, rejected.ref_logp AS ref_rejected_logps
FROM sides
JOIN prompt_texts USING (prompt_id)
LEFT JOIN origins USING (prompt_id, chosen_id, rejected_id)
LEFT JOIN scores AS winner ON winner.candidate_id = chosen_id
LEFT JOIN scores AS loser ON loser.candidate_id = rejected_id
ORDER BY prompt_id, chosen_id, rejected_id, position

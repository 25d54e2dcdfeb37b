-- Where the time of each run went: rows, seconds, cost, tokens and ranker calls by stage, the dearest first.
SELECT run, stage, count(*) AS steps, sum(rows)::BIGINT AS rows, sum(rejects)::BIGINT AS rejects, sum(seconds) AS seconds,
    sum(wall_seconds) AS wall_seconds, sum(cost) AS cost,
    sum(cost) / nullif(sum(sum(cost)) OVER (PARTITION BY run), 0) AS share,
    sum(tokens)::BIGINT AS tokens, sum(ranker_calls)::BIGINT AS ranker_calls
FROM (SELECT DISTINCT run, stage, key FROM runs) JOIN steps USING (stage, key)
GROUP BY run, stage
ORDER BY run, cost DESC, stage

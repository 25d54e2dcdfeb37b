-- Steps of every run with their state and size; a step that several runs share is listed in each.
SELECT run, runs.step || coalesce('@' || round, '') AS step, stage, key,
    CASE WHEN steps.key IS NULL THEN 'not finished' ELSE 'finished' END AS state,
    rows, rejects, seconds, tokens, ranker_calls
FROM runs LEFT JOIN steps USING (stage, key)
ORDER BY run, made NULLS LAST, round NULLS FIRST, step

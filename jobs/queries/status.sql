-- Steps of every run with their state and size; of those that run now, what is done and how long the rest takes.
SELECT run, runs.step || coalesce('@' || round, '') AS step, runs.stage, runs.key,
    CASE WHEN steps.key IS NOT NULL THEN 'finished' WHEN running.key IS NOT NULL THEN 'running' ELSE 'not finished' END AS state,
    rows, rejects, seconds, tokens, ranker_calls,
    CASE WHEN steps.key IS NULL THEN printf('%g of %g %s', round(done, 1), total, unit) END AS done,
    CASE WHEN steps.key IS NULL THEN rate END AS per_second,
    CASE WHEN steps.key IS NULL THEN seconds_left END AS seconds_left
FROM runs LEFT JOIN steps USING (stage, key) LEFT JOIN running USING (stage, key)
ORDER BY run, made NULLS LAST, runs.round NULLS FIRST, runs.step

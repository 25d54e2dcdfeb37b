-- Rejected rows by step and reason, the most frequent reason first, each with the place where it occurred first.
-- In the order of the rows, and not of the names of places: line 2 stands before line 10.
WITH numbered AS (SELECT stage, key, reason, place, row_number() OVER () AS row FROM rejects)
SELECT min(step) AS step, stage, key, reason, count(*) AS n, arg_min(place, row) AS first_place
FROM numbered JOIN (SELECT stage, key, min(step || coalesce('@' || round, '')) AS step FROM runs GROUP BY stage, key) USING (stage, key)
GROUP BY stage, key, reason
ORDER BY step, n DESC, reason

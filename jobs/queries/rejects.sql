-- Rejected rows by step and reason, the most frequent reason first.
SELECT min(step) AS step, stage, key, reason, count(*) AS n, min(place) AS first_place
FROM rejects JOIN (SELECT stage, key, min(step || coalesce('@' || round, '')) AS step FROM runs GROUP BY stage, key) USING (stage, key)
GROUP BY stage, key, reason
ORDER BY step, n DESC, reason

-- Votes of AutoSxS and of people: shares by judge, and by whose response was shown first.
-- candidate, baseline, same, unread: what was voted. A judge with a bias to a position gives the first response more votes in both rows. `SELECT * FROM votes` has each answer in full.
SELECT run || coalesce('@' || round, '') AS run, step AS judged_by, first AS shown_first, count(*) AS votes,
    avg((vote = 1 AND vote IS NOT NULL)::INT) AS candidate, avg((vote = 0 AND vote IS NOT NULL)::INT) AS baseline,
    avg((vote = 0.5 AND vote IS NOT NULL)::INT) AS same, avg((vote IS NULL)::INT) AS unread
FROM runs JOIN votes USING (stage, key)
GROUP BY run, round, step, first
ORDER BY run, round, step, first DESC

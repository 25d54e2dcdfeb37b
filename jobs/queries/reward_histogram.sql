-- Rewards before and after selection in fifty bins of equal width; choose one run with --run.
-- A recipe that weighs several rewards selects by their sum: these count, or all of them if nothing was selected.
WITH selected_by AS (SELECT inputs ->> 'rewards' AS key FROM steps WHERE stage = 'select'), summary AS (
    SELECT 'all candidates' AS what, reward FROM rewards
    WHERE key IN (SELECT key FROM selected_by) OR NOT EXISTS (SELECT 1 FROM selected_by)
    UNION ALL SELECT 'kept', reward FROM selections
), ends AS (SELECT min(reward) AS low, max(reward) AS high FROM summary),
binned AS (
    SELECT what, CASE WHEN high > low THEN least(49, floor(50 * (reward - low) / (high - low)))::INTEGER ELSE 0 END AS bin
    FROM summary, ends
), counted AS (SELECT what, bin, count(*) AS n FROM binned GROUP BY what, bin)
SELECT what, low + bin * width AS low, low + (bin + 1) * width AS high, n
FROM counted, (SELECT low, CASE WHEN high > low THEN (high - low) / 50 ELSE 1 END AS width FROM ends)
ORDER BY what, bin

-- Rewards before and after selection.
SELECT 'all candidates' AS what, reward FROM rewards
UNION ALL
SELECT 'kept', reward FROM selections

-- Win rate of every run by every judge, against each opponent, with what was not decided. See also query votes.
-- win is a fraction with its 95 % interval over `prompts`; comparisons, ties, undecided (no verdict: in no win rate) and unread are counts. gold without counts: the gold reward of `evaluate`.
WITH counts AS (
    SELECT key, sum(comparisons) AS comparisons, sum(ties) AS ties, sum(undecided) AS undecided, sum(unread) AS unread
    FROM wins GROUP BY key
),
named AS (
    SELECT run, round, key, evaluations.stage, metric, value, low, high, n, steps.options ->> 'judge' AS judge,
        steps.options ->> 'against' AS against,
        CASE steps.options ->> 'against' WHEN 'sft' THEN '' ELSE '_vs_' || (steps.options ->> 'against') END AS ending
    FROM runs JOIN evaluations USING (stage, key) JOIN steps USING (stage, key)
    WHERE stage = 'win_rate'
),
proxies AS (
    SELECT key, count(*) AS comparisons, count(*) FILTER (logit = 0) AS ties,
        count(*) FILTER (logit IS NULL AND unread IS NULL) AS undecided, count(unread) AS unread
    FROM judgements GROUP BY key
),
opponents AS (
    SELECT of_run.run, of_run.round, of_run.key,
        CASE WHEN bool_or(baseline.step = 'eval_baseline') THEN 'sft' -- whichever other step has the same draws
            WHEN bool_or(baseline.step = 'targets') THEN 'target' ELSE min(baseline.step) END AS against
    FROM runs AS of_run JOIN steps USING (stage, key)
        JOIN runs AS baseline ON baseline.run = of_run.run AND baseline.key = steps.inputs ->> 'baseline'
    WHERE of_run.step = 'evaluate'
    GROUP BY ALL
)
SELECT run || coalesce('@' || round, '') AS run, judge, against,
    any_value(value) FILTER (metric = judge || '_win' || ending) AS win,
    any_value(low) FILTER (metric = judge || '_win' || ending) AS win_low,
    any_value(high) FILTER (metric = judge || '_win' || ending) AS win_high,
    any_value(value) FILTER (metric = judge || '_win_lc' || ending) AS win_lc,
    any_value(value) FILTER (metric = judge || '_agreement' || ending) AS agreement,
    any_value(value) FILTER (metric = judge || '_alpha' || ending) AS alpha,
    any_value(n) FILTER (metric = judge || '_win' || ending) AS prompts,
    any_value(comparisons) AS comparisons, any_value(ties) AS ties, any_value(undecided) AS undecided,
    any_value(unread) AS unread
FROM named LEFT JOIN counts USING (key)
GROUP BY run, round, judge, against, key
UNION ALL
SELECT run || coalesce('@' || round, '') AS run, replace(metric, '_win', '') AS judge, against, value, low, high,
    (SELECT any_value(value) FROM evaluations AS lc WHERE lc.key = opponents.key AND lc.metric = evaluations.metric || '_lc'),
    NULL, NULL, n,
    CASE metric WHEN 'proxy_win' THEN proxies.comparisons END, CASE metric WHEN 'proxy_win' THEN ties END,
    CASE metric WHEN 'proxy_win' THEN undecided END, CASE metric WHEN 'proxy_win' THEN unread END
FROM opponents JOIN evaluations USING (key) JOIN steps USING (stage, key)
    LEFT JOIN proxies ON proxies.key = steps.inputs ->> 'judgements'
WHERE metric IN ('proxy_win', 'gold_win')
ORDER BY judge, against, win DESC, run

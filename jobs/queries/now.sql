-- Trainings that run now, at their latest step: loss, accuracy, margin, win rate when last evaluated, and time left.
WITH latest AS (
    SELECT stage, key, max(step) AS done_steps,
        coalesce(arg_max(value, step) FILTER (metric = 'loss'), arg_max(value, step) FILTER (metric = 'imitation/loss')) AS loss,
        arg_max(value, step) FILTER (metric = 'accuracy') AS accuracy,
        arg_max(value, step) FILTER (metric = 'margin') AS margin,
        arg_max(value, step) FILTER (metric = 'grad_norm') AS grad_norm,
        arg_max(value, step) FILTER (metric = 'kl') AS kl,
        arg_max(value, step) FILTER (metric = 'validation/proxy_win') AS proxy_win
    FROM metrics_now GROUP BY stage, key
)
SELECT run, runs.step || coalesce('@' || round, '') AS step, done_steps, total AS steps, loss, accuracy, margin, grad_norm,
    kl, proxy_win, rate AS per_second, seconds_left
FROM latest JOIN running USING (stage, key) JOIN runs USING (stage, key)
ORDER BY run, runs.step, round

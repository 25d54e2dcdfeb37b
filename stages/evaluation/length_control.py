"""Length-controlled win rate: what the win rate would be if the responses of both sides were of one length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.selection.groups import Floats, Ints

RIDGE = 1e-3  # of the squared coefficients, per prompt: a policy that always wins has no finite fit
STEPS = 50  # of Newton's method at most; six do unless one side always wins
AT_ONCE = 1 << 21  # pairs times resamples in memory at once


class Match(NamedTuple):
    """Comparison of two responses to a prompt."""

    prompt: str
    win: float  # 1 for ours, 0, or 0.5
    longer_by: int  # tokens of ours minus tokens of the other


def length_controlled(
    matches: Sequence[Match], resamples: int, rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Return the win rate at equal length and its 95 % bootstrap interval over prompts; each prompt weighs the same.

    A logistic model of the wins, P(win) = s(a + b tanh(d / sd d)), with d = longer_by; the result is s(a). It is that
    of AlpacaEval 2 (arXiv:2404.04475, eq. 1) without the term of an instruction's difficulty, which can only be fitted
    to many policies at once.
    """
    names = {name: n for n, name in enumerate(sorted({match.prompt for match in matches}))}
    prompt = np.array([names[match.prompt] for match in matches])
    wins, longer_by = (np.array([match[n] for match in matches], dtype=np.float64) for n in (1, 2))
    spread = longer_by.std()
    x = np.tanh(longer_by / spread) if spread else np.zeros_like(longer_by)
    value = _win_rates_at_equal_length(wins, x, prompt, np.ones((1, len(names)), np.int64))[0]
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    size = max(1, AT_ONCE // len(matches))
    parts = [counts[start : start + size] for start in range(0, resamples, size)]
    values = np.concatenate([_win_rates_at_equal_length(wins, x, prompt, part) for part in parts])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(value), (float(low), float(high))


def _win_rates_at_equal_length(wins: Floats, x: Floats, prompt: Ints, counts: Ints) -> Floats:
    """Return s(a) of the fits [R] to R weightings of the prompts, counts [R, prompts], by Newton's method."""
    weights = counts[:, prompt] / np.bincount(prompt)[prompt]  # [R, N]
    ridge = RIDGE * counts.sum(1)
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        slope, curvature = weights * (wins - p), weights * p * (1 - p)
        g_a, g_b = slope.sum(1) - ridge * a, slope @ x - ridge * b
        h_aa, h_ab, h_bb = curvature.sum(1) + ridge, curvature @ x, curvature @ x**2 + ridge
        determinant = h_aa * h_bb - h_ab**2
        step_a, step_b = (h_bb * g_a - h_ab * g_b) / determinant, (h_aa * g_b - h_ab * g_a) / determinant
        a, b = a + step_a, b + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return 1 / (1 + np.exp(-a))

"""The sampling law: Algorithm 1 of arXiv:2309.06657, compiled.

Keyed by index, so equal texts keep their multiplicity; the candidates are shuffled first, because the
loop stops at the k-th acceptance and would otherwise favour those that stand early.
"""

import numpy as np
from numba import config, njit, prange

# Numba's OpenMP layer turns on nested parallelism for the whole process, which slows torch tenfold afterwards.
config.THREADING_LAYER = "workqueue"


@njit(cache=True)
def _next(state: np.ndarray) -> float:  # pragma: no cover - compiled
    """SplitMix64: the next uniform in [0, 1) of a one-element uint64 state."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def _shuffle(pool: np.ndarray, state: np.ndarray) -> None:  # pragma: no cover - compiled
    for i in range(len(pool) - 1, 0, -1):
        j = int(_next(state) * (i + 1))
        pool[i], pool[j] = pool[j], pool[i]


@njit(cache=True)
def _one_prompt(
    values: np.ndarray,
    pool: np.ndarray,
    state: np.ndarray,
    beta: float,
    chosen: np.ndarray,
    rounds: np.ndarray,
) -> None:  # pragma: no cover - compiled
    """Algorithm 1 on one shuffled pool of indices; fills `chosen` until it or the pool is at its end."""
    wanted = min(len(chosen), len(pool))
    if beta == 0.0:
        best = np.argsort(-values[pool], kind="mergesort")
        for i in range(wanted):
            chosen[i], rounds[i] = pool[best[i]], 0
        return
    accepted, left, turn = 0, len(pool), 0
    while accepted < wanted:
        top = values[pool[0]]
        for i in range(1, left):
            top = max(top, values[pool[i]])
        kept = 0
        for i in range(left):
            chance = 1.0 if np.isinf(beta) else np.exp((values[pool[i]] - top) / beta)
            if accepted < wanted and _next(state) < chance:
                chosen[accepted], rounds[accepted] = pool[i], turn
                accepted += 1
            else:
                pool[kept] = pool[i]
                kept += 1
        left, turn = kept, turn + 1


@njit(cache=True, parallel=True)
def rejection_sample(
    values: np.ndarray, starts: np.ndarray, seeds: np.ndarray, k: int, beta: float
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Algorithm 1 for every group: row indices in order of acceptance, and their rounds, both [groups, k].

    values: float64 [rows]; group g is rows starts[g] to starts[g + 1]; -1 where a group has fewer than k.
    Each group draws from its own seed, so neither threads nor other groups touch its result.
    """
    groups = len(starts) - 1
    chosen = np.full((groups, k), -1, dtype=np.int64)
    rounds = np.full((groups, k), -1, dtype=np.int32)
    for g in prange(groups):
        pool = np.arange(starts[g], starts[g + 1])
        state = np.array([seeds[g]], dtype=np.uint64)
        _shuffle(pool, state)
        _one_prompt(values, pool, state, beta, chosen[g], rounds[g])
    return chosen, rounds


def tilt(values: np.ndarray, starts: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each group: mean acceptance of the first pass, and effective sample size of exp(r / beta)."""
    if len(starts) < 2:
        return np.zeros(0), np.zeros(0)
    sizes = np.diff(starts)
    top = np.repeat(np.maximum.reduceat(values, starts[:-1]), sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = (values == top).astype(float) if beta == 0 else np.exp((values - top) / beta)
    total = np.add.reduceat(weight, starts[:-1])
    return total / sizes, total**2 / np.add.reduceat(weight**2, starts[:-1])

"""The sampling laws, compiled: Algorithm 1 of arXiv:2309.06657, and the Gumbel-top-k trick.

Keyed by index, so equal texts keep their multiplicity; the candidates are shuffled first, because
Algorithm 1 stops at the k-th acceptance and would otherwise favour those that stand early.
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
    values: np.ndarray, starts: np.ndarray, seeds: np.ndarray, k: int, betas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Algorithm 1 for every group: row indices in order of acceptance, and their rounds, both [groups, k].

    values: float64 [rows]; betas: float64 [groups], a temperature each. Group g is rows starts[g] to starts[g + 1];
    -1 where a group has fewer than k.
    Each group draws from its own seed, so neither threads nor other groups touch its result.
    """
    groups = len(starts) - 1
    chosen = np.full((groups, k), -1, dtype=np.int64)
    rounds = np.full((groups, k), -1, dtype=np.int32)
    for g in prange(groups):
        pool = np.arange(starts[g], starts[g + 1])
        state = np.array([seeds[g]], dtype=np.uint64)
        _shuffle(pool, state)
        _one_prompt(values, pool, state, betas[g], chosen[g], rounds[g])
    return chosen, rounds


@njit(cache=True, parallel=True, error_model="numpy")  # gap / 0 is -infinity
def gumbel_top_k(
    values: np.ndarray, starts: np.ndarray, seeds: np.ndarray, k: int, betas: np.ndarray
) -> np.ndarray:  # pragma: no cover - compiled
    """The k largest value / beta + Gumbel noise of every group, best first: row indices [groups, k], -1 beyond.

    Where value / beta is no number to compare (beta = 0), the value decides, and chance among equals.
    """
    groups = len(starts) - 1
    chosen = np.full((groups, k), -1, dtype=np.int64)
    for g in prange(groups):
        pool = np.arange(starts[g], starts[g + 1])
        state = np.array([seeds[g]], dtype=np.uint64)
        _shuffle(pool, state)
        pool = pool[np.argsort(-values[pool], kind="mergesort")]
        gap = values[pool] - values[pool[0]]
        keys = np.empty(len(pool))
        for i in range(len(pool)):
            noise = -np.log(-np.log(max(_next(state), 2.0**-54)))
            keys[i] = noise if gap[i] == 0.0 else gap[i] / betas[g] + noise
        order = np.argsort(-keys, kind="mergesort")
        for i in range(min(k, len(pool))):
            chosen[g, i] = pool[order[i]]
    return chosen

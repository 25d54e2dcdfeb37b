"""Compiled kernels: Algorithm 1 of the RSO paper (arXiv:2309.06657), the Gumbel-top-k trick, and loops over pairs.

Candidates are identified by row index, so equal texts keep their multiplicity. They are shuffled first, because
Algorithm 1 stops at the k-th acceptance and would otherwise favour those that come early.
"""

import numpy as np
from numba import config, njit, prange

# Numba's OpenMP layer turns on nested parallelism for the whole process, which slows torch tenfold afterwards.
config.THREADING_LAYER = "workqueue"


@njit(cache=True)
def _next_uniform(state: np.ndarray) -> float:  # pragma: no cover - compiled
    """SplitMix64: the next uniform in [0, 1) of a one-element uint64 state."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def _shuffle(pool: np.ndarray, state: np.ndarray) -> None:  # pragma: no cover - compiled
    """Fisher-Yates, in place."""
    for i in range(len(pool) - 1, 0, -1):
        j = int(_next_uniform(state) * (i + 1))
        pool[i], pool[j] = pool[j], pool[i]


@njit(cache=True)
def algorithm_1(
    rewards: np.ndarray, pool: np.ndarray, state: np.ndarray, beta: float, accepted: np.ndarray, rounds: np.ndarray
) -> None:  # pragma: no cover - compiled
    """Run statistical rejection sampling for one prompt: Algorithm 1 of arXiv:2309.06657.

    pool: shuffled row indices of the prompt's candidates; it is overwritten. Writes the accepted indices, in order of
    acceptance, and the pass that accepted each, until `accepted` is full or no candidate remains.
    """
    target = min(len(accepted), len(pool))
    if beta == 0.0:  # the limit: the best first. The stable sort of a shuffled pool breaks ties at random.
        order = np.argsort(-rewards[pool], kind="mergesort")
        for i in range(target):
            accepted[i], rounds[i] = pool[order[i]], 0
        return
    n_accepted, n_remaining, turn = 0, len(pool), 0
    while n_accepted < target:  # a pass over the candidates that remain
        # The maximum is taken anew in each pass, so that every pass accepts at least its best candidate.
        max_reward = rewards[pool[0]]
        for i in range(1, n_remaining):
            max_reward = max(max_reward, rewards[pool[i]])
        n_rejected = 0
        for i in range(n_remaining):
            # Accept if u < exp((r - max_reward) / beta), u uniform in [0, 1); always at beta = infinity.
            probability = 1.0 if np.isinf(beta) else np.exp((rewards[pool[i]] - max_reward) / beta)
            if n_accepted < target and _next_uniform(state) < probability:
                accepted[n_accepted], rounds[n_accepted] = pool[i], turn
                n_accepted += 1
            else:  # remains for the next pass
                pool[n_rejected] = pool[i]
                n_rejected += 1
        if n_rejected == n_remaining:  # only where beta or a reward is NaN: nothing will ever be accepted
            return
        n_remaining, turn = n_rejected, turn + 1


@njit(cache=True, parallel=True)
def algorithm_1_batch(
    rewards: np.ndarray, starts: np.ndarray, seeds: np.ndarray, k: int, betas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Run Algorithm 1 for every prompt; return row indices in order of acceptance, and their passes, both [G, k].

    rewards: float64 [N]; starts: [G + 1], prompt g has the rows starts[g] to starts[g + 1]; betas: float64 [G].
    Entries are -1 where a prompt has fewer than k candidates. Every prompt draws from its own seed, so neither
    threads nor other prompts change its result.
    """
    n_prompts = len(starts) - 1
    accepted = np.full((n_prompts, k), -1, dtype=np.int64)
    rounds = np.full((n_prompts, k), -1, dtype=np.int32)
    for g in prange(n_prompts):
        pool = np.arange(starts[g], starts[g + 1])
        state = np.array([seeds[g]], dtype=np.uint64)
        _shuffle(pool, state)
        algorithm_1(rewards, pool, state, betas[g], accepted[g], rounds[g])
    return accepted, rounds


@njit(cache=True, parallel=True, error_model="numpy")  # gap / 0 is -infinity
def gumbel_top_k_batch(
    rewards: np.ndarray, starts: np.ndarray, seeds: np.ndarray, k: int, betas: np.ndarray
) -> np.ndarray:  # pragma: no cover - compiled
    """Return the k largest reward / beta + Gumbel noise of every prompt, best first: row indices [G, k], -1 beyond.

    Where reward / beta cannot be compared (beta = 0), the reward decides, and chance among equals.
    """
    n_prompts = len(starts) - 1
    chosen = np.full((n_prompts, k), -1, dtype=np.int64)
    for g in prange(n_prompts):
        pool = np.arange(starts[g], starts[g + 1])
        state = np.array([seeds[g]], dtype=np.uint64)
        _shuffle(pool, state)
        pool = pool[np.argsort(-rewards[pool], kind="mergesort")]
        gap = rewards[pool] - rewards[pool[0]]
        keys = np.empty(len(pool))
        for i in range(len(pool)):
            noise = -np.log(-np.log(max(_next_uniform(state), 2.0**-54)))
            keys[i] = noise if gap[i] == 0.0 else gap[i] / betas[g] + noise
        order = np.argsort(-keys, kind="mergesort")
        for i in range(min(k, len(pool))):
            chosen[g, i] = pool[order[i]]
    return chosen


@njit(cache=True, parallel=True)
def pair_agreement(
    rewards: np.ndarray, values: np.ndarray, weights: np.ndarray, starts: np.ndarray, edges: np.ndarray
) -> np.ndarray:  # pragma: no cover - compiled
    """Weigh the pairs of every prompt's candidates by whether their rewards order them as their values do.

    A pair counts with the product of its two weights; one of equal values, or with a value that is nan, not at all. All
    arrays but starts [G + 1] and edges [B - 1] are [N]. Returns [G, B, 2]: weight of the pairs that agree (of equal
    rewards half) and of all, by the distance of their rewards, of which edges are the bounds.
    """
    n_prompts = len(starts) - 1
    result = np.zeros((n_prompts, len(edges) + 1, 2))
    for g in prange(n_prompts):
        for i in range(starts[g], starts[g + 1]):
            if weights[i] == 0.0:
                continue
            for j in range(starts[g], i):
                difference, distance = values[i] - values[j], rewards[i] - rewards[j]
                weight = weights[i] * weights[j]
                if weight == 0.0 or difference == 0.0 or np.isnan(difference):
                    continue
                bin = 0
                while bin < len(edges) and abs(distance) >= edges[bin]:
                    bin += 1
                result[g, bin, 1] += weight
                if distance == 0.0:
                    result[g, bin, 0] += weight / 2
                elif (distance > 0.0) == (difference > 0.0):
                    result[g, bin, 0] += weight
    return result


@njit(cache=True)
def neighbour_pairs(
    rewards: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Pair the rows of every prompt as pair rule `neighbours` does; return two rows per pair, prompt by prompt.

    rewards: float64 [N], of each prompt in the order of acceptance; starts: [G + 1].
    """
    first = np.empty(len(rewards) // 2, dtype=np.int64)
    second = np.empty(len(rewards) // 2, dtype=np.int64)
    n_pairs = 0
    for g in range(len(starts) - 1):
        begin, end = starts[g], starts[g + 1]
        # Rows that tie with their neighbour or have none, in lists by reward: heads[j] and tails[j] are the ends of
        # list j, follower[i] is the row after begin + i.
        rewards_left = np.empty(end - begin)
        heads, tails, counts, follower = np.zeros((4, end - begin), dtype=np.int64)
        n_lists = 0
        for i in range(begin, end, 2):
            if i + 1 < end and rewards[i] != rewards[i + 1]:
                first[n_pairs], second[n_pairs] = i, i + 1
                n_pairs += 1
                continue
            for row in range(i, min(i + 2, end)):
                j = 0
                while j < n_lists and rewards_left[j] != rewards[row]:
                    j += 1
                if j == n_lists:
                    rewards_left[j], heads[j] = rewards[row], row
                    n_lists += 1
                else:
                    follower[tails[j] - begin] = row
                tails[j] = row
                counts[j] += 1
        while True:
            most, next_most = -1, -1  # the two most frequent rewards, of equally frequent ones the lower
            for j in range(n_lists):
                if counts[j] == 0:
                    continue
                if most < 0 or (counts[j], -rewards_left[j]) > (counts[most], -rewards_left[most]):
                    most, next_most = j, most
                elif next_most < 0 or (counts[j], -rewards_left[j]) > (counts[next_most], -rewards_left[next_most]):
                    next_most = j
            if most < 0:
                break
            if next_most < 0:  # all that are left are equal
                if counts[most] < 2:
                    break
                next_most = most
            first[n_pairs] = heads[most]
            heads[most] = follower[heads[most] - begin]
            counts[most] -= 1
            second[n_pairs] = heads[next_most]
            heads[next_most] = follower[heads[next_most] - begin]
            counts[next_most] -= 1
            n_pairs += 1
    return first[:n_pairs], second[:n_pairs]


@njit(cache=True)
def likelier_losers(
    rewards: np.ndarray, logps: np.ndarray, levels: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Pair the rows of every prompt as pair rule `next_likelier_loser` does; return the rows of the good and the bad.

    rewards, logps: float64 [N]; levels: [G], what separates good from bad; starts: [G + 1].
    """
    good = np.empty(len(rewards), dtype=np.int64)
    bad = np.empty(len(rewards), dtype=np.int64)
    n_pairs = 0
    for g in range(len(starts) - 1):
        for i in range(starts[g], starts[g + 1]):
            if not rewards[i] < levels[g]:
                continue
            likeliest = -1
            for j in range(starts[g], starts[g + 1]):
                is_candidate = rewards[j] > levels[g] and logps[j] < logps[i]
                if is_candidate and (likeliest < 0 or logps[j] > logps[likeliest]):
                    likeliest = j
            if likeliest >= 0:
                good[n_pairs], bad[n_pairs] = likeliest, i
                n_pairs += 1
    return good[:n_pairs], bad[:n_pairs]

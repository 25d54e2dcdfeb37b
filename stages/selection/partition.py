"""Stage `partition`: the partition function of each prompt, learned as a function of the prompt over all of them."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from pipeline import Columns, StageContext, stage
from pipeline.costs import Cost
from schemas import Metrics, Model, Partitions, Prompts, Rewards, WinnowError, WinnowWarning
from schemas.tables import METRICS, PARTITIONS
from stages.data.rows import (
    column_by_id,
    column_of,
    in_order_of_prompts,
    numbers_of,
    reject_not_finite,
    starts_of_prompts,
)
from stages.limits import SCORING_TOKENS_PER_PASS, check_ids
from stages.model_config import input_problems
from stages.network.memory import policy_need
from stages.options import Positive, SmallCount
from stages.selection.groups import Floats, Ints

FOLDS = 5
# Of the squared coefficients, in nats; at an infinite one all prompts have the same partition function.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
SMALLEST_SD = 1e-12  # below, a feature is constant


@stage(
    version=1, unsharded=True, check=lambda options, inputs: input_problems(inputs, "policy"), cost=Cost(policy_need)
)
def partition(
    prompts: Annotated[Prompts, Columns("prompt_id", "token_ids")],
    rewards: Annotated[Rewards, Columns("prompt_id", "candidate_id", "reward")],
    policy: Model,
    ctx: StageContext,
    *,
    beta: Positive,
    components: SmallCount = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[Partitions, Metrics]:
    """Learn log Z(x) = log E exp(reward / beta) as a function of the prompt alone, by Gumbel regression.

    log Z(x) = a + d . phi(x). phi are the first `components` principal components, over the prompts, of the policy's
    last hidden state at the prompt's last token, from which it draws the first token of a response. a and d minimise
    the mean over all rewards of exp(z) - z, z = reward / beta - log Z (XQL, arXiv:2301.02328), plus ridge/2 ||d||^2.
    So exp(z) has mean 1 over all rewards together, and a prompt of a few draws is not divided by their own mean, which
    the largest of them dominates. The ridge is that of the lowest loss in 5-fold cross-validation over prompts; an
    infinite one, the same Z for all prompts, is among them, and a warning says so if it is chosen.

    What a prompt can say of Z is the level of its rewards. A reward model's have one; those of a pairwise ranker are
    against one random response of the prompt, whose quality the prompt does not tell: on the demo (135 prompts, 8
    draws, beta 1) one Z for all was chosen, which is off by 0.57 nats from that of 64 draws, where the mean of the 8
    themselves (`empirical`) is off by 0.21.

    Rewards count as they are: give `rewards` the step that `select` reads, and `scale: raw` there. Prompts of one
    token, which the policy cannot read in a context, are rejected. Metrics: `ridge` if it is finite, `loss`, and
    `heldout/loss` of cross-validation beside `heldout/loss_constant`, that of one Z for all; nats, less what no
    function of the prompt changes. Raises WinnowError for fewer than 5 prompts.
    """
    from threadpoolctl import threadpool_limits

    rewards = in_order_of_prompts(reject_not_finite(rewards, "reward", ctx, place="rewards"))
    ids_of = column_by_id(prompts, "prompt_id", "token_ids")
    names, starts = starts_of_prompts(column_of(rewards, "prompt_id"))
    is_short = np.array([len(ids_of[name]) < 2 for name in names.to_pylist()], dtype=bool)
    ctx.reject_rows(names.filter(pa.array(is_short)), reason="a prompt of one token", place="prompts")
    # Of each prompt: the number of its rewards, and log sum exp(reward / beta).
    sizes, logs = np.diff(starts), _log_sums(numbers_of(rewards, "reward") / beta, starts)
    names, sizes, logs = names.filter(pa.array(~is_short)), sizes[~is_short], logs[~is_short]
    if len(names) < FOLDS:
        raise WinnowError(f"partition: {len(names)} prompts with rewards, and cross-validation needs {FOLDS}")

    states = _last_states(names.to_pylist(), ids_of, policy, dtype, ctx)
    with threadpool_limits(1):  # the order of a sum, and so its last bits, would depend on the number of threads
        phi = _principal_components(states, components)
        folds = np.arange(len(names)) % FOLDS  # ids are hashes, so that their order is no order of the prompts
        heldout = {ridge: _cross_validated(logs, phi, sizes, folds, ridge) for ridge in RIDGES}
        ridge = min(heldout, key=lambda ridge: (heldout[ridge], -ridge))
        d = _fit(logs, phi, sizes, ridge)
        log_z = _intercept(logs, phi, sizes, d) + phi @ d
        figures = {
            "loss": _loss(logs, phi, sizes, d),
            "heldout/loss": heldout[ridge],
            "heldout/loss_constant": heldout[np.inf],
        }
    if np.isfinite(ridge):
        figures["ridge"] = ridge
    else:
        warnings.warn(
            f"partition: the policy's states say nothing of the rewards of {len(names)} prompts in cross-validation, "
            "and all have the same partition function; rewards against a random response of each prompt have no level "
            "that the prompt tells: use a reward model, give more prompts, or set `normaliser: empirical`",
            WinnowWarning,
            stacklevel=2,
        )
    rows = [{"step": 0, "metric": name, "value": float(value)} for name, value in figures.items()]
    table = pa.table([names, pa.array(log_z)], schema=PARTITIONS)
    return table, pa.Table.from_pylist(rows, schema=METRICS)


def _log_sums(exponents: Floats, starts: Ints) -> Floats:
    """Return the log of the sum of exp per prompt, [N] -> [G]."""
    if not len(exponents):
        return np.zeros(0)
    top = np.maximum.reduceat(exponents, starts[:-1])
    return top + np.log(np.add.reduceat(np.exp(exponents - np.repeat(top, np.diff(starts))), starts[:-1]))


def _last_states(
    names: list[str], ids_of: Mapping[str, list[int]], policy: Model, dtype: str, ctx: StageContext
) -> Floats:
    """Return the policy's last hidden state at the last token of each prompt, [G, hidden]."""
    from stages.network.forward import forward_rows, response_means
    from stages.network.load import load_network

    check_ids(policy, "prompts", [ids_of[name] for name in names])
    ctx.count(tokens=sum(len(ids_of[name]) for name in names))
    # The mean over a response of one token, which is the prompt's last.
    rows = [(ids_of[name][:-1], ids_of[name][-1:]) for name in names]
    network = ctx.open_once(load_network, policy, dtype)
    states = forward_rows(response_means, network, rows, dtype, SCORING_TOKENS_PER_PASS).astype(np.float64)
    if not np.isfinite(states).all():
        raise WinnowError(f"partition: the policy's hidden states are not finite in {dtype}; set dtype: float32")
    return states


def _principal_components(states: Floats, count: int) -> Floats:
    """Return the first components of standardised states, [G, hidden] -> [G, at most count]; the first has sd 1."""
    centred = states - states.mean(axis=0)
    sd = centred.std(axis=0)
    centred = centred[:, sd > SMALLEST_SD] / sd[sd > SMALLEST_SD]
    if not centred.size:
        return np.zeros((len(states), 0))
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    largest = np.argsort(-variances, kind="stable")[:count]
    return centred @ axes[:, largest] / np.sqrt(variances[largest[0]])


def _intercept(logs: Floats, phi: Floats, sizes: Ints, d: Floats) -> float:
    """Return the a that is best for d: log of the mean over rewards of exp(reward / beta - d . phi)."""
    return float(np.logaddexp.reduce(logs - phi @ d) - np.log(sizes.sum()))


def _loss(logs: Floats, phi: Floats, sizes: Ints, d: Floats) -> float:
    """Return the mean over rewards of exp(z) - z - 1 at the best a, plus the mean of reward / beta, as a function of d.

    What is added is the same for every d.
    """
    return _intercept(logs, phi, sizes, d) + float(sizes @ (phi @ d)) / float(sizes.sum())


def _fit(logs: Floats, phi: Floats, sizes: Ints, ridge: float) -> Floats:
    """Return the d that minimises the loss plus ridge/2 ||d||^2, which is convex."""
    from scipy.optimize import minimize
    from scipy.special import softmax

    if np.isinf(ridge) or not phi.shape[1]:
        return np.zeros(phi.shape[1])
    mean_phi = sizes @ phi / sizes.sum()

    def loss_and_gradient(d: Floats) -> tuple[float, Floats]:
        gradient = mean_phi - softmax(logs - phi @ d) @ phi + ridge * d
        return _loss(logs, phi, sizes, d) + ridge / 2 * float(d @ d), gradient

    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10}
    result: Floats = minimize(loss_and_gradient, np.zeros(phi.shape[1]), jac=True, method="L-BFGS-B", options=options).x
    return result


def _cross_validated(logs: Floats, phi: Floats, sizes: Ints, folds: Ints, ridge: float) -> float:
    """Return the mean loss of the prompts of each fold under the d of all others."""
    losses = []
    for fold in range(FOLDS):
        here = folds == fold
        d = _fit(logs[~here], phi[~here], sizes[~here], ridge)
        losses.append(_loss(logs[here], phi[here], sizes[here], d))
    return float(np.mean(losses))

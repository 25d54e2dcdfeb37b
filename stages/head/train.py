"""A small preference head on frozen features: no weight of the language model changes.

To add a kind of head, add a function here: from standardised sides of same-prompt pairs to neurons, and
figures of its own for the metrics.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from pipeline import Bound, Finite, Range, Registry, StageContext, stage
from schemas import Features, Heads, Metrics, Pairs, Prompts, Rewards, WinnowError, WinnowWarning
from schemas.tables import METRICS, REWARDS
from stages.data.rows import column_by
from stages.head.convex import ProgressCallback, Solution, draw_gates, loss, recover, solve
from stages.head.relu import ReluHead, matrix, relu_head_of

head = Registry("head")
Count = Annotated[int, Range(gt=0)]
Positive = Annotated[float, Range(gt=0, lt=float("inf"))]
Made = tuple[ReluHead, dict[str, float]]
NEAR = 1e-6  # nats that the last layer's loss may be above the least


@dataclass(frozen=True)
class Sides:
    """Features of N pairs' two responses, [N, d] each, and the pairs' weights [N]."""

    chosen: np.ndarray
    rejected: np.ndarray
    weight: np.ndarray

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As a classifier sees them: x [2N, d], labels 1 and -1, weights."""
        labels = np.repeat([1.0, -1.0], len(self.weight))
        return np.concatenate([self.chosen, self.rejected]), labels, np.tile(self.weight, 2)

    def standardised(self, mean: np.ndarray, sd: np.ndarray) -> "Sides":
        return Sides((self.chosen - mean) / sd, (self.rejected - mean) / sd, self.weight)


NOBODY = Sides(np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0))


@head(version=2)
def convex_relu(
    sides: Sides,
    tell: ProgressCallback,
    *,
    gates: Count = 20,
    beta: Positive = 1e-2,
    tolerance: Positive = 1e-3,
    iterations: Count = 3000,
    rank: Count = 20,
    scale: Positive = 2.5,
    margin: Finite = 1.5,
    ridge: Positive = 1e-3,
    seed: int = 0,
) -> Made:
    """COALA (arXiv:2605.23244): a convex two-layer ReLU network on labels 1 and -1, then its last layer on pairs.

    `gates` random sign patterns give at most twice as many neurons; `beta` is the weight decay a row. The last
    layer minimises mean softplus(margin - scale * (s_chosen - s_rejected)) + ridge/2 ||outer||^2 over the pairs
    themselves; the authors' code draws random chosen and rejected rows of any prompt.

    ADMM stops once both residuals are at most `tolerance`, relative to ||y|| and ||F^T y||, or after `iterations`,
    with a warning. On the demo's 11,278 rows of 128 features 1e-3 takes 1,400 iterations, some two minutes on one
    thread, and the loss is within a hundredth of the optimum. Metrics: `converged` 1 or 0, the residuals, and
    `objective`, the loss a row of the network as it was recovered, before its last layer is trained on.
    """
    x, labels, weight = sides.rows
    root = np.sqrt(weight)  # weighted least squares: no positive weight changes a gate or a cone
    X, y = np.hstack([x, np.ones((len(x), 1))]) * root[:, None], labels * root
    total = beta * float(weight.sum())
    patterns = draw_gates(X, gates, np.random.default_rng(seed))
    solution = solve(X, y, patterns, total, tolerance=tolerance, iterations=iterations, rank=rank, seed=seed, tell=tell)
    if not solution.converged:
        _warn_of_the_cap(solution, tolerance)
    inner, outer = recover(solution.v)
    if not len(outer):
        raise WinnowError(f"preference_head: beta {beta} leaves no neuron; set head.beta lower")
    first = ReluHead(inner[:, :-1], inner[:, -1], outer)
    figures = {
        "neurons": float(len(outer)),
        "iterations": float(solution.iterations),
        "converged": float(solution.converged),
        "primal_residual": solution.primal,
        "dual_residual": solution.dual,
        "objective": loss(X, y, total, inner, outer) / float(weight.sum()),
    }
    return last_layer(first, sides, scale, margin, ridge), figures


def _warn_of_the_cap(solution: Solution, tolerance: float) -> None:
    warnings.warn(
        f"preference_head: ADMM stopped after {solution.iterations} iterations at residuals {solution.primal:.1e} and "
        f"{solution.dual:.1e}, above head.tolerance {tolerance}; set head.iterations higher",
        WinnowWarning,
        stacklevel=3,
    )


def last_layer(neurons: ReluHead, sides: Sides, scale: float, margin: float, ridge: float) -> ReluHead:
    """The outer weights at the optimum of the preference loss, which is strictly convex in them."""
    from scipy.optimize import minimize
    from scipy.special import expit

    gaps = neurons.ramps(sides.chosen) - neurons.ramps(sides.rejected)
    share = sides.weight / sides.weight.sum()

    def preference(outer: np.ndarray) -> tuple[float, np.ndarray]:
        short = margin - scale * (gaps @ outer)
        value = share @ np.logaddexp(0, short) + ridge / 2 * outer @ outer
        return float(value), ridge * outer - scale * (share * expit(short)) @ gaps

    found = minimize(
        preference,
        neurons.outer,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "ftol": 0, "gtol": 1e-8},
    )
    if not (found.success or found.jac @ found.jac / (2 * ridge) < NEAR):  # strongly convex: no further than that
        raise WinnowError(f"preference_head: no minimum of the last layer ({found.message}); set head.ridge higher")
    return replace(neurons, outer=found.x)


@head()
def logistic(sides: Sides, tell: ProgressCallback, *, C: Positive = 1.0) -> Made:
    """scikit-learn's LogisticRegression on the same rows: the baseline. z = w.x + b is relu(z) - relu(-z)."""
    from sklearn.linear_model import LogisticRegression

    x, labels, weight = sides.rows
    fit = LogisticRegression(C=C, max_iter=10_000).fit(x, labels, sample_weight=weight)
    w, b = fit.coef_[0], fit.intercept_[0]
    return ReluHead(np.stack([w, -w]), np.array([b, -b]), np.array([1.0, -1.0])), {"neurons": 2.0}


@stage(version=1, unsharded=True)
def preference_head(
    prompts: Prompts,
    features: Features,
    pairs: Pairs,
    ctx: StageContext,
    *,
    head: Annotated[Bound, head],
) -> tuple[Heads, Metrics]:
    """Train on pairs of train prompts, measure on those of held-out ones, if there are any.

    Features are standardised by the training rows' mean and sd, and that is folded into the neurons: a head
    scores raw features. Raises WinnowError if fewer than two pairs can be trained on.
    """
    from threadpoolctl import threadpool_limits

    ready = {name: _sides(prompts, features, pairs, name, ctx) for name in ("train", "heldout")}
    train = ready["train"]
    if len(train.weight) < 2:
        raise WinnowError(
            f"preference_head: {len(train.weight)} usable pairs of train prompts, and a head needs 2; "
            "see the step's rejects, and `heldout` of the data"
        )
    x, _, _ = train.rows
    mean, sd = x.mean(0), x.std(0)
    sd[sd == 0] = 1.0  # a constant says nothing, and is 0 once the mean is taken off
    with threadpool_limits(1):  # the order of a sum, and so its last bits, would follow the number of threads
        neurons, figures = head(train.standardised(mean, sd), ctx.progress)
    neurons = neurons.before(mean, sd)
    values = _quality(neurons, train) | figures
    values |= {f"heldout/{name}": value for name, value in _quality(neurons, ready["heldout"]).items()}
    rows = [{"step": 0, "metric": name, "value": value} for name, value in values.items()]
    return neurons.table(), pa.Table.from_pylist(rows, schema=METRICS)


def _sides(prompts: Any, features: Any, pairs: Any, split: str, ctx: StageContext) -> Sides:
    """The usable pairs of a split; the others are rejected."""
    side = column_by(prompts, "prompt_id", "split")
    seen = dict(zip(features.column("candidate_id").to_pylist(), matrix(features), strict=True))
    kept = []
    for pair in (row for row in pairs.to_pylist() if side[row["prompt_id"]] == split):
        chosen, rejected = seen.get(pair["chosen_id"]), seen.get(pair["rejected_id"])
        if reason := _unusable(chosen, rejected, pair["weight"]):
            ctx.reject(reason, place="pairs", prompt=pair["prompt_id"], candidate=pair["chosen_id"])
        else:
            kept.append((chosen, rejected, pair["weight"]))
    return Sides(*(np.array(column) for column in zip(*kept, strict=True))) if kept else NOBODY


def _unusable(chosen: np.ndarray | None, rejected: np.ndarray | None, weight: float) -> str:
    """Why a pair is left out; empty if it is not."""
    if chosen is None or rejected is None:
        return "no features"
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        return "features not finite"
    if (chosen == rejected).all():
        return "equal features"
    return "" if weight > 0 else "no weight"


def _quality(neurons: ReluHead, sides: Sides) -> dict[str, float]:
    """Share of pairs ordered as their label says (ties one half); area under the ROC curve over all rows."""
    if not len(sides.weight):
        return {}
    from sklearn.metrics import roc_auc_score

    x, labels, _ = sides.rows
    scores = neurons.score(x)
    chosen, rejected = np.split(scores, 2)
    accuracy = ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()
    return {"accuracy": float(accuracy), "auc": float(roc_auc_score(labels, scores)), "pairs": float(len(chosen))}


@stage(version=1)
def head_reward(features: Features, heads: Heads, ctx: StageContext) -> Rewards:
    """A candidate's reward is its score by the head, in the head's own unit: any selection can re-rank with it."""
    x = matrix(features)
    scores = relu_head_of(heads).score(np.where(np.isfinite(x), x, 0.0))
    rows: list[dict[str, Any]] = []
    for names, finite, score in zip(
        features.select(["prompt_id", "candidate_id"]).to_pylist(), np.isfinite(x).all(1), scores, strict=True
    ):
        if finite:
            rows.append(names | {"reward": float(score)})
        else:
            prompt, candidate = names["prompt_id"], names["candidate_id"]
            ctx.reject("features not finite", place="features", prompt=prompt, candidate=candidate)
    return pa.Table.from_pylist(rows, schema=REWARDS)

"""Small preference heads on frozen features: no weight of the language model changes.

To add a kind of head, add a function here: from standardised features of pairs (`PairFeatures`) to a `ReluHead` and
figures of its own for the metrics.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from pipeline import Bound, Finite, Registry, StageContext, stage
from schemas import Features, Heads, Metrics, Pairs, Prompts, Rewards, WinnowError, WinnowWarning
from schemas.tables import METRICS, REWARDS
from stages.data.rows import column_by_id
from stages.head.relu import ReluHead, feature_matrix, read_relu_head
from stages.options import Positive, Seed, SmallCount
from stages.results import floats, number

head = Registry("head", "pairs", "progress")
ProgressCallback = Callable[[float, float, str], None]
TrainedHead = tuple[ReluHead, dict[str, float]]  # and figures for the metrics
MAX_LOSS_GAP = 1e-6  # nats that the last layer's loss may be above its minimum


@dataclass(frozen=True)
class PairFeatures:
    """Features of N pairs' chosen and rejected responses, with the pairs' weights."""

    chosen: np.ndarray  # [N, d]
    rejected: np.ndarray  # [N, d]
    weight: np.ndarray  # [N]

    def as_classification(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the data of a classifier: x [2N, d], chosen first, labels 1 and -1, weights."""
        labels = np.repeat([1.0, -1.0], len(self.weight))
        return np.concatenate([self.chosen, self.rejected]), labels, np.tile(self.weight, 2)


@head(version=3)
def convex_relu(
    pairs: PairFeatures,
    progress: ProgressCallback,
    *,
    gates: SmallCount = 20,
    beta: Positive = 1e-2,
    tolerance: Positive = 1e-3,
    iterations: SmallCount = 3000,
    rank: SmallCount = 20,
    scale: Positive = 2.5,
    margin: Finite = 1.5,
    ridge: Positive = 1e-3,
    seed: Seed = 0,
) -> TrainedHead:
    """Fit a convex two-layer ReLU network to labels 1 and -1, then its last layer to pairs: COALA (arXiv:2605.23244).

    `gates` random sign patterns give at most twice as many neurons; `beta` is the weight decay per row. The last
    layer minimises mean softplus(margin - scale * (s_chosen - s_rejected)) + ridge/2 ||outer||^2 over the pairs
    themselves; the authors' code draws random chosen and rejected rows of any prompt.

    ADMM runs on a GPU if there is one, else on the threads that torch has, whose number changes no bit of the result; a
    GPU adds up in another order, and its last digits differ. It stops once both residuals are at most `tolerance`,
    relative to ||y|| and ||F^T y||, or after `iterations`, with a warning. On the demo's 11,278 rows of 128 features
    1e-3 takes 1,400 iterations, some two minutes on one thread, and the loss is within a hundredth of the optimum. Of
    as many rows, a product with the data, of which a solve mostly consists, takes 2.7 ms on one thread and 1.6 on two,
    and with 1,024 features 84 and 46. Metrics: `converged` 1 or 0, the residuals, and `objective`, the loss per row of
    the recovered network, before its last layer is trained.
    """
    from stages.head.convex import draw_gates, loss, recover, solve

    x, labels, weight = pairs.as_classification()
    root = np.sqrt(weight)  # weighted least squares: no positive weight changes a gate or a cone
    X, y = np.hstack([x, np.ones((len(x), 1))]) * root[:, None], labels * root
    total_beta = beta * float(weight.sum())
    patterns = draw_gates(X, gates, np.random.default_rng(seed))
    solution = solve(
        X, y, patterns, total_beta, tolerance=tolerance, iterations=iterations, rank=rank, seed=seed, progress=progress
    )
    if not solution.converged:
        warnings.warn(
            f"preference_head: ADMM stopped after {solution.iterations} iterations with residuals "
            f"{solution.primal:.1e} and {solution.dual:.1e}, above head.tolerance {tolerance}; "
            "set head.iterations higher",
            WinnowWarning,
            stacklevel=2,
        )
    inner, outer = recover(solution.v)
    if not len(outer):
        raise WinnowError(f"preference_head: head.beta {beta} leaves no neuron; set it lower")
    figures = {
        "neurons": float(len(outer)),
        "iterations": float(solution.iterations),
        "converged": float(solution.converged),
        "primal_residual": solution.primal,
        "dual_residual": solution.dual,
        "objective": loss(X, y, total_beta, inner, outer) / float(weight.sum()),
    }
    return last_layer(ReluHead(inner[:, :-1], inner[:, -1], outer), pairs, scale, margin, ridge), figures


def last_layer(first: ReluHead, pairs: PairFeatures, scale: float, margin: float, ridge: float) -> ReluHead:
    """Return `first` with the outer weights at the minimum of the preference loss, which is strictly convex in them.

    Raises WinnowError if no minimum is found.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    gaps = first.activations(pairs.chosen) - first.activations(pairs.rejected)
    share = pairs.weight / pairs.weight.sum()

    def loss_and_gradient(outer: np.ndarray) -> tuple[float, np.ndarray]:
        shortfall = margin - scale * (gaps @ outer)
        value = share @ np.logaddexp(0, shortfall) + ridge / 2 * outer @ outer
        return float(value), ridge * outer - scale * (share * expit(shortfall)) @ gaps

    options = {"maxiter": 10_000, "ftol": 0, "gtol": 1e-8}
    result = minimize(loss_and_gradient, first.outer, jac=True, method="L-BFGS-B", options=options)
    # With ftol 0 L-BFGS may end in a failed line search at the minimum. The loss is ridge-strongly convex, and so at
    # most ||gradient||^2 / (2 ridge) above its minimum.
    if not (result.success or result.jac @ result.jac / (2 * ridge) < MAX_LOSS_GAP):
        raise WinnowError(f"preference_head: no minimum of the last layer ({result.message}); set head.ridge higher")
    return replace(first, outer=result.x)


@head()
def logistic(pairs: PairFeatures, progress: ProgressCallback, *, C: Positive = 1.0) -> TrainedHead:
    """Fit scikit-learn's LogisticRegression to the same rows: the baseline. z = w.x + b is relu(z) - relu(-z)."""
    from sklearn.linear_model import LogisticRegression

    x, labels, weight = pairs.as_classification()
    model = LogisticRegression(C=C, max_iter=10_000).fit(x, labels, sample_weight=weight)
    w, b = model.coef_[0], model.intercept_[0]
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
    """Train a head on pairs of train prompts, and measure it on those of held-out prompts, if there are any.

    Features are standardised by the training rows' mean and sd, which is then folded into the neurons: a head
    scores raw features. Raises WinnowError if fewer than two pairs can be trained on.
    """
    from threadpoolctl import threadpool_limits

    import stages.network.device  # noqa: F401 - reads how many threads there are, before they are limited

    # Look up the features of each split's pairs; reject pairs that teach nothing.
    split_of = column_by_id(prompts, "prompt_id", "split")
    x = feature_matrix(features)
    is_finite = np.isfinite(x).all(axis=1)
    row_of = {candidate: row for row, candidate in enumerate(features.column("candidate_id").to_pylist())}
    pairs_by_split = {}
    for split in ("train", "heldout"):
        usable: list[tuple[int, int, float]] = []
        for pair in pairs.to_pylist():
            if split_of[pair["prompt_id"]] != split:
                continue
            chosen, rejected = row_of.get(pair["chosen_id"]), row_of.get(pair["rejected_id"])
            if chosen is None or rejected is None:
                reason = "no features"
            elif not (is_finite[chosen] and is_finite[rejected]):
                reason = "features not finite"
            elif (x[chosen] == x[rejected]).all():
                reason = "equal features"
            elif not pair["weight"] > 0:
                reason = "no weight"
            else:
                usable.append((chosen, rejected, pair["weight"]))
                continue
            ctx.reject(reason, place="pairs", prompt=pair["prompt_id"], candidate=pair["chosen_id"])
        rows = np.array([row[:2] for row in usable], dtype=np.int64).reshape(-1, 2)
        weight = np.array([row[2] for row in usable], dtype=np.float64)
        pairs_by_split[split] = PairFeatures(x[rows[:, 0]], x[rows[:, 1]], weight)
    train = pairs_by_split["train"]
    if len(train.weight) < 2:
        raise WinnowError(
            f"preference_head: {len(train.weight)} usable pairs of train prompts, and a head needs 2; "
            "see the step's rejects, and `heldout` of the data"
        )

    # Train on standardised features.
    train_rows, _, _ = train.as_classification()
    mean, sd = train_rows.mean(0), train_rows.std(0)
    sd[sd == 0] = 1.0  # a constant feature carries no information, and is 0 without its mean
    standardised = PairFeatures((train.chosen - mean) / sd, (train.rejected - mean) / sd, train.weight)
    with threadpool_limits(1):  # the order of a sum, and so its last bits, would depend on the number of threads
        trained, figures = check_trained_head(head, head(standardised, ctx.progress), mean.shape[0])
    inner = trained.inner / sd  # fold the standardisation in: inner . (x - mean) / sd
    trained = ReluHead(inner, trained.bias - inner @ mean, trained.outer)

    heldout = {f"heldout/{name}": value for name, value in _measure(trained, pairs_by_split["heldout"]).items()}
    metrics = _measure(trained, train) | figures | heldout
    metric_rows = [{"step": 0, "metric": name, "value": value} for name, value in metrics.items()]
    return trained.to_table(), pa.Table.from_pylist(metric_rows, schema=METRICS)


def check_trained_head(head: Bound, result: Any, width: int) -> TrainedHead:
    """Return the head and the figures that a function made for features of this width; raise WinnowError for others."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], ReluHead)):
        raise head.wrong_result(result, "a ReluHead and a dict of figures")
    trained, figures = result
    neurons = np.size(trained.outer)
    inner = floats(head, trained.inner, (neurons, width), "`inner` of neurons and features")
    bias, outer = (
        floats(head, getattr(trained, name), (neurons,), f"`{name}` of neurons") for name in ("bias", "outer")
    )
    if not isinstance(figures, dict) or not all(isinstance(name, str) for name in figures):
        raise head.wrong_result(figures, "a dict of figures by name")
    return ReluHead(inner, bias, outer), {name: number(head, value, of=name) for name, value in figures.items()}


def _measure(trained: ReluHead, pairs: PairFeatures) -> dict[str, float]:
    """Return the share of pairs in the right order (ties one half), and the area under the ROC curve of all rows."""
    if not len(pairs.weight):
        return {}
    from sklearn.metrics import roc_auc_score

    x, labels, _ = pairs.as_classification()
    scores = trained.score(x)
    chosen, rejected = np.split(scores, 2)
    accuracy = ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()
    return {"accuracy": float(accuracy), "auc": float(roc_auc_score(labels, scores)), "pairs": float(len(chosen))}


@stage(version=1)
def head_reward(features: Features, heads: Heads, ctx: StageContext) -> Rewards:
    """Score candidates by the head, in the head's own unit: any selection can re-rank with these rewards."""
    x = feature_matrix(features)
    is_finite = np.isfinite(x)
    scores = read_relu_head(heads).score(np.where(is_finite, x, 0.0))
    ids = features.select(["prompt_id", "candidate_id"]).to_pylist()
    rewards: list[dict[str, Any]] = []
    for row, usable, score in zip(ids, is_finite.all(axis=1), scores, strict=True):
        if usable:
            rewards.append(row | {"reward": float(score)})
        else:
            prompt, candidate = row["prompt_id"], row["candidate_id"]
            ctx.reject("features not finite", place="features", prompt=prompt, candidate=candidate)
    return pa.Table.from_pylist(rewards, schema=REWARDS)

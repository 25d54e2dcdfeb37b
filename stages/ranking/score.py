"""Room 3, another way: a reward from many comparisons. To add a method, add a function here."""

from collections import Counter
from typing import Annotated

import numpy as np
import pyarrow as pa

from pipeline import Bound, Range, Registry, StageContext, stage
from schemas import Comparisons, Rewards, WinnowError
from schemas.tables import REWARDS
from stages.data.rows import Row, by_prompt

score_method = Registry("score method")
DECIMALS = 8  # of a reward, nats: what only rounding tells apart is a tie
TOLERANCE = 1e-8  # nats, of the last Newton step; the error left is its square
STEPS = 200  # ten are usual
ROUNDING = 1e-9  # of a loss: near the least one, a good step may seem to go up by this


@score_method()
def least_squares(edges: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Minimise sum (theta_left - theta_right - logit)^2 with sum theta = 0: a weighted Laplacian system.

    edges: int [M, 2], indices of left and right, connected. logits: float64 [M]. Returns theta [N], nats.
    """
    incidence = _incidence(edges)
    laplacian = incidence.T @ incidence
    theta: np.ndarray = np.linalg.solve(laplacian + 1 / len(laplacian), incidence.T @ logits)  # 1 / n: sum theta = 0
    return theta


@score_method()
def bradley_terry(
    edges: np.ndarray, logits: np.ndarray, *, ridge: Annotated[float, Range(ge=1e-6)] = 1e-2
) -> np.ndarray:
    """Maximum likelihood of soft wins P = s(logit) under P(i beats j) = s(theta_i - theta_j), by Newton.

    Minimises -sum [P log s(d) + (1 - P) log s(-d)] + ridge / 2 |theta|^2, d = theta_left - theta_right; the ridge
    keeps the unbeaten finite and sum theta = 0. A step that does not go down is halved.
    """
    incidence, wins = _incidence(edges), _sigmoid(logits)

    def loss(theta: np.ndarray) -> float:
        d = incidence @ theta
        return float(np.sum(np.logaddexp(0, d) - wins * d) + ridge / 2 * theta @ theta)

    theta = np.zeros(incidence.shape[1])
    for _ in range(STEPS):
        p = _sigmoid(incidence @ theta)
        gradient = incidence.T @ (p - wins) + ridge * theta
        hessian = incidence.T @ (incidence * (p * (1 - p))[:, None]) + ridge * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        while loss(theta - step) > loss(theta) + ROUNDING and np.abs(step).max() > TOLERANCE:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() <= TOLERANCE:
            centred: np.ndarray = theta - theta.mean()
            return centred
    raise WinnowError(f"bradley_terry: no maximum in {STEPS} Newton steps; set a larger `ridge` (it is {ridge})")


@stage(version=1)
def score(
    comparisons: Comparisons,
    ctx: StageContext,
    *,
    method: Annotated[Bound, score_method] = "least_squares",  # type: ignore[assignment]
) -> Rewards:
    """A reward for every candidate that was compared, nats, mean 0 a prompt: differences are logits of winning.

    Where comparisons fall into several groups with none between them, no number says which is better: only the
    largest group has rewards.
    """
    rows: list[Row] = []
    for prompt, group in by_prompt(comparisons):
        kept = _connected(prompt, group, ctx)
        names = sorted({match[side] for match in kept for side in ("left_id", "right_id")})
        index = {name: n for n, name in enumerate(names)}
        edges = np.array([(index[match["left_id"]], index[match["right_id"]]) for match in kept])
        theta = method(edges, np.array([match["logit"] for match in kept])).round(DECIMALS) + 0.0
        rows += (
            dict(prompt_id=prompt, candidate_id=name, reward=value)
            for name, value in zip(names, theta.tolist(), strict=True)
        )
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _connected(prompt: str, group: list[Row], ctx: StageContext) -> list[Row]:
    """The comparisons of the largest connected group (of several, that of the first id); the others are left out."""
    home = _homes(group)
    largest = min(Counter(home.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    for name in sorted(home):
        if home[name] != largest:
            ctx.reject("not compared with the rest", place="comparisons", prompt=prompt, candidate=name)
    return [match for match in group if home[match["left_id"]] == largest]


def _homes(group: list[Row]) -> dict[str, str]:
    """Of every candidate, the first id of its connected group."""
    home: dict[str, str] = {}
    for match in group:
        left, right = (home.setdefault(match[side], match[side]) for side in ("left_id", "right_id"))
        first, other = sorted((left, right))
        home = {name: first if its == other else its for name, its in home.items()}
    return home


def _incidence(edges: np.ndarray) -> np.ndarray:
    """[M, N]: 1 at the left of a comparison, -1 at its right."""
    rows = np.arange(len(edges))
    incidence = np.zeros((len(edges), edges.max() + 1))
    incidence[rows, edges[:, 0]] += 1
    incidence[rows, edges[:, 1]] -= 1
    return incidence


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.exp(-np.logaddexp(0, -x))
    return result

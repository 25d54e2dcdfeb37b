"""Stage `score`: a reward from many comparisons. To add a method, add a function here."""

from typing import Annotated

import numpy as np
import pyarrow as pa

from pipeline import Bound, Range, Registry, StageContext, stage
from schemas import Comparisons, Rewards, WinnowError
from schemas.tables import REWARDS
from stages.data.rows import Row, rows_by_prompt
from stages.results import floats

score_method = Registry("score method", "edges", "logits")
REWARD_DECIMALS = 8  # of a reward, nats: numbers that only rounding tells apart are a tie
MAX_EVALUATIONS = 1000  # of the gradient; a few dozen are usual


@score_method()
def least_squares(edges: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Minimise sum (theta_left - theta_right - logit)^2 with sum theta = 0: a weighted Laplacian system.

    edges: int [M, 2], indices of left and right, connected. logits: float64 [M]. Returns theta [N], nats.
    """
    identity = np.eye(edges.max() + 1)
    incidence = identity[edges[:, 0]] - identity[edges[:, 1]]  # [M, N]: 1 at the left of a comparison, -1 at its right
    laplacian = incidence.T @ incidence
    # Constants are the Laplacian's null space: adding 1 / n to every entry makes it regular, and sum theta = 0.
    return np.linalg.solve(laplacian + 1 / len(laplacian), incidence.T @ logits)


@score_method(version=2)
def bradley_terry(
    edges: np.ndarray, logits: np.ndarray, *, ridge: Annotated[float, Range(ge=1e-6, lt=float("inf"))] = 1e-2
) -> np.ndarray:
    """Maximise the likelihood of soft wins P = s(logit) under P(i beats j) = s(theta_i - theta_j).

    Minimises -sum [P log s(d) + (1 - P) log s(-d)] + ridge / 2 |theta|^2, d = theta_left - theta_right; the ridge
    keeps undefeated candidates finite and sum theta = 0. Takes and returns what `least_squares` does; raises
    WinnowError if it does not converge.
    """
    from scipy.optimize import root
    from scipy.special import expit

    identity, wins = np.eye(edges.max() + 1), expit(logits)
    incidence = identity[edges[:, 0]] - identity[edges[:, 1]]  # [M, N]: 1 at the left of a comparison, -1 at its right

    def gradient_and_hessian(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = expit(incidence @ theta)
        hessian = incidence.T @ (incidence * (p * (1 - p))[:, None]) + ridge * identity
        return incidence.T @ (p - wins) + ridge * theta, hessian

    # The loss is strictly convex, so its minimum is the one root of its gradient. Solvers that look at the loss itself
    # (`minimize`, trust-exact) stop where its differences are rounding, 1e-8 of a gradient: too far for exact ties.
    options = dict(xtol=1e-14, ftol=1e-14, maxiter=MAX_EVALUATIONS)
    solution = root(gradient_and_hessian, np.zeros(len(identity)), jac=True, method="lm", options=options)
    if not solution.success:
        raise WinnowError(f"bradley_terry: no maximum with `ridge` {ridge} ({solution.message}): set a larger `ridge`")
    return solution.x - solution.x.mean()


@stage(version=1)
def score(
    comparisons: Comparisons,
    ctx: StageContext,
    *,
    method: Annotated[Bound, score_method] = "least_squares",  # type: ignore[assignment]
) -> Rewards:
    """Compute a reward for every candidate that was compared, nats, mean 0 per prompt: differences are win logits.

    If a prompt's comparisons fall into several groups that are not connected, no number says how these compare:
    only the largest group (of equal ones, that of the first id) has rewards, and the others are rejected.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows: list[Row] = []
    for prompt, group in rows_by_prompt(comparisons):
        # Graph with candidates as nodes, in order of id, and comparisons as edges.
        names = np.array(sorted({match[side] for match in group for side in ("left_id", "right_id")}))
        edges = np.searchsorted(names, [(match["left_id"], match["right_id"]) for match in group])
        logits = np.array([match["logit"] for match in group])

        graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(names), len(names)))
        _, component = connected_components(graph, directed=False)
        sizes = np.bincount(component)[component]
        largest = component == component[sizes.argmax()]  # argmax is the first of equals
        for name in names[~largest]:
            ctx.reject("not compared with the rest", place="comparisons", prompt=prompt, candidate=str(name))

        # Edges of the largest component, with its nodes numbered from 0.
        inside = largest[edges[:, 0]]
        edges = (largest.cumsum() - 1)[edges[inside]]
        result = floats(method, method(edges, logits[inside]), (int(largest.sum()),), "one per candidate")
        theta = result.round(REWARD_DECIMALS) + 0.0  # + 0.0: no -0.0 in a table
        for name, value in zip(names[largest].tolist(), theta.tolist(), strict=True):
            rows.append(dict(prompt_id=prompt, candidate_id=name, reward=value))
    return pa.Table.from_pylist(rows, schema=REWARDS)

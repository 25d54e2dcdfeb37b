"""Stage `score`: a reward from many comparisons. To add a method, add a function here."""

from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Bound, Columns, Range, Registry, StageContext, stage
from schemas import Comparisons, Rewards, WinnowError
from schemas.tables import REWARDS
from stages.data.rows import column_of, in_order_of_prompts, numbers_of, starts_of_prompts
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


@stage(version=1, by_prompt=lambda options: True)
def score(
    comparisons: Annotated[Comparisons, Columns("prompt_id", "left_id", "right_id", "logit")],
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

    rows = in_order_of_prompts(comparisons)
    prompts, starts = starts_of_prompts(column_of(rows, "prompt_id"))
    if not len(prompts):
        return REWARDS.empty_table()

    # One graph of all prompts, with candidates as nodes in order of prompt and id, and comparisons as edges.
    ids = pa.concat_arrays([column_of(rows, "left_id"), column_of(rows, "right_id")])
    names = pc.unique(ids)
    names = names.take(pc.sort_indices(names))
    prompt_of_row = np.repeat(np.arange(len(prompts)), np.diff(starts))
    code = np.tile(prompt_of_row, 2) * len(names) + pc.index_in(ids, value_set=names).to_numpy()
    nodes, numbers = np.unique(code, return_inverse=True)
    prompt_of_node, name_of_node = np.divmod(nodes, len(names))
    node_starts = np.searchsorted(prompt_of_node, np.arange(len(prompts) + 1))
    edges = numbers.reshape(2, -1).T
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)

    # Of each prompt the largest component counts, of equal ones that of the first id.
    sizes = np.bincount(component)[component]
    best_first = np.lexsort((np.arange(len(nodes)), -sizes, prompt_of_node))
    is_scored = component == np.repeat(component[best_first[node_starts[:-1]]], np.diff(node_starts))
    node_names = names.take(pa.array(name_of_node))
    node_prompts = prompts.take(pa.array(prompt_of_node))
    is_unconnected = pa.array(~is_scored)
    ctx.reject_rows(
        node_prompts.filter(is_unconnected),
        candidates=node_names.filter(is_unconnected),
        reason="not compared with the rest",
        place="comparisons",
    )

    # Edges of the largest component, with its nodes numbered from 0.
    logits, theta = numbers_of(rows, "logit"), np.zeros(len(nodes))
    for begin, end, first, last in zip(starts[:-1], starts[1:], node_starts[:-1], node_starts[1:], strict=True):
        scored = is_scored[first:last]
        of_prompt = edges[begin:end] - first
        inside = scored[of_prompt[:, 0]]
        of_component = (scored.cumsum() - 1)[of_prompt[inside]]
        result = method(of_component, logits[begin:end][inside])
        theta[first:last][scored] = floats(method, result, (int(scored.sum()),), "one per candidate")
    has_reward = pa.array(is_scored)
    columns = {
        "prompt_id": node_prompts.filter(has_reward),
        "candidate_id": node_names.filter(has_reward),
        "reward": pa.array(theta[is_scored].round(REWARD_DECIMALS) + 0.0),  # + 0.0: no -0.0 in a table
    }
    arrays = [columns.get(field.name, pa.nulls(int(is_scored.sum()), field.type)) for field in REWARDS]
    return pa.Table.from_arrays(arrays, schema=REWARDS)

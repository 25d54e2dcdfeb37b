"""The convex program of a two-layer ReLU network: its optimality conditions, and a general convex solver's answer.

With r = y - F v and multipliers m >= 0 of G v >= 0, the optimum has, for each block b of v,
(F^T r + G^T m)_b = beta v_b / ||v_b||, or a norm of at most beta where v_b = 0; and m . G v = 0.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.head.convex import (
    ROWS_PER_BLOCK,
    Admm,
    Program,
    conjugate_gradients,
    draw_gates,
    loss,
    nystrom,
    recover,
    shrink,
    solve,
)
from stages.head.train import PairFeatures, head

# The same instances in each run: of random ones a few take all of their iterations, and minutes to be made smaller.
few = settings(deadline=None, max_examples=5, derandomize=True)
SIZES = [(30, 3, 6, 0.5), (20, 2, 5, 0.01)]  # rows, features, gates, beta


def instance(n, d, count, seed=0):
    """Labels that no line separates: the sign of a product, with noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, np.sign(X[:, 0] * X[:, -1] + 0.3 * rng.normal(size=n)), draw_gates(X, count, rng)


class Numbers:
    """The operators of a program on arrays of numpy."""

    def __init__(self, X, y, gates, beta):
        self.program, self.y, self.beta = Program(X, y, gates, beta), y, beta

    def __getattr__(self, name):
        return on_arrays(getattr(self.program, name))


def on_arrays(operator):
    return lambda array: operator(torch.as_tensor(array)).numpy()


def objective(program, u):
    """1/2 ||F u - y||^2 + beta sum ||u_i||."""
    error = program.predict(u) - program.y
    return error @ error / 2 + program.beta * np.linalg.norm(u, axis=-1).sum()


def optimum(X, y, gates, beta, tolerance=1e-7):
    return solve(X, y, gates, beta, tolerance=tolerance, iterations=20_000).v


def network(X, v):
    inner, outer = recover(v)
    return np.maximum(X @ inner.T, 0) @ outer


def general_solver(X, y, gates, beta):
    """The same program as cvxpy states it, by CLARABEL: its value, and the predictions, which are unique."""
    import cvxpy

    cp: Any = cvxpy  # half of its names are typed
    positive, negative = ([cp.Variable(X.shape[1]) for _ in gates] for _ in range(2))
    terms = list(zip(gates.astype(float), positive, negative, strict=True))
    predicted = sum(cp.multiply(gate, X @ (v - w)) for gate, v, w in terms)
    cones = [cp.multiply(2 * gate - 1, X @ u) >= 0 for gate, v, w in terms for u in (v, w)]
    decay = sum(cp.norm(u) for u in positive + negative)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(predicted - y) + beta * decay), cones)
    problem.solve(solver=cp.CLARABEL)
    return problem.value, predicted.value


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_admm_agrees_with_a_general_convex_solver(size):
    """Objective and predictions to 1e-4, for labels +-1; the recovered network predicts what the program does."""
    *shape, beta = size
    X, y, gates = instance(*shape)
    value, predicted = general_solver(X, y, gates, beta)
    program, v = Numbers(X, y, gates, beta), optimum(X, y, gates, beta)
    assert objective(program, v) == pytest.approx(value, rel=1e-4)
    assert program.predict(v) == pytest.approx(predicted, abs=1e-4)
    assert network(X, v) == pytest.approx(program.predict(v), abs=1e-4)


@few
@given(st.integers(0, 10**6), st.integers(8, 30), st.integers(1, 4), st.integers(1, 6), st.floats(0.1, 3.0))
def test_the_solution_meets_the_optimality_conditions(seed, n, d, count, beta):
    """Stationarity, feasibility, complementarity; and so weak duality is tight: the dual value is y.r - ||r||^2 / 2."""
    X, y, gates = instance(n, d, count, seed)
    program, solution = Numbers(X, y, gates, beta), solve(X, y, gates, beta, tolerance=1e-6, iterations=20_000)
    assume(solution.iterations < 20_000)  # without convergence, which is reported, there is no optimum to check
    v, m = solution.v, solution.multipliers
    assert max(solution.primal, solution.dual) <= 1e-6
    r, constraints = y - program.predict(v), program.constrain(v)
    gradient, norms = program.predict_adjoint(r) + program.constrain_adjoint(m), np.linalg.norm(v, axis=-1)
    unit = v / np.where(norms > 0, norms, 1)[..., None]
    slack = 1e-3 * float(np.linalg.norm(program.predict_adjoint(y)))
    assert (np.linalg.norm(np.where((norms > 1e-4)[..., None], gradient - beta * unit, 0), axis=-1) <= slack).all()
    assert (np.linalg.norm(gradient, axis=-1) <= beta + slack).all()
    assert constraints.min() >= -1e-3
    assert m.min() >= 0
    assert abs((m * constraints).sum()) <= slack
    assert y @ r - r @ r / 2 == pytest.approx(objective(program, v), abs=slack)


@few
@given(st.integers(0, 10**6), st.integers(1, 300))
def test_a_stopped_solve_is_feasible_for_the_gates_of_its_neurons(seed, iterations):
    """relu(X v) = D(v) X v with D(v) = diag(1[X v >= 0]), whose cone contains v: exact at any tolerance.

    So the network's loss is that of this feasible point: 1/2 ||f - y||^2 + beta sum ||v||.
    """
    X, y, gates = instance(24, 3, 5, seed)
    v = solve(X, y, gates, 0.3, iterations=iterations).v
    products = v @ X.T
    active = products >= 0
    assert ((2.0 * active - 1) * products).min() >= 0
    positive, negative = (active * products).sum(1)
    assert network(X, v) == pytest.approx(positive - negative, abs=1e-10)
    error, decay = positive - negative - y, 0.3 * np.linalg.norm(v, axis=-1).sum()
    assert loss(X, y, 0.3, *recover(v)) == pytest.approx(error @ error / 2 + decay)


def dense(operator, shape):
    size = int(np.prod(shape))
    return np.stack([operator(unit.reshape(shape)).ravel() for unit in np.eye(size)], axis=1)


@few
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(1e-4, 10.0))
def test_preconditioned_conjugate_gradients_equal_a_direct_solve(seed, rank, rho):
    """I + G^T G + F^T F / rho, from F and G written out as matrices."""
    X, y, gates = instance(20, 3, 4, seed)
    admm = Admm(Program(X, y, gates, 1.0), rank, np.random.default_rng(seed))
    admm.rho, shape = rho, tuple(admm.u.shape)
    F, G = (dense(on_arrays(operator), shape) for operator in (admm.program.predict, admm.program.constrain))
    direct = np.eye(F.shape[1]) + G.T @ G + F.T @ F / rho
    b = np.random.default_rng(seed).normal(size=shape)
    inverse = nystrom(admm.curvature, b.size, rank, np.random.default_rng(1))
    target = torch.as_tensor(b.ravel())
    x = conjugate_gradients(admm.system, target, torch.zeros_like(target), inverse, 1e-10).numpy()
    assert x == pytest.approx(np.linalg.solve(direct, b.ravel()), abs=1e-8)


def test_a_sketch_of_full_rank_inverts_the_system():
    """rank = size: U diag(e) U^T is M itself, and with damping 1 the preconditioner is (I + M)^-1 (e_r + 1)."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    M = root @ root.T
    inverse = dense(on_arrays(nystrom(lambda x: torch.as_tensor(M) @ x, 6, 6, rng)), (6,))
    assert inverse @ (np.eye(6) + M) == pytest.approx(np.eye(6) * (1 + np.linalg.eigvalsh(M)[0]), abs=1e-6)


def test_the_preconditioner_saves_conjugate_gradients():
    """Ten eigenvalues of 1e4 among ones: a sketch of rank 10 leaves a system with one cluster."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(80, 80)))[0]
    M = torch.as_tensor((U * np.r_[np.geomspace(1e2, 1e4, 10), np.full(70, 1e-3)]) @ U.T)
    b = torch.as_tensor(rng.normal(size=80))
    products = []
    for inverse in (nystrom(lambda x: M @ x, 80, 10, rng), lambda x: x):
        products.append(0)

        def system(x):
            products[-1] += 1
            return x + M @ x

        conjugate_gradients(system, b, torch.zeros_like(b), inverse, 1e-9)
    assert products[0] * 2 < products[1]


def test_the_number_of_threads_changes_no_bit():
    """Of a program with three blocks of rows, whatever number torch has, which it has again afterwards."""
    X, y, gates = instance(2 * ROWS_PER_BLOCK + 100, 4, 5)
    before, solutions = torch.get_num_threads(), []
    try:
        for threads, of_torch in ((1, 1), (2, 1), (3, 2)):
            torch.set_num_threads(of_torch)
            number = torch.get_num_threads()  # 1 whatever is set, where vLLM has bound this process to a core
            solutions.append(solve(X, y, gates, 1.0, iterations=40, threads=threads))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    one, *others = ((solution.v.tobytes(), solution.primal, solution.dual) for solution in solutions)
    assert others == [one, one]


def test_blocks_of_rows_add_up_to_all_of_them(monkeypatch):
    """The operators of a program in blocks are those of the program in one."""
    X, y, gates = instance(50, 3, 4)
    whole = Numbers(X, y, gates, 0.5)
    monkeypatch.setattr("stages.head.convex.ROWS_PER_BLOCK", 16)
    blocks = Numbers(X, y, gates, 0.5)
    assert blocks.program.sizes == [16, 16, 16, 2]
    rng = np.random.default_rng(1)
    u, r, s = (rng.normal(size=shape) for shape in (blocks.program.shape, 50, (2, len(gates), 50)))
    for name, argument in (("predict", u), ("predict_adjoint", r), ("constrain", u), ("constrain_adjoint", s)):
        assert getattr(blocks, name)(argument) == pytest.approx(getattr(whole, name)(argument))
    assert blocks.predict_normal(u) == pytest.approx(whole.predict_adjoint(whole.predict(u)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_optimum_of_a_cpu():
    X, y, gates = instance(3000, 6, 8)
    losses = [
        loss(X, y, 1.0, *recover(solve(X, y, gates, 1.0, tolerance=1e-5, device=torch.device(name)).v))
        for name in ("cpu", "cuda")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_gates_are_distinct_and_seeded():
    """In one dimension there are two patterns, x >= 0 and x <= 0, however many are drawn."""
    X = np.array([[-1.0], [2.0], [3.0]])
    gates, again = (draw_gates(X, 50, np.random.default_rng(0)) for _ in range(2))
    assert sorted(gates.tolist()) == [[False, True, True], [True, False, False]]
    assert (gates == again).all()


def test_more_gates_never_make_the_optimum_worse():
    """The larger program contains the smaller one: its other blocks are 0."""
    for seed in range(6):
        X, y, gates = instance(20, 2, 6, seed)
        fewer, more = (objective(Numbers(X, y, g, 0.5), optimum(X, y, g, 0.5, 1e-6)) for g in (gates[:2], gates))
        assert more <= fewer * (1 + 1e-4)


def test_a_large_beta_leaves_no_neuron():
    """v = 0 is optimal as soon as beta >= ||(F^T y)_b|| for every block."""
    X, y, gates = instance(30, 3, 6)
    beta = float(np.linalg.norm(Numbers(X, y, gates, 0.0).predict_adjoint(y), axis=-1).max())
    assert not optimum(X, y, gates, beta * 1.01).any()


def test_shrinking_is_the_proximal_map_of_the_norm():
    """argmin 1/2 ||x - z||^2 + by ||x||: z (1 - by / ||z||), or 0 inside the ball."""
    z = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert shrink(torch.as_tensor(z), 1.0).numpy() == pytest.approx(np.array([[2.4, 3.2], [0.0, 0.0], [0.0, 0.0]]))


def test_progress_is_reported_for_every_permitted_iteration():
    reports = []
    X, y, gates = instance(30, 3, 6)
    solution = solve(X, y, gates, 0.5, iterations=7, progress=lambda done, total, unit: reports.append((done, total)))
    assert reports == [(n, 7) for n in range(1, 8)]
    assert solution.iterations == 7
    assert max(solution.primal, solution.dual) > 1e-4


def test_the_defaults_converge_and_report_it():
    """At the default tolerance the network's own loss is within a hundredth of the program's optimum.

    The network has gates of its own, and so may even be a little below the optimum of those it was solved for.
    """
    X, y, gates = instance(100, 6, 8)
    solution = solve(X, y, gates, 1.0)
    assert solution.converged
    best, _ = general_solver(X, y, gates, 1.0)
    assert loss(X, y, 1.0, *recover(solution.v)) == pytest.approx(best, rel=0.01)
    assert not solve(X, y, gates, 1.0, iterations=5).converged


def test_a_head_that_is_not_converged_warns_and_its_metrics_show_it():
    rng = np.random.default_rng(0)
    pairs = PairFeatures(rng.normal(size=(30, 3)), rng.normal(size=(30, 3)), np.ones(30))
    with pytest.warns(UserWarning, match=r"ADMM stopped after 5 iterations.*head\.iterations"):
        _, stopped = head.bind({"name": "convex_relu", "iterations": 5})(pairs, lambda *report: None)
    assert (stopped["converged"], stopped["iterations"]) == (0.0, 5.0)
    _, figures = head.bind("convex_relu")(pairs, lambda *report: None)
    assert figures["converged"] == 1.0
    assert max(figures["primal_residual"], figures["dual_residual"]) <= 1e-3

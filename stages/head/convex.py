"""Two-layer ReLU network as a convex program: the global optimum for the gates drawn, to a tolerance.

    min 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||)
    subject to (2 D_i - I) X v_i >= 0 and (2 D_i - I) X w_i >= 0

Pilanci and Ergen 2020, arXiv:2002.10553; D_i = diag(1[X g_i >= 0]) for P random gates g_i. ADMM with
Nystrom-preconditioned conjugate gradients as in CRONOS (arXiv:2411.01088) and COALA (arXiv:2605.23244).

X is [n, d]; blocks are [2, P, d]: v, then w. The matrix of n x dP is never formed. float64.

The constraints hold exactly in the network that is recovered, whatever the tolerance: a neuron's ReLU has its own
gate, and each block of v satisfies the cone of that gate. At the optimum it is the gate it was solved for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
ProgressCallback = Callable[[float, float, str], None]
ROUNDING = 1e-14  # relative error of a solve below which conjugate gradients cannot go
MAX_CG_ITERATIONS = 1000
TINY = float(np.finfo(float).tiny)


def draw_gates(X: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw `count` sign patterns X g >= 0, g ~ N(0, I), and return the P distinct ones; bool [P, n]."""
    patterns = rng.normal(size=(count, X.shape[1])) @ X.T >= 0
    return np.stack(list({pattern.tobytes(): pattern for pattern in patterns}.values()))


class Program:
    """Convex program: its data, and the operators F (predictions) and G (constraints) with their adjoints."""

    def __init__(self, X: Array, y: Array, gates: Array, beta: float) -> None:
        self.X, self.y, self.beta = X, y, beta
        self.gates = gates.astype(np.float64)
        self.signs = 2 * self.gates - 1
        self.gram = X.T @ X

    def predict(self, u: Array) -> Array:
        """Return F u = sum_i D_i X (v_i - w_i), [2, P, d] -> [n]."""
        return (((u[0] - u[1]) @ self.X.T) * self.gates).sum(0)

    def predict_adjoint(self, r: Array) -> Array:
        """Return F^T r, [n] -> [2, P, d]."""
        half = (self.gates * r) @ self.X
        return np.stack([half, -half])

    def constrain(self, u: Array) -> Array:
        """Return G u = (2 D_i - I) X v_i, [2, P, d] -> [2, P, n]; not negative where the constraints hold."""
        return self.signs * (u @ self.X.T)

    def constrain_adjoint(self, s: Array) -> Array:
        """Return G^T s, [2, P, n] -> [2, P, d]. G^T G is X^T X on every block, because signs square to 1."""
        return (self.signs * s) @ self.X


@dataclass(frozen=True)
class Solution:
    """Result of `solve`; residuals are relative to ||y|| and ||F^T y||."""

    v: Array  # [2, P, d]
    multipliers: Array  # of the cones, >= 0, [2, P, n]
    iterations: int
    primal: float
    dual: float
    converged: bool  # false: stopped after the permitted iterations


def solve(
    X: Array,
    y: Array,
    gates: Array,
    beta: float,
    *,
    tolerance: float = 1e-3,
    iterations: int = 3000,
    rank: int = 20,
    seed: int = 0,
    progress: ProgressCallback = lambda *progress: None,
) -> Solution:
    """Run ADMM until both residuals are at most `tolerance`, or for `iterations`.

    X is scaled to norm 1, which is the same program in u ||X|| with beta / ||X||, well conditioned.
    """
    norm = float(np.linalg.norm(X, 2))
    admm = Admm(Program(X / norm, y, gates, beta / norm), rank, np.random.default_rng(seed))
    done, interval, next_balance = 0, 10.0, 10.0
    while done < iterations and max(admm.primal, admm.dual) > tolerance:
        admm.step()
        done += 1
        progress(done, iterations, "ADMM iterations")
        if done >= next_balance:
            admm.balance()
            interval *= 1.5
            next_balance += interval  # ever rarer, so that in the end the penalty is fixed and ADMM converges
    converged = max(admm.primal, admm.dual) <= tolerance
    multipliers = np.maximum(-admm.rho * admm.dual_s, 0)
    return Solution(admm.v / norm, multipliers, done, admm.primal, admm.dual, converged)


class Admm:
    """ADMM on the splitting u = v, G u = s with scaled multipliers dual_v, dual_s. Boyd et al. 2011, sec. 3."""

    def __init__(self, program: Program, rank: int, rng: np.random.Generator) -> None:
        from scipy.sparse.linalg import LinearOperator

        self.program, self.rank, self.rng = program, rank, rng
        blocks = (2, len(program.gates), program.X.shape[1])
        self.u, self.v, self.dual_v = (np.zeros(blocks) for _ in range(3))
        self.s, self.dual_s = (np.zeros((*blocks[:2], len(program.y))) for _ in range(2))
        self.Fty = program.predict_adjoint(program.y)
        self.y_norm = float(np.linalg.norm(program.y))
        self.Fty_norm = max(float(np.linalg.norm(self.Fty)), TINY)
        self.rho, self.primal, self.dual = 1.0, np.inf, np.inf
        size = self.u.size
        self.system = LinearOperator((size, size), lambda x: x + self.curvature(x), dtype=float)
        self.inverse = nystrom(self.curvature, size, rank, rng)

    def curvature(self, x: Array) -> Array:
        """Return G^T G u + F^T F u / rho for u flat; the linear system of each iteration is I plus this."""
        p, u = self.program, x.reshape(self.u.shape)
        return (u @ p.gram + p.predict_adjoint(p.predict(u)) / self.rho).ravel()

    def step(self) -> None:
        """Run one iteration: u by a linear solve, v and s by their proximal maps, then the multipliers."""
        from scipy.sparse.linalg import cg

        p = self.program
        # u: the solve starts from the last one, and its error is a tenth of what the worse residual allows.
        target = self.Fty / self.rho + self.v - self.dual_v + p.constrain_adjoint(self.s - self.dual_s)
        error = 0.1 * min(self.primal * self.y_norm, self.dual * self.Fty_norm / self.rho, 0.01 * self.y_norm)
        limits = {"rtol": ROUNDING, "atol": error, "maxiter": MAX_CG_ITERATIONS}
        u, _ = cg(self.system, target.ravel(), self.u.ravel(), M=self.inverse, **limits)
        self.u = u.reshape(self.u.shape)
        # v and s
        Gu = p.constrain(self.u)
        v, s = shrink(self.u + self.dual_v, p.beta / self.rho), np.maximum(Gu + self.dual_s, 0)
        change = v - self.v + p.constrain_adjoint(s - self.s)
        self.v, self.s = v, s
        # multipliers and residuals
        self.dual_v += self.u - v
        self.dual_s += Gu - s
        self.primal = float(np.hypot(np.linalg.norm(self.u - v), np.linalg.norm(Gu - s)) / self.y_norm)
        self.dual = float(self.rho * np.linalg.norm(change) / self.Fty_norm)

    def balance(self) -> None:
        """Move rho towards equal residuals (Boyd et al., 3.4.1); the unscaled multipliers do not change."""
        ratio = float(np.clip(np.sqrt(self.primal / max(self.dual, ROUNDING)), 0.1, 10.0))
        if 1 / 1.5 < ratio < 1.5:
            return
        self.rho *= ratio
        self.dual_v /= ratio
        self.dual_s /= ratio
        self.inverse = nystrom(self.curvature, self.u.size, self.rank, self.rng)


def shrink(z: Array, amount: float) -> Array:
    """Reduce each block's norm by `amount`, to at least 0: the proximal map of amount * ||.||."""
    norms = np.linalg.norm(z, axis=-1, keepdims=True)
    return z * np.maximum(1 - amount / np.maximum(norms, TINY), 0)


def nystrom(curvature: Callable[[Array], Array], size: int, rank: int, rng: np.random.Generator) -> Any:
    """Return an approximate inverse of I + M [size, size] from `rank` products with M, as a LinearOperator of scipy.

    Frangella et al. 2021, arXiv:2110.02820: M ~ U diag(e) U^T, and x -> (e_r + 1) U (e + 1)^-1 U^T x + x - U U^T x.
    The damping is 1, because the identity is already in the operator; the shift that keeps the sketch positive is of
    the size of float64's rounding.
    """
    from scipy.sparse.linalg import LinearOperator

    test = np.linalg.qr(rng.normal(size=(size, min(rank, size))))[0]
    image = np.stack([curvature(column) for column in test.T], axis=1)
    shift = np.finfo(float).eps * np.sqrt(size) * np.linalg.norm(image)
    image = image + shift * test
    core = test.T @ image
    root = np.linalg.solve(np.linalg.cholesky((core + core.T) / 2), image.T).T
    U, singular, _ = np.linalg.svd(root, full_matrices=False)
    e = np.maximum(singular**2 - shift, 0)
    gain = (e[-1] + 1) / (e + 1) - 1
    return LinearOperator((size, size), lambda x: x + U @ (gain * (U.T @ x)), dtype=float)


def recover(v: Array) -> tuple[Array, Array]:
    """Return the network of the blocks that are not zero: inner v / sqrt ||v|| [m, d], outer +- sqrt ||v|| [m]."""
    sizes = np.sqrt(np.linalg.norm(v, axis=-1))
    is_used = sizes > 0
    outer = np.stack([sizes[0], -sizes[1]])[is_used]
    return v[is_used] / sizes[is_used][:, None], outer


def loss(X: Array, y: Array, beta: float, inner: Array, outer: Array) -> float:
    """Return a network's own loss, which the program minimises: 1/2 ||f(X) - y||^2 + beta sum |outer| ||inner||."""
    error = np.maximum(X @ inner.T, 0) @ outer - y
    return float(error @ error / 2 + beta * np.abs(outer) @ np.linalg.norm(inner, axis=1))

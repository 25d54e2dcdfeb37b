"""A two-layer ReLU network as a convex program: the global optimum for the gates drawn, to a tolerance.

    min 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||)
    subject to (2 D_i - I) X v_i >= 0 and (2 D_i - I) X w_i >= 0

Pilanci and Ergen 2020, arXiv:2002.10553; D_i = diag(1[X g_i >= 0]) for P random gates g_i. ADMM with
Nystrom-preconditioned conjugate gradients as in CRONOS (arXiv:2411.01088) and COALA (arXiv:2605.23244).

X is [n, d]; blocks are [2, P, d]: v, then w. What is n x dP is never formed. float64.

The constraints hold exactly in the network that is recovered, whatever the tolerance: a neuron's ramp draws its
own gate, and each block of v satisfies the cone of that gate. At the optimum it is the gate it was solved for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Operator = Callable[[Array], Array]
ProgressCallback = Callable[[float, float, str], None]
ROUNDING = 1e-14  # of a solve, relative: conjugate gradients reach no further
MOST = 1000  # conjugate gradients of one solve


def draw_gates(X: Array, count: int, rng: np.random.Generator) -> Array:
    """The distinct ones among `count` sign patterns X g >= 0, g ~ N(0, I); bool [P, n]."""
    patterns = rng.normal(size=(count, X.shape[1])) @ X.T >= 0
    return np.stack(list({pattern.tobytes(): pattern for pattern in patterns}.values()))


class Program:
    """The operators of one instance, and its objective."""

    def __init__(self, X: Array, y: Array, gates: Array, beta: float) -> None:
        self.X, self.y, self.beta = X, y, beta
        self.gates = gates.astype(np.float64)
        self.signs = 2 * self.gates - 1
        self.gram = X.T @ X

    def predict(self, u: Array) -> Array:
        """F u = sum_i D_i X (v_i - w_i), [n]."""
        made: Array = (((u[0] - u[1]) @ self.X.T) * self.gates).sum(0)
        return made

    def spread(self, r: Array) -> Array:
        """F^T r, [2, P, d]."""
        half = (self.gates * r) @ self.X
        return np.stack([half, -half])

    def cones(self, u: Array) -> Array:
        """G u = (2 D_i - I) X v_i, [2, P, n]; none is negative where the constraints hold."""
        made: Array = self.signs * (u @ self.X.T)
        return made

    def fold(self, s: Array) -> Array:
        """G^T s, [2, P, d]. G^T G is X^T X on every block, for signs square to 1."""
        made: Array = (self.signs * s) @ self.X
        return made

    def objective(self, u: Array) -> float:
        error = self.predict(u) - self.y
        return float(error @ error / 2 + self.beta * np.linalg.norm(u, axis=-1).sum())


@dataclass(frozen=True)
class Solution:
    """v: [2, P, d]. multipliers: of the cones, >= 0, [2, P, n]. Residuals are relative to ||y|| and ||F^T y||."""

    v: Array
    multipliers: Array
    iterations: int
    primal: float
    dual: float
    converged: bool  # or stopped at the cap


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
    tell: ProgressCallback = lambda done, total, unit: None,
) -> Solution:
    """ADMM until both residuals are below the tolerance, or as many iterations as are allowed.

    X is scaled to norm 1, which is the same program in u ||X|| with beta / ||X||, well conditioned.
    """
    norm = float(np.linalg.norm(X, 2))
    admm = Admm(Program(X / norm, y, gates, beta / norm), rank, np.random.default_rng(seed))
    done, wait, next_balance = 0, 10.0, 10.0
    while done < iterations and max(admm.primal, admm.dual) > tolerance:
        admm.step()
        done += 1
        tell(done, iterations, "ADMM iterations")
        if done >= next_balance:
            admm.balance()
            wait *= 1.5
            next_balance += wait  # ever rarer, so that in the end the penalty is fixed and ADMM converges
    converged = max(admm.primal, admm.dual) <= tolerance
    return Solution(admm.v / norm, np.maximum(-admm.rho * admm.of_s, 0), done, admm.primal, admm.dual, converged)


class Admm:
    """Split u = v, G u = s with scaled multipliers of_v, of_s; relaxation 1. Boyd et al. 2011, sec. 3."""

    def __init__(self, program: Program, rank: int, rng: np.random.Generator) -> None:
        self.program, self.rank, self.rng = program, rank, rng
        blocks = (2, len(program.gates), program.X.shape[1])
        self.u, self.v, self.of_v = (np.zeros(blocks) for _ in range(3))
        self.s, self.of_s = (np.zeros((*blocks[:2], len(program.y))) for _ in range(2))
        self.pull = program.spread(program.y)
        self.size = float(np.linalg.norm(program.y))
        self.force = max(float(np.linalg.norm(self.pull)), float(np.finfo(float).tiny))
        self.rho, self.primal, self.dual = 1.0, np.inf, np.inf
        self.precondition = nystrom(self.curvature, blocks, rank, rng)

    def curvature(self, u: Array) -> Array:
        """G^T G u + F^T F u / rho; the system of each iteration is I plus this."""
        p = self.program
        made: Array = u @ p.gram + p.spread(p.predict(u)) / self.rho
        return made

    def step(self) -> None:
        """One iteration. Its solve starts from the last one and is a tenth as wrong as the worse residual allows."""
        p = self.program
        target = self.pull / self.rho + self.v - self.of_v + p.fold(self.s - self.of_s)
        error = 0.1 * min(self.primal * self.size, self.dual * self.force / self.rho, 0.01 * self.size)
        self.u = conjugate_gradients(lambda x: x + self.curvature(x), target, self.u, self.precondition, error)
        inside = p.cones(self.u)
        v, s = shrink(self.u + self.of_v, p.beta / self.rho), np.maximum(inside + self.of_s, 0)
        moved = v - self.v + p.fold(s - self.s)
        self.v, self.s = v, s
        self.of_v += self.u - v
        self.of_s += inside - s
        self.primal = float(np.hypot(np.linalg.norm(self.u - v), np.linalg.norm(inside - s)) / self.size)
        self.dual = float(self.rho * np.linalg.norm(moved) / self.force)

    def balance(self) -> None:
        """Move rho to where the residuals are alike (ibid., 3.4.1); the multipliers themselves stay."""
        ratio = float(np.clip(np.sqrt(self.primal / max(self.dual, ROUNDING)), 0.1, 10.0))
        if 1 / 1.5 < ratio < 1.5:
            return
        self.rho *= ratio
        self.of_v /= ratio
        self.of_s /= ratio
        self.precondition = nystrom(self.curvature, self.u.shape, self.rank, self.rng)


def shrink(z: Array, by: float) -> Array:
    """Each block's norm less `by`, at least 0: the proximal map of by * ||.||."""
    norms = np.linalg.norm(z, axis=-1, keepdims=True)
    made: Array = z * np.maximum(1 - by / np.maximum(norms, np.finfo(float).tiny), 0)
    return made


def nystrom(curvature: Operator, shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> Operator:
    """An approximate inverse of I + M from `rank` products with M (Frangella et al. 2021, arXiv:2110.02820).

    M ~ U diag(e) U^T, and x -> (e_r + 1) U (e + 1)^-1 U^T x + x - U U^T x. The damping is 1, for the identity
    is already in the operator; the shift that keeps the sketch positive is of the size of float64's rounding.
    """
    size = int(np.prod(shape))
    test = np.linalg.qr(rng.normal(size=(size, min(rank, size))))[0]
    image = np.stack([curvature(column.reshape(shape)).ravel() for column in test.T], axis=1)
    shift = np.finfo(float).eps * np.sqrt(size) * np.linalg.norm(image)
    image = image + shift * test
    core = test.T @ image
    root = np.linalg.solve(np.linalg.cholesky((core + core.T) / 2), image.T).T
    U, singular, _ = np.linalg.svd(root, full_matrices=False)
    e = np.maximum(singular**2 - shift, 0)
    gain = (e[-1] + 1) / (e + 1) - 1

    def apply(x: Array) -> Array:
        flat = x.ravel()
        made: Array = (flat + U @ (gain * (U.T @ flat))).reshape(shape)
        return made

    return apply


def conjugate_gradients(operator: Operator, b: Array, start: Array, precondition: Operator, error: float) -> Array:
    """x with ||A x - b|| <= error, or as near as rounding lets it come; A positive definite, arrays of one shape."""
    x = start.copy()
    rest = b - operator(x)
    error = max(error, ROUNDING * float(np.linalg.norm(b)))
    toward = np.zeros_like(b)
    last = np.inf
    for _ in range(MOST):
        if np.linalg.norm(rest) <= error:
            break
        better = precondition(rest)
        size = np.vdot(rest, better)
        toward = better + size / last * toward
        image = operator(toward)
        step = size / np.vdot(toward, image)
        x += step * toward
        rest -= step * image
        last = size
    return x


def recover(v: Array) -> tuple[Array, Array]:
    """ReluHead of the blocks that are not zero: inner v / sqrt ||v|| [m, d], outer +- sqrt ||v|| [m]."""
    sizes = np.sqrt(np.linalg.norm(v, axis=-1))
    kept = sizes > 0
    outer = np.stack([sizes[0], -sizes[1]])[kept]
    return v[kept] / sizes[kept][:, None], outer


def loss(X: Array, y: Array, beta: float, inner: Array, outer: Array) -> float:
    """Of a network itself, which is what the program minimises: 1/2 ||f(X) - y||^2 + beta sum |outer| ||inner||."""
    error = np.maximum(X @ inner.T, 0) @ outer - y
    return float(error @ error / 2 + beta * np.abs(outer) @ np.linalg.norm(inner, axis=1))

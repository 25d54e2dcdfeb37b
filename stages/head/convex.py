"""Two-layer ReLU network as a convex program: the global optimum for the gates drawn, to a tolerance.

    min 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||)
    subject to (2 D_i - I) X v_i >= 0 and (2 D_i - I) X w_i >= 0

Pilanci and Ergen 2020, arXiv:2002.10553; D_i = diag(1[X g_i >= 0]) for P random gates g_i. ADMM with
Nystrom-preconditioned conjugate gradients as in CRONOS (arXiv:2411.01088) and COALA (arXiv:2605.23244).

X is [n, d]; blocks are [2, P, d]: v, then w. The matrix of n x dP is never formed. float64.

**Devices.** Everything is torch on one device: a GPU if there is one. On a CPU the rows of X are cut into blocks of a
fixed size, threads take blocks, and partial sums are added up in the order of the blocks; torch itself has one thread,
because it divides a sum by the number of its threads. So the bits do not depend on the number of threads. A GPU adds up
in another order than a CPU: its solution differs in the last digits, as does the number of iterations now and then.

The constraints hold exactly in the network that is recovered, whatever the tolerance: a neuron's ReLU has its own
gate, and each block of v satisfies the cone of that gate. At the optimum it is the gate it was solved for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stages.network.device import CPU, THREADS, default_device

Array = np.ndarray
Item = TypeVar("Item")
Result = TypeVar("Result")
ProgressCallback = Callable[[float, float, str], None]
Operator = Callable[[Tensor], Tensor]  # linear, of vectors
ROUNDING = 1e-14  # relative error of a solve below which conjugate gradients cannot go
MAX_CG_ITERATIONS = 1000
TINY = float(np.finfo(float).tiny)
# Rows of a block on a CPU. Part of what is computed: another number adds up in another order.
ROWS_PER_BLOCK = 1024


def draw_gates(X: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw `count` sign patterns X g >= 0, g ~ N(0, I), and return the P distinct ones; bool [P, n]."""
    patterns = rng.normal(size=(count, X.shape[1])) @ X.T >= 0
    return np.stack(list({pattern.tobytes(): pattern for pattern in patterns}.values()))


class Program:
    """Convex program: its data, and the operators F (predictions) and G (constraints) with their adjoints.

    threads: the pool that computes blocks of rows; without one they are computed one after the other.
    """

    def __init__(
        self, X: Array, y: Array, gates: Array, beta: float, *, device: torch.device = CPU,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:  # fmt: skip
        self.beta, self.device, self.threads = beta, device, threads
        self.shape = 2, len(gates), X.shape[1]
        self.y = torch.tensor(y, dtype=torch.float64, device=device)
        rows = ROWS_PER_BLOCK if device.type == "cpu" else max(len(X), 1)
        self.sizes = [len(block) for block in self.y.split(rows)]
        # Copies, because torch aligns its memory, on which the bits of a product may depend.
        self.X = torch.tensor(X, dtype=torch.float64, device=device).split(rows)  # of each block [rows, d]
        columns = torch.tensor(gates, dtype=torch.float64, device=device).split(rows, dim=1)
        self.gates = [block.contiguous() for block in columns]  # of each block [P, rows]
        self.signs = [2 * block - 1 for block in self.gates]
        self.gram = self._sum(lambda X: X.T @ X, list(self.X))

    def scaled(self, norm: float) -> "Program":
        """Divide X by `norm` and beta with it, in place: the same program in u * norm."""
        self.X, self.gram, self.beta = tuple(block / norm for block in self.X), self.gram / norm**2, self.beta / norm
        return self

    def _map(self, compute: Callable[[Item], Result], blocks: list[Item]) -> list[Result]:
        return list((self.threads.map if self.threads else map)(compute, blocks))

    def _sum(self, compute: Callable[[Item], Tensor], blocks: list[Item]) -> Tensor:
        """Return the sum over blocks, added up in their order."""
        first, *others = self._map(compute, blocks)
        for part in others:
            first += part
        return first

    def predict(self, u: Tensor) -> Tensor:
        """Return F u = sum_i D_i X (v_i - w_i), [2, P, d] -> [n]."""
        difference = u[0] - u[1]
        return torch.cat(self._map(lambda n: self._predict(difference, n), self._blocks))

    def _predict(self, difference: Tensor, n: int) -> Tensor:
        return ((difference @ self.X[n].T) * self.gates[n]).sum(0)

    def predict_adjoint(self, r: Tensor) -> Tensor:
        """Return F^T r, [n] -> [2, P, d]."""
        parts = r.split(self.sizes)
        half = self._sum(lambda n: (self.gates[n] * parts[n]) @ self.X[n], self._blocks)
        return torch.stack([half, -half])

    def predict_normal(self, u: Tensor) -> Tensor:
        """Return F^T F u, [2, P, d] -> [2, P, d], each block of rows read once."""
        difference = u[0] - u[1]
        half = self._sum(lambda n: (self.gates[n] * self._predict(difference, n)) @ self.X[n], self._blocks)
        return torch.stack([half, -half])

    def constrain(self, u: Tensor) -> Tensor:
        """Return G u = (2 D_i - I) X v_i, [2, P, d] -> [2, P, n]; not negative where the constraints hold."""
        return torch.cat(self._map(lambda n: self.signs[n] * (u @ self.X[n].T), self._blocks), dim=2)

    def constrain_adjoint(self, s: Tensor) -> Tensor:
        """Return G^T s, [2, P, n] -> [2, P, d]. G^T G is X^T X on every block, because signs square to 1."""
        parts = s.split(self.sizes, dim=2)
        return self._sum(lambda n: (self.signs[n] * parts[n]) @ self.X[n], self._blocks)

    @property
    def _blocks(self) -> list[int]:
        return list(range(len(self.sizes)))


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
    device: torch.device | None = None,
    threads: int = THREADS,
    progress: ProgressCallback = lambda *progress: None,
) -> Solution:
    """Run ADMM until both residuals are at most `tolerance`, or for `iterations`.

    X is scaled to norm 1, which is the same program in u ||X|| with beta / ||X||, well conditioned. device: by default
    a GPU if there is one. threads: of a CPU, whose number changes no bit of the result.
    """
    device = device or default_device()
    with _row_threads(threads if device.type == "cpu" else 1) as pool, torch.no_grad():
        program = Program(X, y, gates, beta, device=device, threads=pool)
        norm = float(torch.linalg.eigvalsh(program.gram)[-1].clamp(min=TINY).sqrt())
        admm = Admm(program.scaled(norm), rank, np.random.default_rng(seed))
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
        multipliers = (-admm.rho * admm.dual_s).clamp(min=0)
        return Solution(
            (admm.v / norm).cpu().numpy(), multipliers.cpu().numpy(), done, admm.primal, admm.dual, converged
        )


@contextmanager
def _row_threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """Yield a pool of so many threads, None for one, while torch itself has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if count == 1:
            yield None
        else:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
    finally:
        torch.set_num_threads(before)


class Admm:
    """ADMM on the splitting u = v, G u = s with scaled multipliers dual_v, dual_s. Boyd et al. 2011, sec. 3."""

    def __init__(self, program: Program, rank: int, rng: np.random.Generator) -> None:
        self.program, self.rank, self.rng = program, rank, rng
        zeros = partial(torch.zeros, dtype=torch.float64, device=program.device)
        self.u, self.v, self.dual_v = (zeros(program.shape) for _ in range(3))
        self.s, self.dual_s = (zeros((*program.shape[:2], len(program.y))) for _ in range(2))
        self.Fty = program.predict_adjoint(program.y)
        self.y_norm = float(program.y.norm())
        self.Fty_norm = max(float(self.Fty.norm()), TINY)
        self.rho, self.primal, self.dual = 1.0, np.inf, np.inf
        self.inverse = nystrom(self.curvature, self.u.numel(), rank, rng, program.device)

    def curvature(self, x: Tensor) -> Tensor:
        """Return G^T G u + F^T F u / rho for u flat; the linear system of each iteration is I plus this."""
        p, u = self.program, x.reshape(self.program.shape)
        return (u @ p.gram + p.predict_normal(u) / self.rho).ravel()

    def system(self, x: Tensor) -> Tensor:
        """Return (I + G^T G + F^T F / rho) u for u flat."""
        return x + self.curvature(x)

    def step(self) -> None:
        """Run one iteration: u by a linear solve, v and s by their proximal maps, then the multipliers."""
        p = self.program
        # u: the solve starts from the last one, and its error is a tenth of what the worse residual allows.
        target = self.Fty / self.rho + self.v - self.dual_v + p.constrain_adjoint(self.s - self.dual_s)
        error = 0.1 * min(self.primal * self.y_norm, self.dual * self.Fty_norm / self.rho, 0.01 * self.y_norm)
        error = max(error, ROUNDING * float(target.norm()))
        u = conjugate_gradients(self.system, target.ravel(), self.u.ravel(), self.inverse, error)
        self.u = u.reshape(p.shape)
        # v and s
        Gu = p.constrain(self.u)
        v, s = shrink(self.u + self.dual_v, p.beta / self.rho), (Gu + self.dual_s).clamp(min=0)
        change = v - self.v + p.constrain_adjoint(s - self.s)
        self.v, self.s = v, s
        # multipliers and residuals
        self.dual_v += self.u - v
        self.dual_s += Gu - s
        self.primal = float(np.hypot(float((self.u - v).norm()), float((Gu - s).norm())) / self.y_norm)
        self.dual = self.rho * float(change.norm()) / self.Fty_norm

    def balance(self) -> None:
        """Move rho towards equal residuals (Boyd et al., 3.4.1); the unscaled multipliers do not change."""
        ratio = float(np.clip(np.sqrt(self.primal / max(self.dual, ROUNDING)), 0.1, 10.0))
        if 1 / 1.5 < ratio < 1.5:
            return
        self.rho *= ratio
        self.dual_v /= ratio
        self.dual_s /= ratio
        self.inverse = nystrom(self.curvature, self.u.numel(), self.rank, self.rng, self.program.device)


def conjugate_gradients(system: Operator, target: Tensor, start: Tensor, inverse: Operator, error: float) -> Tensor:
    """Return x with ||target - system(x)|| <= error, from `start`, preconditioned by `inverse`.

    After Golub and Van Loan, Matrix Computations, 11.5. Of our own, because scipy's reads arrays of numpy alone, and
    torch has none.
    """
    x, residual = start, target - system(start)
    preconditioned = direction = inverse(residual)
    size = residual @ preconditioned
    for _ in range(MAX_CG_ITERATIONS):
        if float(residual.norm()) <= error:
            break
        image = system(direction)
        length = size / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        preconditioned = inverse(residual)
        size, before = residual @ preconditioned, size
        direction = preconditioned + size / before * direction
    return x


def shrink(z: Tensor, amount: float) -> Tensor:
    """Reduce each block's norm by `amount`, to at least 0: the proximal map of amount * ||.||."""
    norms = z.norm(dim=-1, keepdim=True)
    return z * (1 - amount / norms.clamp(min=TINY)).clamp(min=0)


def nystrom(
    curvature: Operator, size: int, rank: int, rng: np.random.Generator, device: torch.device = CPU
) -> Operator:
    """Return an approximate inverse of I + M [size, size] from `rank` products with M.

    Frangella et al. 2021, arXiv:2110.02820: M ~ U diag(e) U^T, and x -> (e_r + 1) U (e + 1)^-1 U^T x + x - U U^T x.
    The damping is 1, because the identity is already in the operator; the shift that keeps the sketch positive is of
    the size of float64's rounding.
    """
    draws = torch.as_tensor(rng.normal(size=(size, min(rank, size))), device=device)
    test = torch.linalg.qr(draws)[0]
    image = torch.stack([curvature(column) for column in test.T], dim=1)
    shift = float(np.finfo(float).eps * np.sqrt(size) * float(image.norm()))
    image = image + shift * test
    core = test.T @ image
    root = torch.linalg.solve_triangular(torch.linalg.cholesky((core + core.T) / 2), image.T, upper=False).T
    U, singular, _ = torch.linalg.svd(root, full_matrices=False)
    e = (singular**2 - shift).clamp(min=0)
    gain = (e[-1] + 1) / (e + 1) - 1
    return lambda x: x + U @ (gain * (U.T @ x))


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

"""Every loss, side by side: pure functions of a batch of completions.

An objective returns one number a pair (or a row); dividing by the whole step's count is the loop's, so
accumulation does not change the loss. Names and docstrings say whether there is a reference, and
whether log-probs are summed or averaged. What is imitated (`nll`) is data: the rows with weight > 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pipeline import Range, Registry

if TYPE_CHECKING:
    from torch import Tensor

objective = Registry("objective")
Positive = Annotated[float, Range(gt=0, lt=float("inf"))]


@dataclass(frozen=True)
class Batch:
    """A flat batch of completions, and pairs of indices into it."""

    logp: Tensor  # [N] summed log-prob under the policy, with gradient
    length: Tensor  # [N] completion tokens
    weight: Tensor  # [N] likelihood weight; 0 keeps the row out of that term
    chosen: Tensor  # [P] row indices
    rejected: Tensor  # [P]
    ref: Tensor | None = None  # [N] the same log-prob under the reference

    @property
    def shift(self) -> Tensor:
        """log policy - log reference, [N]."""
        if self.ref is None:
            raise ValueError("this objective reads a reference, and the batch has none")
        return self.logp - self.ref

    def gap(self, scores: Tensor) -> Tensor:
        """chosen - rejected, [P]."""
        return scores[self.chosen] - scores[self.rejected]


def log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + exp(-x)), without overflow."""
    return -(-x).logaddexp(x.new_zeros(()))


@objective(reference=True, per="pairs")
def sigmoid_norm(b: Batch, *, beta: Positive = 0.1) -> Tensor:
    """DPO: -log s(beta h), h the gap of shifts. Reference, summed. Eq. 7 of arXiv:2305.18290; ln 2 at the start."""
    return -log_sigmoid(beta * b.gap(b.shift))


@objective(reference=True, per="pairs")
def hinge_norm(b: Batch, *, gamma: Positive = 0.05) -> Tensor:
    """RSO's hinge on normalised likelihood: max(0, 1 - gamma h). Reference, summed. arXiv:2309.06657."""
    return (1 - gamma * b.gap(b.shift)).clamp(min=0)


@objective(reference=False, per="pairs")
def hinge(b: Batch, *, delta: Positive = 1.0) -> Tensor:
    """SLiC-HF: max(0, delta - log p(chosen) + log p(rejected)). No reference, summed. arXiv:2305.10425."""
    return (delta - b.gap(b.logp)).clamp(min=0)


@objective(reference=False, per="tokens")
def nll(b: Batch) -> Tensor:
    """Weighted negative log-likelihood, a mean over the step's weighted tokens. No reference."""
    return -b.weight * b.logp

"""A preference head as numbers: a two-layer ReLU network that scores features."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from schemas import WinnowError
from schemas.tables import HEADS


@dataclass(frozen=True)
class ReluHead:
    """score(x) = sum_j outer_j max(0, inner_j . x + bias_j)."""

    inner: np.ndarray  # [m, d]
    bias: np.ndarray  # [m]
    outer: np.ndarray  # [m]

    def ramps(self, x: np.ndarray) -> np.ndarray:
        """x: [N, d]. Returns [N, m]."""
        made: np.ndarray = np.maximum(x @ self.inner.T + self.bias, 0.0)
        return made

    def score(self, x: np.ndarray) -> np.ndarray:
        """x: [N, d]. Returns [N]; raises WinnowError on another width."""
        self.check_width(x.shape[1])
        made: np.ndarray = self.ramps(x) @ self.outer
        return made

    def check_width(self, width: int) -> None:
        """Raises WinnowError if features of this many numbers are not this head's."""
        if width != self.inner.shape[1]:
            raise WinnowError(
                f"features have {width} numbers, and the head reads {self.inner.shape[1]}: "
                "wire both to the policy that the head was trained on"
            )

    def before(self, mean: np.ndarray, sd: np.ndarray) -> Self:
        """The head of raw x that scores as this one does (x - mean) / sd; both [d]."""
        inner = self.inner / sd
        return type(self)(inner, self.bias - inner @ mean, self.outer)

    def table(self) -> pa.Table:
        columns = {
            "neuron": range(len(self.outer)),
            "inner": self.inner.tolist(),
            "bias": self.bias,
            "outer": self.outer,
        }
        return pa.table(columns, schema=HEADS)


def relu_head_of(heads: pa.Table) -> ReluHead:
    """From a table of heads, in order of neuron."""
    rows = heads.sort_by("neuron").to_pydict()
    return ReluHead(*(np.array(rows[name], dtype=np.float64) for name in ("inner", "bias", "outer")))


def matrix(features: pa.Table) -> np.ndarray:
    """The features of a table's rows, float64 [N, d]."""
    rows = features.column("features").combine_chunks()
    numbers: np.ndarray = rows.flatten().to_numpy().astype(np.float64)
    return numbers.reshape(len(rows), len(numbers) // max(len(rows), 1))

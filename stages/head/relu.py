"""Preference head: a two-layer ReLU network that scores features."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from schemas import WinnowError
from schemas.tables import HEADS


@dataclass(frozen=True)
class ReluHead:
    """Two-layer ReLU network with m neurons: score(x) = sum_j outer_j max(0, inner_j . x + bias_j)."""

    inner: np.ndarray  # [m, d]
    bias: np.ndarray  # [m]
    outer: np.ndarray  # [m]

    def activations(self, x: np.ndarray) -> np.ndarray:
        """Return the hidden layer's outputs, [N, d] -> [N, m]."""
        return np.maximum(x @ self.inner.T + self.bias, 0.0)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Return the scores, [N, d] -> [N]. Raises WinnowError if d is not the head's width."""
        self.check_width(x.shape[1])
        return self.activations(x) @ self.outer

    def check_width(self, width: int) -> None:
        """Raise WinnowError if the head does not read features of this width."""
        if width != self.inner.shape[1]:
            raise WinnowError(
                f"features have {width} numbers, and the head reads {self.inner.shape[1]}: "
                "use the policy that the head was trained on for both"
            )

    def to_table(self) -> pa.Table:
        """Return the head as a table of heads, one row per neuron."""
        neurons = range(len(self.outer))
        columns = {"neuron": neurons, "inner": self.inner.tolist(), "bias": self.bias, "outer": self.outer}
        return pa.table(columns, schema=HEADS)


def read_relu_head(heads: pa.Table) -> ReluHead:
    """Read a head from a table of heads, neurons in order."""
    columns = heads.sort_by("neuron").to_pydict()
    return ReluHead(*(np.array(columns[name], dtype=np.float64) for name in ("inner", "bias", "outer")))


def feature_matrix(features: pa.Table) -> np.ndarray:
    """Return the features of a table's rows, float64 [N, d]."""
    chunks = [chunk.flatten().to_numpy() for chunk in features.column("features").chunks]  # pyarrow lists end at 2^31
    values = np.concatenate([np.zeros(0), *chunks], dtype=np.float64)
    return values.reshape(features.num_rows, len(values) // max(features.num_rows, 1))

"""Options of a training run and the data of its loss terms, as `optimize` passes them to the trainer.

Free of torch, so that a plan can read it.
"""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline import Bound
from stages.options import Precision, Rounding

SPEED = "speed/"  # prefix of metrics that depend on the machine and go to the table `speeds`
VALIDATION = "validation/"  # prefix of metrics of evaluations during training
PROXY_WIN = VALIDATION + "proxy_win"


@dataclass(frozen=True)
class TermData:
    """Rows of one loss term: a table of `examples`, held-out rows, and what is minimised on both."""

    examples: pa.Table
    heldout: pa.Table | None
    objective: Bound
    nll_weight: float = 0.0
    optimum: float = 0.0  # loss that the term reaches alone


@dataclass(frozen=True)
class TrainConfig:
    """Options of `optimize` under the names and with the types of its signature; its docstring says what they mean.

    A dataclass, because type checkers cannot see into a dict of options.
    """

    nll_per: Literal["token", "response"]
    mix: Bound | None
    reference: Literal["init", "other"]
    learning_rate: float
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    warmup_ratio: float
    batch_size: int
    epochs: int
    max_grad_norm: float
    weight_decay: float
    dtype: Literal["float32", "bfloat16"]
    lora_r: int
    lora_alpha: float | None
    lora_target_modules: list[str]
    engine_tolerance: float
    merge_lora: bool
    save_dtype: Precision
    save_rounding: Rounding
    tokens_per_pass: int
    gradient_checkpointing: Literal[False, True, "auto"]
    compile_layers: bool
    checkpoint_every: int
    evaluate_every: int
    keep: Literal["last", "best"]
    seed: int

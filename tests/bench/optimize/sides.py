"""One run of one side in the calling process: seconds and memory per step, and losses."""

import ctypes
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.context import StageContext, WarmCache
from stages.training.objectives import objective
from tests.bench.optimize.ablations import ABLATIONS
from tests.bench.optimize.model import BenchData, Shape
from tests.bench.page import resident

BETA = 0.1
LR = 1e-4
NEVER = 1_000_000_000
SCORING_BATCHES = (1, 2, 4)  # pairs that TRL scores at a time


@dataclass(frozen=True)
class Setting:
    """Options of one run.

    steps: timed ones, after one of warm-up. size: our groups per forward pass, or TRL's pairs. gradient_checkpointing:
    for our side only.
    """

    data: BenchData
    shape: Shape
    dtype: str
    groups: int  # per step
    size: int
    steps: int
    gradient_checkpointing: bool = False
    weights: Path | None = None  # where to save the final weights

    @property
    def pairs(self) -> int:
        return self.groups * self.shape.pairs

    @property
    def examples(self) -> Any:
        return self.data.examples(self.shape, self.dtype, self.groups * (self.steps + 1))


@dataclass(frozen=True)
class Run:
    seconds: float  # per step, mean of the timed ones
    megabytes: float
    losses: list[float]


@dataclass
class Watch:
    """Seconds and memory of all steps but the first.

    The memory is the highest resident set since the first step ended, less the resident set at that time: gradients
    are freed by then, weights and AdamW's moments are allocated, and freed memory is returned by the C library. So it
    counts activations, gradients and whatever else a step needs besides model and optimizer.
    """

    ticks: list[float] = field(default_factory=list)
    start: float = 0.0

    def step(self) -> None:
        if not self.ticks:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the highest so far
            self.start = resident("VmRSS")
        self.ticks.append(time.perf_counter())

    def run(self, losses: list[float]) -> Run:
        seconds = (self.ticks[-1] - self.ticks[0]) / max(1, len(self.ticks) - 1)
        return Run(seconds, resident("VmHWM") - self.start, losses)


def ours(setting: Setting, ablation: str = "none") -> Run:
    """Run the stage `optimize` itself on the table of examples."""
    from stages.training.optimize import optimize

    watch = Watch()
    patched, table_of = ABLATIONS[ablation]
    with tempfile.TemporaryDirectory() as folder, patched(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*computes a prompt again")  # it would be another measurement
        ctx = StageContext(Path(folder), WarmCache(), lambda done, total, unit: watch.step())
        trained, _, metrics, *_ = optimize(
            setting.data.init,
            table_of(setting.examples),
            ctx,
            objective=objective.bind({"name": "sigmoid_norm", "beta": BETA}),
            learning_rate=LR,
            warmup_ratio=0.0,
            batch_size=setting.pairs,
            dtype=setting.dtype,
            tokens_per_pass=setting.size * setting.shape.group_tokens,
            gradient_checkpointing=setting.gradient_checkpointing,
            checkpoint_every=NEVER,
        )
        run = watch.run([row["value"] for row in metrics.to_pylist() if row["metric"] == "loss"])
        if setting.weights:
            (trained.folder / "model.safetensors").rename(setting.weights)
    return run


def ordered(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yield TRL's example of each pair, in the order in which our steps take their groups."""
    from stages.training.data import BatchSampler, groups_of

    loss = objective.bind({"name": "sigmoid_norm"})
    groups = groups_of(setting.examples, loss, 0.0, setting.data.init, setting.dtype)
    batches = BatchSampler(groups, "pairs", setting.pairs, seed=0, index=0)
    for group in (group for n in range(batches.steps(1)) for group in batches[n]):
        for chosen, rejected in group.pairs:
            yield {
                "prompt_ids": group.prompt,
                "chosen_ids": group.responses[chosen],
                "rejected_ids": group.responses[rejected],
                "ref_chosen_logps": group.ref[chosen],
                "ref_rejected_logps": group.ref[rejected],
            }


def trl(setting: Setting) -> Run:
    from tests.bench.optimize.trl_side import train

    return train(setting, list(ordered(setting)), Watch(), BETA, LR)


def sweep(side: Callable[[Setting], Run], setting: Setting, sizes: list[int]) -> dict[int, tuple[float, float]]:
    """Return pairs per second and megabytes at each size, from one step after one of warm-up.

    Stops once two sizes in a row are slower than the best.
    """
    measured: dict[int, tuple[float, float]] = {}
    for size in sizes:
        run = side(replace(setting, size=size, steps=1))
        measured[size] = setting.pairs / run.seconds, run.megabytes
        speeds = [speed for speed, _ in measured.values()]
        if len(speeds) > 2 and max(speeds[-2:]) < max(speeds):
            break
    return measured


def our_reference(setting: Setting) -> float:
    """Return responses scored per second by the forward pass of the stage `reference`, on all threads."""
    from stages.limits import SCORING_TOKENS_PER_PASS
    from stages.network.forward import forward_rows, logp_of
    from stages.network.load import load_network

    network = load_network(setting.data.init, train=True)
    examples = setting.examples.to_pylist()
    rows = [(row["prompt_ids"], response["token_ids"]) for row in examples for response in row["responses"]]
    first = setting.groups * setting.shape.responses
    forward_rows(logp_of, network, rows[:first], setting.dtype, SCORING_TOKENS_PER_PASS)
    start = time.perf_counter()
    forward_rows(logp_of, network, rows[first:], setting.dtype, SCORING_TOKENS_PER_PASS)
    return (len(rows) - first) / (time.perf_counter() - start)


def trl_reference(setting: Setting) -> float:
    """Return the same responses per second, scored by TRL's `precompute_ref_log_probs` over their pairs.

    Counted like ours: a response once, however often TRL scores it. At TRL's fastest batch size.
    """
    from tests.bench.optimize.trl_side import precompute

    pairs = list(ordered(setting))
    responses = setting.groups * setting.steps * setting.shape.responses
    return responses / min(precompute(replace(setting, size=size), pairs) for size in SCORING_BATCHES)

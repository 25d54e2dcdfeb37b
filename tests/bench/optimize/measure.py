"""Measurements of `python -m tests.bench optimize`, in order, each in a new process."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from schemas import WinnowError
from tests.bench.optimize import sides
from tests.bench.optimize.ablations import ABLATIONS
from tests.bench.optimize.model import BenchData, Shape
from tests.bench.optimize.sides import Setting
from tests.bench.page import commit

Call = Callable[..., Any]
TRAIN = {"ours": sides.ours, "TRL": sides.trl}
SCORE = {"ours": sides.our_reference, "TRL": sides.trl_reference}
WAYS = ("ours", "ours, gradient_checkpointing", "TRL")
TARGETS = {  # of issue 4: pairs per second against TRL's, at least; peak memory against TRL's, at most
    "512/64/8/7": (6.0, 1 / 3),
    "512/64/8/4": (4.0, 1 / 2),
    "1024/128/8/4": (4.0, 1 / 2),
    "256/256/8/4": (1.7, 0.7),
    "64/256/2/1": (1.0, 1.0),
}
MARGIN = 0.95  # of the memory target, so that the timed runs keep to it too
LARGEST = 8  # most groups of ours, and pairs of TRL's, per forward pass
PARITY = 20  # steps
START = 2_000  # cost of starting a process, in tokens that a side would train on meanwhile, about


@dataclass(frozen=True)
class Task:
    """Call in a new process. Its arguments may depend on the results of earlier tasks."""

    key: tuple[str, ...]
    tokens: int  # its cost, about
    function: Call
    arguments: Callable[[], tuple[Any, ...]]


@dataclass
class Bench:
    """All measurements, with `results` by the key of their task."""

    data: BenchData
    shapes: list[Shape]
    dtypes: list[str]
    steps: int
    repeats: int
    results: dict[tuple[str, ...], Any] = field(default_factory=dict)
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        if find_spec("trl") is None:
            raise WinnowError("bench optimize: trl, a development dependency, is not installed; `make setup` has it")
        if unknown := set(self.dtypes) - {"float32", "bfloat16"}:
            raise WinnowError(f"--dtypes: {', '.join(sorted(unknown))}: it takes float32 and bfloat16")

    def run(self, call: Call, report: Callable[[str], None]) -> None:
        """Run all tasks, one after the other."""
        tasks = list(self.tasks())
        total, done, start = sum(task.tokens + START for task in tasks), 0, time.perf_counter()
        for n, task in enumerate(tasks):
            self.results[task.key] = call(task.function, *task.arguments())
            done += task.tokens + START
            minutes = (time.perf_counter() - start) / 60
            remaining = minutes * (total - done) / done
            report(f"  {n + 1} of {len(tasks)}, {minutes:.1f} min, about {remaining:.0f} left: {', '.join(task.key)}")

    def tasks(self) -> Iterator[Task]:
        """Yield the model, training of every shape, scoring, ablations and parity; repeats alternate ours, TRL, TRL."""
        yield Task(("model",), 0, self.data.make_model, tuple)

        # Training: all sizes of all ways first; then the best setting of each side. TRL's steps are halved for the
        # sizes: they take long, and their time per pair does not depend on it.
        for shape in self.shapes:
            for dtype in self.dtypes:
                yield self._examples(shape, dtype, shape.groups * (self.steps + 1))
                for way in WAYS:
                    side, checkpointing = way.partition(",")[0], "gradient_checkpointing" in way
                    groups = shape.groups if side == "ours" else shape.groups // 2
                    count = groups if side == "ours" else groups * shape.pairs
                    sizes = [size for size in range(1, LARGEST + 1) if count % size == 0]
                    setting = Setting(self.data, shape, dtype, groups, 1, 1, checkpointing)
                    tokens = groups * 2 * len(sizes) * _tokens(side, shape)
                    arguments = partial(tuple, (TRAIN[side], setting, sizes))
                    yield Task(("sizes", way, str(shape), dtype), tokens, sides.sweep, arguments)
            for side, repeat in self._alternating(TRAIN):
                tokens = shape.groups * (self.steps + 1) * _tokens(side, shape)
                arguments = partial(self._arguments, shape, side)
                yield Task(("train", side, str(shape), repeat), tokens, TRAIN[side], arguments)

        # Scoring, on the first shape in which every response is in one pair: there TRL scores none twice.
        shape = next((shape for shape in self.shapes if 2 * shape.pairs == shape.responses), self.shapes[0])
        for side, repeat in self._alternating(SCORE):
            tokens = shape.groups * (self.steps + 1) * _tokens(side, shape) // (3 if side == "ours" else 1)
            yield Task(("score", side, str(shape), repeat), tokens, SCORE[side], partial(self._arguments, shape, side))

        shape = self.shapes[0]
        for name, repeat in self._alternating(ABLATIONS):
            like = "ours" if name.startswith(("none", "head")) else "TRL"
            tokens = shape.groups * (self.steps + 1) * _tokens(like, shape)
            arguments = partial(self._arguments, shape, "ours", name)
            yield Task(("ablation", name, str(shape), repeat), tokens, sides.ours, arguments)

        # Parity, with one group per step: every kind of match occurs, and 20 steps take no longer than 5.
        if "float32" not in self.dtypes:
            yield self._examples(shape, "float32", PARITY)
        for side in TRAIN:
            setting = Setting(self.data, shape, "float32", 1, 1, PARITY - 1, weights=self.weights(side))
            tokens = PARITY * _tokens(side, shape)
            yield Task(("parity", side, str(shape)), tokens, TRAIN[side], partial(tuple, (setting,)))

    def tried(self, shape: Shape, side: str) -> dict[tuple[str, str, int], tuple[float, float]]:
        """Return pairs per second and megabytes of one run by (way, dtype, size)."""
        return {
            (way, dtype, size): result
            for way in WAYS
            if way.startswith(side)
            for dtype in self.dtypes
            for size, result in self.results["sizes", way, str(shape), dtype].items()
        }

    def setting(self, shape: Shape, side: str) -> Setting:
        """Return TRL's fastest; ours, the fastest that keeps to the memory target against that, else the leanest."""
        theirs, ours = self.tried(shape, "TRL"), self.tried(shape, "ours")
        best = max(theirs, key=lambda way: theirs[way][0])
        if side == "ours":
            most = MARGIN * TARGETS.get(str(shape), (0.0, float("inf")))[1] * theirs[best][1]
            lean = {way: result for way, result in ours.items() if result[1] <= most}
            best = max(lean, key=lambda way: lean[way][0]) if lean else min(ours, key=lambda way: ours[way][1])
        way, dtype, size = best
        checkpointing = "gradient_checkpointing" in way
        return Setting(self.data, shape, dtype, shape.groups, size, self.steps, checkpointing)

    def weights(self, side: str) -> Path:
        """Return the file of a side's weights after the parity run."""
        return self.data.folder / f"{side}.safetensors"

    def _arguments(self, shape: Shape, side: str, *more: Any) -> tuple[Any, ...]:
        return (self.setting(shape, side), *more)

    def _examples(self, shape: Shape, dtype: str, groups: int) -> Task:
        arguments = partial(tuple, (shape, dtype, max(groups, PARITY)))
        tokens = shape.group_tokens * groups // 3
        return Task(("examples", str(shape), dtype), tokens, self.data.make_examples, arguments)

    def _alternating(self, names: Any) -> Iterator[tuple[str, str]]:
        """Yield (name, repeat), forwards and backwards in turn, so that neither side always runs first."""
        for repeat in range(self.repeats):
            for name in list(names)[:: 1 if repeat % 2 == 0 else -1]:
                yield name, str(repeat)


def _tokens(side: str, shape: Shape) -> int:
    """Return the tokens per group that go through the network of a side."""
    return shape.group_tokens if side == "ours" else shape.pairs * shape.pair_tokens


def new_process(threads: int) -> Call:
    """Return a function that calls another in a new process of so many threads, so that its memory is measured alone.

    Processes are forked off one that has imported what both sides need and has done nothing else.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    server = get_context("forkserver")
    server.set_forkserver_preload(["stages.training.trainer", "tests.bench.optimize.trl_side"])

    def call(function: Call, *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            return pool.submit(function, *args).result()

    return call

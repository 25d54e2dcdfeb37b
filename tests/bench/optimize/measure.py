"""What runs in `winnow bench optimize`, in which order, and what it comes to."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from schemas import WinnowError
from tests.bench.optimize import sides
from tests.bench.optimize.ablations import ABLATIONS
from tests.bench.optimize.model import Shape, World
from tests.bench.optimize.sides import Setting
from tests.bench.page import commit

Say = Callable[[str], None]
Call = Callable[..., Any]
Key = tuple[str, ...]
TRAIN = {"ours": sides.ours, "TRL": sides.trl}
SCORE = {"ours": sides.our_reference, "TRL": sides.trl_reference}
WAYS = ("ours", "ours, gradient_checkpointing", "TRL")
TARGETS = {  # of issue 4: pairs a second against TRL's, at least; peak memory against TRL's, at most
    "512/64/8/7": (6.0, 1 / 3),
    "512/64/8/4": (4.0, 1 / 2),
    "1024/128/8/4": (4.0, 1 / 2),
    "256/256/8/4": (1.7, 0.7),
    "64/256/2/1": (1.0, 1.0),
}
MARGIN = 0.95  # of the memory promised, so that the timed runs keep to it too
LARGEST = 8  # groups of ours, and pairs of TRL's, that a forward pass holds at most
PARITY = 20  # steps
START = 2_000  # tokens that a side would train on while its process starts, about


@dataclass(frozen=True)
class Task:
    """One call in a process of its own. Its arguments may need what earlier tasks found."""

    key: Key
    tokens: int  # what it costs, about
    function: Call
    arguments: Callable[[], tuple[Any, ...]]


@dataclass
class Bench:
    """`found` has every task's result by its key."""

    world: World
    shapes: list[Shape]
    dtypes: list[str]
    steps: int
    repeats: int
    found: dict[Key, Any] = field(default_factory=dict)
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        if find_spec("trl") is None:
            raise WinnowError("bench optimize: trl, a development dependency, is not installed; `make setup` has it")
        if unknown := set(self.dtypes) - {"float32", "bfloat16"}:
            raise WinnowError(f"--dtypes: {', '.join(sorted(unknown))}: it takes float32 and bfloat16")

    def run(self, call: Call, say: Say) -> None:
        """All tasks, one after the other."""
        tasks = list(self.tasks())
        total, done, start = sum(task.tokens + START for task in tasks), 0, time.perf_counter()
        for n, task in enumerate(tasks):
            self.found[task.key] = call(task.function, *task.arguments())
            done += task.tokens + START
            spent = (time.perf_counter() - start) / 60
            left = spent * (total - done) / done
            say(f"  {n + 1} of {len(tasks)}, {spent:.1f} min, about {left:.0f} left: {', '.join(task.key)}")

    def tasks(self) -> Iterator[Task]:
        yield Task(("model",), 0, self.world.make_model, tuple)
        for shape in self.shapes:
            yield from self._training(shape)
        yield from self._scoring()
        yield from self._ablations()
        yield from self._parity()

    def tried(self, shape: Shape, side: str) -> dict[tuple[str, str, int], tuple[float, float]]:
        """(way, dtype, size): pairs a second and megabytes of one run."""
        return {
            (way, dtype, size): result
            for way in WAYS
            if way.startswith(side)
            for dtype in self.dtypes
            for size, result in self.found["sizes", way, str(shape), dtype].items()
        }

    def setting(self, shape: Shape, side: str) -> Setting:
        """TRL's fastest; ours, the fastest that keeps to the memory promised against that, or the leanest of all."""
        theirs, ours = (self.tried(shape, each) for each in ("TRL", "ours"))
        fastest = max(theirs, key=lambda way: theirs[way][0])
        most = MARGIN * TARGETS.get(str(shape), (0.0, float("inf")))[1] * theirs[fastest][1]
        lean = {way: result for way, result in ours.items() if result[1] <= most}
        lean = lean or dict([min(ours.items(), key=lambda each: each[1][1])])
        way, dtype, size = fastest if side == "TRL" else max(lean, key=lambda way: lean[way][0])
        return Setting(
            self.world,
            shape,
            dtype,
            shape.groups,
            size,
            self.steps,
            gradient_checkpointing="gradient_checkpointing" in way,
        )

    def _training(self, shape: Shape) -> Iterator[Task]:
        """All ways at all sizes first; then the best of each side: ours, TRL, TRL, ours, ..."""
        for dtype in self.dtypes:
            yield self._examples(shape, dtype, shape.groups * (self.steps + 1))
            for way in WAYS:
                yield self._sweep(way, shape, dtype)
        for repeat in range(self.repeats):
            for side in _alternating(TRAIN, repeat):
                yield Task(
                    ("train", side, str(shape), str(repeat)),
                    shape.groups * (self.steps + 1) * _tokens(side, shape),
                    TRAIN[side],
                    lambda side=side: (self.setting(shape, side),),  # type: ignore[misc]
                )

    def _examples(self, shape: Shape, dtype: str, groups: int) -> Task:
        return Task(
            ("examples", str(shape), dtype),
            shape.group_tokens * groups // 3,
            self.world.make_examples,
            lambda: (shape, dtype, max(groups, PARITY)),
        )

    def _sweep(self, way: str, shape: Shape, dtype: str) -> Task:
        """TRL's steps are halved here: they take long, and their time a pair does not depend on it."""
        side, again = way.partition(",")[0], "gradient_checkpointing" in way
        groups = shape.groups if side == "ours" else shape.groups // 2
        count = groups if side == "ours" else groups * shape.pairs
        sizes = [size for size in range(1, LARGEST + 1) if count % size == 0]
        return Task(
            ("sizes", way, str(shape), dtype),
            groups * 2 * len(sizes) * _tokens(side, shape),
            sides.sweep,
            lambda: (TRAIN[side], Setting(self.world, shape, dtype, groups, 1, 1, again), sizes),
        )

    def _scoring(self) -> Iterator[Task]:
        """On the first shape in which every response stands in one pair: there TRL reads none twice."""
        shape = next((each for each in self.shapes if 2 * each.pairs == each.responses), self.shapes[0])
        for repeat in range(self.repeats):
            for side in _alternating(SCORE, repeat):
                yield Task(
                    ("score", side, str(shape), str(repeat)),
                    shape.groups * (self.steps + 1) * _tokens(side, shape) // (3 if side == "ours" else 1),
                    SCORE[side],
                    lambda side=side: (self.setting(shape, side),),  # type: ignore[misc]
                )

    def _ablations(self) -> Iterator[Task]:
        shape = self.shapes[0]
        for repeat in range(self.repeats):
            for name in _alternating(ABLATIONS, repeat):
                yield Task(
                    ("ablation", name, str(shape), str(repeat)),
                    shape.groups
                    * (self.steps + 1)
                    * _tokens("ours" if name.startswith(("none", "head")) else "TRL", shape),
                    sides.ours,
                    lambda name=name: (self.setting(shape, "ours"), name),  # type: ignore[misc]
                )

    def _parity(self) -> Iterator[Task]:
        """A group a step, so that every kind of match is there and 20 steps take no longer than 5."""
        shape = self.shapes[0]
        if "float32" not in self.dtypes:
            yield self._examples(shape, "float32", PARITY)
        for side in TRAIN:
            setting = Setting(self.world, shape, "float32", 1, 1, PARITY - 1, keep=self.weights(side))
            yield Task(
                ("parity", side, str(shape)),
                PARITY * _tokens(side, shape),
                TRAIN[side],
                lambda setting=setting: (setting,),  # type: ignore[misc]
            )

    def weights(self, side: str) -> Any:
        return self.world.folder / f"{side}.safetensors"


def _alternating(names: Any, repeat: int) -> list[str]:
    return list(names)[:: 1 if repeat % 2 == 0 else -1]


def _tokens(side: str, shape: Shape) -> int:
    """That a side reads for a group."""
    return shape.group_tokens if side == "ours" else shape.pairs * shape.pair_tokens


def apart(threads: int) -> Call:
    """Calls a function in a new process of so many threads, where only what it returns is left of it.

    Processes are forked off one that has imported what both sides need and has done nothing else.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    server = get_context("forkserver")
    server.set_forkserver_preload(["stages.training.trainer", "tests.bench.optimize.trl_side"])

    def call(function: Call, *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            return pool.submit(function, *args).result()

    return call

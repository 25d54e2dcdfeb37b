"""The tables of `winnow bench optimize`, for the terminal and for a page of the repository."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tests.bench.optimize.ablations import ABLATIONS
from tests.bench.optimize.measure import PARITY, SCORE, TARGETS, TRAIN, Bench
from tests.bench.optimize.model import Shape
from tests.bench.optimize.sides import Run
from tests.bench.page import MEASURED, facts, spread, written

SCORED = 3.0  # responses a second of `reference` against TRL's, at least
CLOSE = 1e-4  # losses and weights, relative


def tables(bench: Bench) -> dict[str, pa.Table]:
    """By title."""
    made = {
        "the better of each side, against what was promised": [_verdict(bench, shape) for shape in bench.shapes],
        f"optimizer steps: {MEASURED}": list(_steps(bench)),
        f"the reference pass, distinct responses a second: {MEASURED}": [_scores(bench)],
        f"ours with one idea taken out: {MEASURED}": list(_ablations(bench)),
        f"parity after {PARITY} steps in fp32: largest deviations": [_parity(bench)],
        "what was tried before, one run each, groups of ours and pairs of TRL's a pass": list(_tried(bench)),
    }
    return {title: pa.Table.from_pylist(rows) for title, rows in made.items()}


def _verdict(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Speed and memory from the same runs."""
    (ours, our_memory), (theirs, their_memory) = (_median(bench, side, shape) for side in TRAIN)
    speed, memory = ours / theirs, our_memory / their_memory
    least, most = TARGETS.get(str(shape), (None, None))
    met = "" if least is None or most is None else "yes" if speed >= least and memory <= most else "no"
    return {
        "shape": str(shape),
        "matches": shape.matches,
        "speed": f"{speed:.2f}x",
        "at least": least and f"{least:.1f}x",
        "memory": f"{memory:.2f}",
        "at most": most and f"{most:.2f}",
        "met": met,
    }


def _steps(bench: Bench) -> Iterator[dict[str, Any]]:
    for shape in bench.shapes:
        for side, unit in zip(TRAIN, ("groups", "pairs"), strict=True):
            setting, runs = bench.setting(shape, side), _runs(bench, "train", side, str(shape))
            yield {
                "shape": str(shape),
                "pairs a step": shape.groups * shape.pairs,
                "side": f"{side}, gradient_checkpointing" if setting.gradient_checkpointing else side,
                "dtype": setting.dtype,
                "a pass": f"{setting.size} {unit}",
                "pairs/s": spread(_speeds(shape, runs)),
                "MB": spread([run.megabytes for run in runs], 0),
            }


def _tried(bench: Bench) -> Iterator[dict[str, Any]]:
    """All that the best was chosen from."""
    for shape in bench.shapes:
        for side in TRAIN:
            for (way, dtype, size), (speed, megabytes) in bench.tried(shape, side).items():
                numbers = {"a pass": size, "pairs/s": f"{speed:.2f}", "MB": f"{megabytes:.0f}"}
                yield {"shape": str(shape), "side": way, "dtype": dtype} | numbers


def _scores(bench: Bench) -> dict[str, Any]:
    name = next(key[2] for key in bench.found if key[0] == "score")
    speeds = {side: _runs(bench, "score", side, name) for side in SCORE}
    ours, theirs = map(np.median, speeds.values())
    row = {"shape": name} | {side: spread(values) for side, values in speeds.items()}
    return row | {"speed": f"{ours / theirs:.2f}x", "at least": f"{SCORED:.1f}x"}


def _ablations(bench: Bench) -> Iterator[dict[str, Any]]:
    shape = bench.shapes[0]
    runs = {name: _runs(bench, "ablation", name, str(shape)) for name in ABLATIONS}
    whole = np.median(_speeds(shape, runs["none"]))
    for name, each in runs.items():
        yield {
            "shape": str(shape),
            "taken out": name,
            "pairs/s": spread(_speeds(shape, each)),
            "MB": spread([run.megabytes for run in each], 0),
            "speed": f"{np.median(_speeds(shape, each)) / whole:.2f}x",
        }


def _parity(bench: Bench) -> dict[str, Any]:
    """Of any step's loss; of any tensor's weights, in norm; of any weight, against its tensor's largest; of the
    whole change, in norm. Adam moves a weight by lr whatever the size of its gradient, be it rounding."""
    from safetensors.numpy import load_file

    shape = str(bench.shapes[0])
    losses = [np.array(bench.found["parity", side, shape].losses) for side in TRAIN]
    ours, theirs = (load_file(bench.weights(side)) for side in TRAIN)
    init = load_file(bench.world.folder / "model" / "model.safetensors")
    off = np.abs(losses[0] - losses[1]) / np.abs(losses[1])
    weights, weight = (
        max(size(ours[name] - theirs[name]) / size(theirs[name]) for name in init)
        for size in (np.linalg.norm, lambda each: np.abs(each).max())
    )
    change, apart = (
        np.sqrt(sum(float(np.square(theirs[name] - other[name]).sum()) for name in init)) for other in (init, ours)
    )
    return {
        "shape": shape,
        "pairs a step": bench.shapes[0].pairs,
        "first loss": f"{losses[1][0]:.4f}",
        "last loss": f"{losses[1][-1]:.4f}",
        "loss of a step": f"{off.max():.1e}",
        "final weights": f"{weights:.1e}",
        "any weight": f"{weight:.1e}",
        "their change": f"{apart / change:.1e}",
        "at most": f"{CLOSE:.0e}",
        "met": "yes" if len(off) == PARITY and max(off.max(), weights) <= CLOSE else "no",
    }


def _runs(bench: Bench, *key: str) -> list[Any]:
    return [bench.found[*key, str(repeat)] for repeat in range(bench.repeats)]


def _median(bench: Bench, side: str, shape: Shape) -> tuple[float, float]:
    """Pairs a second, and megabytes."""
    runs = _runs(bench, "train", side, str(shape))
    return float(np.median(_speeds(shape, runs))), float(np.median([run.megabytes for run in runs]))


def _speeds(shape: Shape, runs: list[Run]) -> list[float]:
    """Pairs a second of each run."""
    return [shape.groups * shape.pairs / run.seconds for run in runs]


def page(bench: Bench, threads: int) -> str:
    """The tables in Markdown, with when, where and how they came about."""
    return written("winnow bench optimize", _facts(bench, threads), HOW, tables(bench))


HOW = f"""A shape is prompt tokens / response tokens / responses / pairs of a group. Both sides train the same random
Llama from the same token ids, the same pairs a step, with the same AdamW, LR schedule, clipping and cached reference
log-probs; each in the dtype and the forward passes that make it fastest, found first (ours: the fastest of those that
keep to the memory promised, be it with `gradient_checkpointing`, or the leanest if none does); in
processes of their own that alternate.
Seconds are those of the steps after the first. Memory is the highest resident set after the first step, less the
resident set at its end, when gradients are freed and model and optimizer are there. TRL runs without gradient
checkpointing, padding, saving, logging and a reference network; figures are the {MEASURED}.
The reference pass is one process with all threads on either side; the stage `reference` runs a thread a worker."""


def _facts(bench: Bench, threads: int) -> dict[str, Any]:
    world = bench.world
    return facts(bench.commit, ("torch", "transformers", "trl")) | {
        "threads": f"{threads} of either side",
        "model": f"Llama, hidden {world.hidden}, {world.layers} layers, vocabulary {world.vocabulary}, random weights",
        "measured": f"timed steps a run: {bench.steps}, after one of warm-up; repeats: {bench.repeats}",
    }

"""Tables of `python -m tests.bench optimize`, for the terminal and for a page of the repository."""

from typing import Any

import numpy as np
import pyarrow as pa

from tests.bench.optimize.ablations import ABLATIONS
from tests.bench.optimize.measure import PARITY, SCORE, TARGETS, TRAIN, Bench
from tests.bench.optimize.model import Shape
from tests.bench.page import MEASURED, facts, spread, written

SCORING_TARGET = 3.0  # responses per second of `reference` against TRL's, at least
CLOSE = 1e-4  # losses and weights, relative


def tables(bench: Bench) -> dict[str, pa.Table]:
    """Return all tables by title."""
    # Each side at its best; speed and memory are from the same runs.
    verdicts: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    for shape in bench.shapes:
        medians = []
        for side, unit in zip(TRAIN, ("groups", "pairs"), strict=True):
            setting, runs = bench.setting(shape, side), _repeats(bench, "train", side, str(shape))
            speeds, megabytes = _speeds(shape, runs), [run.megabytes for run in runs]
            medians.append((np.median(speeds), np.median(megabytes)))
            steps.append({
                "shape": str(shape),
                "pairs a step": shape.groups * shape.pairs,
                "side": f"{side}, gradient_checkpointing" if setting.gradient_checkpointing else side,
                "dtype": setting.dtype,
                "a pass": f"{setting.size} {unit}",
                "pairs/s": spread(speeds),
                "MB": spread(megabytes, 0),
            })  # fmt: skip
            for (way, dtype, size), (rate, memory) in bench.tried(shape, side).items():
                numbers = {"a pass": size, "pairs/s": f"{rate:.2f}", "MB": f"{memory:.0f}"}
                tried.append({"shape": str(shape), "side": way, "dtype": dtype} | numbers)
        (ours, our_memory), (theirs, their_memory) = medians
        speed, memory = ours / theirs, our_memory / their_memory
        least, most = TARGETS.get(str(shape), (None, None))
        met = "" if least is None or most is None else "yes" if speed >= least and memory <= most else "no"
        verdicts.append({
            "shape": str(shape),
            "matches": shape.matches,
            "speed": f"{speed:.2f}x",
            "at least": least and f"{least:.1f}x",
            "memory": f"{memory:.2f}",
            "at most": most and f"{most:.2f}",
            "met": met,
        })  # fmt: skip

    name = next(key[2] for key in bench.results if key[0] == "score")
    rates = {side: _repeats(bench, "score", side, name) for side in SCORE}
    ratio = np.median(rates["ours"]) / np.median(rates["TRL"])
    scores = {"shape": name} | {side: spread(values) for side, values in rates.items()}
    scores |= {"speed": f"{ratio:.2f}x", "at least": f"{SCORING_TARGET:.1f}x"}

    shape = bench.shapes[0]
    ablation_runs = {name: _repeats(bench, "ablation", name, str(shape)) for name in ABLATIONS}
    full_speed = np.median(_speeds(shape, ablation_runs["none"]))
    ablations = [
        {
            "shape": str(shape),
            "taken out": name,
            "pairs/s": spread(_speeds(shape, runs)),
            "MB": spread([run.megabytes for run in runs], 0),
            "speed": f"{np.median(_speeds(shape, runs)) / full_speed:.2f}x",
        }
        for name, runs in ablation_runs.items()
    ]
    rows = {
        "the better of each side, against what was promised": verdicts,
        f"optimizer steps: {MEASURED}": steps,
        f"the reference pass, distinct responses a second: {MEASURED}": [scores],
        f"ours with one idea taken out: {MEASURED}": ablations,
        f"parity after {PARITY} steps in fp32: largest deviations": [_parity(bench)],
        "what was tried before, one run each, groups of ours and pairs of TRL's a pass": tried,
    }
    return {title: pa.Table.from_pylist(table) for title, table in rows.items()}


def _parity(bench: Bench) -> dict[str, Any]:
    """Return the largest deviation of a step's loss; of a tensor's weights, in norm; of a weight, against its tensor's
    largest; of the whole change, in norm. Adam moves a weight by lr whatever the size of its gradient, be it rounding.
    """
    from safetensors.numpy import load_file

    shape = str(bench.shapes[0])
    losses = [np.array(bench.results["parity", side, shape].losses) for side in TRAIN]
    ours, theirs = (load_file(bench.weights(side)) for side in TRAIN)
    init = load_file(bench.data.folder / "model" / "model.safetensors")
    off = np.abs(losses[0] - losses[1]) / np.abs(losses[1])
    weights, weight = (
        max(size(ours[name] - theirs[name]) / size(theirs[name]) for name in init)
        for size in (np.linalg.norm, lambda values: np.abs(values).max())
    )
    change, difference = (
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
        "their change": f"{difference / change:.1e}",
        "at most": f"{CLOSE:.0e}",
        "met": "yes" if len(off) == PARITY and max(off.max(), weights) <= CLOSE else "no",
    }


def _repeats(bench: Bench, *key: str) -> list[Any]:
    return [bench.results[*key, str(repeat)] for repeat in range(bench.repeats)]


def _speeds(shape: Shape, runs: list[Any]) -> list[float]:
    return [shape.groups * shape.pairs / run.seconds for run in runs]  # pairs per second


def page(bench: Bench, threads: int) -> str:
    """Return the tables in Markdown, with date, code, machine and method."""
    data = bench.data
    described = facts(bench.commit, ("torch", "transformers", "trl")) | {
        "threads": f"{threads} of either side",
        "model": f"Llama, hidden {data.hidden}, {data.layers} layers, vocabulary {data.vocabulary}, random weights",
        "measured": f"timed steps a run: {bench.steps}, after one of warm-up; repeats: {bench.repeats}",
    }
    return written("winnow bench optimize", described, METHOD, tables(bench))


METHOD = f"""A shape is prompt tokens / response tokens / responses / pairs of a group. Both sides train the same random
Llama on the same token ids, with equally many pairs per step, the same AdamW, LR schedule, clipping and cached
reference log-probs; each in the dtype and the forward passes that make it fastest, measured first (ours: the fastest
of those within the memory target, possibly with `gradient_checkpointing`, or the leanest if none is); in separate
processes that alternate.
Seconds are those of the steps after the first. Memory is the highest resident set after the first step, less the
resident set at its end, when gradients are freed and model and optimizer are allocated. TRL runs without gradient
checkpointing, padding, saving, logging and a reference network; figures are the {MEASURED}.
The reference pass is one process with all threads on either side; the stage `reference` runs one thread per worker."""

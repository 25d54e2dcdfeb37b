"""Stages for tests of Ray, in a module of its own so that workers can import it; each writes its calls in `folder`."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.context import StageContext
from pipeline.processes import DeadProcessError
from pipeline.registry import Range
from pipeline.stage import stage
from schemas import Model, Prompts
from schemas.tables import PROMPTS
from stages.data.rows import RowsById

_barrier = threading.Barrier(2)


def note(folder: str, *words: object) -> None:
    with (Path(folder) / "notes.txt").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def notes(folder: Path) -> list[list[str]]:
    """Return the lines that stages wrote, as lists of words."""
    return [line.split() for line in (folder / "notes.txt").read_text().splitlines()]


def plan_of_toys(shards: int, **steps: dict) -> Plan:
    """Return a plan of `steps` in order, each with its options; each reads the previous one, the last is the target."""
    names = ["some_prompts", *steps]
    bodies = {
        name: {"use": options.pop("use", name), "from": {"prompts": previous}, "with": options}
        for previous, (name, options) in zip(names, steps.items(), strict=False)
    }
    return make_plan(Recipe(name="toys", shards=shards, target=names[-1], steps={"some_prompts": {}} | bodies))


@stage(version=1, unsharded=True)
def some_prompts(*, count: int = 40) -> Prompts:
    row = {"text": "x", "token_ids": [1], "split": "train", "demonstration": None, "demonstration_ids": None}
    return pa.Table.from_pylist([row | {"prompt_id": f"{n:020x}"} for n in range(count)], schema=PROMPTS)


@stage(version=1)
def dying(prompts: Prompts, *, folder: str, deaths: list[int]) -> Prompts:
    """Dies `deaths[n]` times on a part that holds prompt n."""
    present = prompts.column("prompt_id").to_pylist()
    for n, times in enumerate(deaths):
        earlier = len(list(Path(folder).glob(f"death-of-{n}-*")))
        if f"{n:020x}" in present and earlier < times:
            (Path(folder) / f"death-of-{n}-{earlier}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return prompts


@stage(version=1)
def slow(prompts: Prompts, *, folder: str, name: str, seconds: Annotated[float, Range(ge=0)]) -> Prompts:
    note(folder, name, "begins", time.time(), os.getpid())
    time.sleep(seconds)
    note(folder, name, "ends", time.time(), os.getpid())
    return prompts


class _Engine:
    def __init__(self, folder: str):
        self.folder = folder

    def close(self) -> None:
        note(self.folder, "closed", "begins", time.time(), os.getpid())


@stage(version=1)
def followed(
    prompts: Prompts, ctx: StageContext, *, folder: str, name: str, parts: int, by: str, engine: bool = False
) -> Prompts:
    """Its last part ends when `by` has begun, or in vain after a minute. `closed` begins when its engine is closed."""
    if engine:
        ctx.open_once(_Engine, folder)
    note(folder, name, "begins", time.time(), os.getpid())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        begun = [words[0] for words in notes(Path(folder)) if words[1] == "begins"]
        if begun.count(name) < parts or by in begun:
            break
        time.sleep(0.02)
    note(folder, name, "ends", time.time(), os.getpid())
    return prompts


@stage(version=1)
def together(prompts: Prompts, *, folder: str) -> Prompts:
    """Its parts end when two processes have begun one, or in vain after a minute."""
    note(folder, "begins", os.getpid())
    deadline = time.monotonic() + 60
    while len({pid for _, pid in notes(Path(folder))}) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return prompts


@stage(version=1, concurrent=True)
def meeting(prompts: Prompts, *, folder: str) -> Prompts:
    """Two parts must run in one process at once, or this waits in vain."""
    _barrier.wait(timeout=30)
    note(folder, "met", os.getpid())
    return prompts


@stage(version=1)
def broken_once(prompts: Prompts, *, folder: str) -> Prompts:
    """Its first call raises, as a dead engine does."""
    note(folder, "called", os.getpid())
    if len(notes(Path(folder))) == 1:
        raise RuntimeError("the engine is dead")
    return prompts


@stage(version=1, unsharded=True)
def spreading(prompts: Prompts, *, world_size: int = 2) -> Prompts:
    """Needs the whole cluster, as distributed training does, which goes to Ray by itself."""
    import ray

    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            raise RuntimeError("a worker still holds what the ranks need")
        time.sleep(0.1)
    return prompts


@stage(version=1, unsharded=True)
def weights(prompts: Prompts, ctx: StageContext) -> Model:
    """Write a file in the place of a model's weights: the number of prompts."""
    (ctx.folder / "model").mkdir(parents=True, exist_ok=True)
    (ctx.folder / "model" / "model.safetensors").write_text(str(prompts.num_rows))
    return Model(ctx.folder / "model", "")


@stage(version=1)
def without_engine(prompts: Prompts) -> Prompts:
    """Finds its engine dead, as a process on a GPU may be."""
    raise DeadProcessError("the engine's process has ended")


@stage(version=1)
def lacking_a_row(prompts: Prompts) -> Prompts:
    """Asks for a row that its input does not have."""
    RowsById()["a-7"]
    return prompts


@stage(version=1)
def both(prompts: Prompts, others: Prompts) -> Prompts:
    return prompts

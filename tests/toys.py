"""Stages for tests of Ray, in a module of its own so that workers can import it. Each notes its calls in `folder`."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.registry import Range
from pipeline.stage import stage
from schemas import Prompts
from schemas.tables import PROMPTS


def rows(count: int) -> pa.Table:
    row = {"text": "x", "token_ids": [1], "split": "train", "demonstration": None, "demonstration_ids": None}
    return pa.Table.from_pylist([row | {"prompt_id": f"{n:020x}"} for n in range(count)], schema=PROMPTS)


def note(folder: str, *words: object) -> None:
    with (Path(folder) / "notes.txt").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def notes(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "notes.txt").read_text().splitlines()]


@stage(version=1, unsharded=True)
def some_prompts(*, count: int = 40) -> Prompts:
    return rows(count)


@stage(version=1)
def dying(prompts: Prompts, *, folder: str, deaths: int) -> Prompts:
    """Dies `deaths` times, on the part that holds prompt 0."""
    if f"{0:020x}" in prompts.column("prompt_id").to_pylist():
        mark = Path(folder) / f"{deaths}-{len(list(Path(folder).glob(f'{deaths}-*')))}"
        if len(list(Path(folder).glob(f"{deaths}-*"))) < deaths:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return prompts


@stage(version=1)
def slow(prompts: Prompts, *, folder: str, name: str, seconds: Annotated[float, Range(ge=0)]) -> Prompts:
    note(folder, name, "begins", time.time(), os.getpid())
    time.sleep(seconds)
    note(folder, name, "ends", time.time(), os.getpid())
    return prompts


_together = threading.Barrier(2)


@stage(version=1, concurrent=True)
def meeting(prompts: Prompts, *, folder: str) -> Prompts:
    """Two parts must be at work in one process at once, or this waits in vain."""
    _together.wait(timeout=30)
    note(folder, "met", os.getpid())
    return prompts


@stage(version=1)
def broken_once(prompts: Prompts, *, folder: str) -> Prompts:
    """Its first call raises, as a dead engine does."""
    note(folder, "called", os.getpid())
    if len(notes(Path(folder))) == 1:
        raise RuntimeError("the engine is dead")
    return prompts


def plan_of_toys(shards: int, **steps: dict) -> Plan:
    """`steps` in order, the last one is the target; each reads the one before."""
    names = ["some_prompts", *steps]
    bodies = {
        name: {"use": body.pop("use", name), "from": {"prompts": before}, "with": body}
        for before, (name, body) in zip(names, steps.items(), strict=False)
    }
    return make_plan(Recipe(name="toys", shards=shards, target=names[-1], steps={"some_prompts": {}} | bodies))


@stage(version=1, unsharded=True)
def spreading(prompts: Prompts, *, world_size: int = 2) -> Prompts:
    """It spreads over the cluster by itself, as training on ranks does, and wants all of it."""
    import ray

    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > until:
            raise RuntimeError("somebody sits on what its ranks need")
        time.sleep(0.1)
    return prompts


@stage(version=1)
def both(prompts: Prompts, others: Prompts) -> Prompts:
    return prompts

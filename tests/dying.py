"""A stage that kills its own process: for test_run, in a module of its own so that workers can import it."""

import os
import signal
from pathlib import Path

import pyarrow as pa

from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe
from pipeline.stage import stage
from schemas import Prompts
from schemas.tables import PROMPTS


def _rows(count: int) -> pa.Table:
    row = {"text": "x", "token_ids": [1], "split": "train", "demonstration": None, "demonstration_ids": None}
    return pa.Table.from_pylist([row | {"prompt_id": f"{n:020x}"} for n in range(count)], schema=PROMPTS)


@stage(version=1, whole=True)
def some_prompts() -> Prompts:
    return _rows(40)


@stage(version=1)
def dying(prompts: Prompts, *, folder: str, deaths: int) -> Prompts:
    """Dies `deaths` times, on the part that holds prompt 0."""
    if f"{0:020x}" in prompts.column("prompt_id").to_pylist():
        mark = Path(folder) / f"{deaths}-{len(list(Path(folder).glob(f'{deaths}-*')))}"
        if len(list(Path(folder).glob(f"{deaths}-*"))) < deaths:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return prompts


def plan_dying(folder: Path, deaths: int) -> Plan:
    steps = {
        "some_prompts": {},
        "dying": {"from": {"prompts": "some_prompts"}, "with": {"folder": str(folder), "deaths": deaths}},
    }
    return make_plan(Recipe(name="dying", shards=3, target="dying", steps=steps))

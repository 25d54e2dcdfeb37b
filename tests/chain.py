"""Three stages in a row, draw -> rate -> keep, whose results depend on luck as a sampler's depend on the hardware."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from pipeline import StageContext, stage
from pipeline.config.plan import Plan, Step, make_plan
from pipeline.config.recipe import load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.stage import stages
from pipeline.store.storage import Location
from pipeline.store.store import Json, Store
from schemas import Candidates, Prompts, Rewards, Selections, prompt_id
from schemas.tables import CANDIDATES, PROMPTS, REWARDS, SELECTIONS
from tests.runs import Silent

SHARDS = 3
RECIPE = """
shards: 3
target: keep
draw: {use: toy_draw}
rate: {use: toy_rate, from: {candidates: draw}}
keep: {use: toy_keep, from: {rewards: rate}}
"""


class Luck:
    """Influences outside of any key: a bonus on every reward, an error that ends toy_keep; and a record of calls."""

    def __init__(self) -> None:
        self.bonus = 0.0
        self.fail: BaseException | None = None
        self.calls: list[str] = []


@contextmanager
def toys() -> Iterator[Luck]:
    luck = Luck()

    @stage(version=1, unsharded=True)
    def toy_draw(ctx: StageContext, *, rows: int = 12) -> tuple[Prompts, Candidates]:
        luck.calls.append("draw")
        names = [prompt_id(f"prompt {n}") for n in range(rows)]
        prompts = [dict(prompt_id=name, text="p", token_ids=[n], split="train") for n, name in enumerate(names)]
        candidates = [candidate(name, n) for n, name in enumerate(names)]
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)

    @stage(version=1)
    def toy_rate(candidates: Candidates, ctx: StageContext, *, scale: float = 1.0) -> Rewards:
        luck.calls.append("rate")
        return pa.Table.from_pylist(
            [
                dict(prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], reward=scale * row["k"] + luck.bonus)
                for row in candidates.to_pylist()
            ],
            REWARDS,
        )

    @stage(version=1)
    def toy_keep(rewards: Rewards, ctx: StageContext, *, above: float = -1.0) -> Selections:
        luck.calls.append("keep")
        if luck.fail:
            raise luck.fail
        return pa.Table.from_pylist(
            [
                {name: row[name] for name in ("prompt_id", "candidate_id", "reward")} | dict(draw=0, round=0, weight=1)
                for row in rewards.to_pylist()
                if row["reward"] > above
            ],
            SELECTIONS,
        )

    try:
        yield luck
    finally:
        for name in ("toy_draw", "toy_rate", "toy_keep"):
            stages.entries.pop(name)


def candidate(prompt: str, n: int) -> dict:
    row = dict(candidate_id=f"c{n}", k=n, token_ids=[n], text="c", logp_kind="none", n_tokens=1, finish_reason="stop")
    return row | dict(prompt_id=prompt)


def recipe(folder: Path, name: str = "toy", **changes: str) -> Path:
    """Write the file of a recipe; `rate="with: {scale: 2.0}"` adds to that step."""
    text = RECIPE
    for step, more in changes.items():
        text = text.replace(f"use: toy_{step}", f"use: toy_{step}, {more}")
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def planned(file: Path, *sets: str) -> Plan:
    return make_plan(load_recipe(file, (), sets))


def make(plan: Plan, store: Store) -> list[str]:
    """Run the plan, and return the steps that ran."""
    reporter = Silent()
    run(plan, store, LocalExecutor(), reporter)
    return reporter.ran


def step(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


class Raced(Store):
    """Store to which another run links itself right after our nth call of `runs`.

    `found` is whether it then finds its first step finished.
    """

    def __init__(self, root: Location, plan: Plan, nth: int) -> None:
        super().__init__(root)
        self.plan, self.calls_left, self.found = plan, nth, False

    def runs(self) -> dict[str, Json]:
        links = super().runs()
        self.calls_left -= 1
        if self.calls_left == 0:
            self.link_run("again", self.plan.steps)
            self.found = self.folder(step(self.plan, "draw")).manifest is not None
        return links

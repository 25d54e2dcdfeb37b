"""Running the tiny world: plans, and a reporter that remembers."""

from pathlib import Path

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import load_recipe
from pipeline.store.storage import Location

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"


def local(place: Location) -> Path:
    """A store of tests lies in a folder, unless they say otherwise."""
    assert isinstance(place, Path)
    return place


class Silent:
    """A reporter that remembers which steps ran."""

    def __init__(self):
        self.ran, self.lost = [], []

    def step_cached(self, step): ...
    def step_started(self, step, done, total): ...
    def step_waiting(self, step, why): ...
    def part_finished(self, step): ...
    def progress(self, step, done, total, unit): ...

    def prompt_rejected(self, step, prompt, words):
        self.lost.append(prompt)

    def step_finished(self, step, manifest):
        self.ran.append(step.name)


def plan_of(world: Path, *sets: str, recipe: str = "rso") -> Plan:
    return make_plan(load_recipe(RECIPES / f"{recipe}.yaml", (world / "demo.yaml",), sets, name="run"))

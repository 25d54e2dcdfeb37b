"""Plans and runs of the tiny recipes, and a reporter that remembers what it heard."""

from pathlib import Path

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.schedule import Reporter
from pipeline.store.storage import Location
from pipeline.store.store import Store

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "jobs" / "recipes"
SHORT = ("optimize.epochs=1",)


def local(location: Location) -> Path:
    """Return a location of a store on this machine, as all stores of tests are that do not say otherwise."""
    assert isinstance(location, Path)
    return location


class Silent(Reporter):
    """Reporter that remembers which steps ran, and which prompts were rejected because they killed workers."""

    def __init__(self):
        self.ran, self.rejected = [], []

    def prompt_rejected(self, step, prompt, message):
        self.rejected.append(prompt)

    def step_finished(self, step, manifest):
        self.ran.append(step.name)


def plan_of(data_dir: Path, *sets: str, recipe: str = "rso") -> Plan:
    """Return the plan of a recipe on the data of fixture `data_dir`, with `--set` options."""
    return make_plan(load_recipe(RECIPES / f"{recipe}.yaml", (data_dir / "demo.yaml",), sets, "run", (RECIPES,)))


def run_recipe(data_dir, root, recipe, *sets):
    """Run a recipe under its own name; return its plan and the steps that were executed."""
    plan, reporter = plan_of(data_dir, *sets, recipe=recipe), Silent()
    plan.name = recipe
    run(plan, Store(root), LocalExecutor(), reporter)
    return plan, reporter.ran

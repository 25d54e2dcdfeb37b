"""Names of runs: a name stands for its finished results until `winnow gc --forget` takes it back."""

from collections.abc import Mapping
from itertools import count
from types import MappingProxyType

from jobs.opponents import find_opponents
from pipeline.config.plan import Plan
from pipeline.store.store import Store
from schemas import WinnowError


def with_free_names(plans: list[Plan], store: Store, bases: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Give each plan whose name stands for finished results of another plan the next number: `rso-2`.

    The earlier run stays as it is, on the leaderboard too. A run that has not reached its target gives up its name: a
    mistake that was interrupted need not be kept. So does one of which a judge has not finished, to a plan with the
    same target. The runs of a sweep, whose names begin with the base that `bases` has for them, get one number
    together, so that they stay one sweep. Return a note for each new name.

    Runs that plans are compared with are found before, because keys depend on them (jobs/opponents.py).
    """
    find_opponents(plans, store)
    families: dict[str, list[Plan]] = {}
    for plan in plans:
        families.setdefault(bases.get(plan.name, plan.name), []).append(plan)
    notes = []
    for base, members in families.items():
        taken = ""
        for number in count(1):
            numbered = base if number == 1 else f"{base}-{number}"
            names = [numbered + plan.name.removeprefix(base) for plan in members]
            others = [name for name, plan in zip(names, members, strict=True) if _is_taken(name, plan, store)]
            if not others:
                break
            taken = others[0]
        if taken:
            notes.append(f"{numbered}: {taken} stands for the results of other options or data, and stays as it is")
            for plan, name in zip(members, names, strict=True):
                if plan.target.key in (link["key"] for link in store.run(plan.name).values()):
                    notes[-1] = (
                        f"{name}: {plan.name} has the same {plan.target.name} and other results beside it, and stays "
                        "as it is: both names have a line on the leaderboard, with the same figures"
                    )
                plan.name = name
    return notes


def latest_run(name: str, runs: list[str]) -> str | None:
    """Return the run of this name with the highest number, among the names of runs."""
    numbered = {run: int(end) for run in runs if run.startswith(f"{name}-") and (end := run[len(name) + 1 :]).isdigit()}
    return max(numbered, key=lambda run: numbered[run], default=name if name in runs else None)


def _is_taken(name: str, plan: Plan, store: Store) -> bool:
    try:
        links = store.run(name)
    except WinnowError:  # a damaged file of a run, which the run writes anew
        return False
    keys = {step: link["key"] for step, link in links.items()}
    # A plan with all steps of the run goes on with it: one that `--until` ended before what could not be run then.
    if keys.items() <= {step.name: step.key for step in plan.steps}.items():
        return False
    target = plan.target
    if target.name not in links:
        return True
    # To a plan with the very same target the run gives up its name also if a judge beside that is not finished: all
    # that is finished of the target is the plan's too, and would have two lines on the leaderboard.
    needed = links.values() if keys[target.name] == target.key else [links[target.name]]
    return all(store.at(link["stage"], link["key"]).manifest is not None for link in needed)

"""Parts of plans: one step, a step with what follows or precedes it, a step again. Checked before anything changes."""

import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split_round
from pipeline.registry import nearest
from pipeline.store.gc import remove
from pipeline.store.inventory import Inventory, StoredStep, followers_first
from pipeline.store.store import Store
from schemas import COMMAND, WinnowError


@dataclass(frozen=True)
class Part:
    """Options that say which steps of several recipes a command runs; at most one of the first three is set."""

    only: str | None = None
    until: str | None = None
    from_step: str | None = None
    force: str | None = None

    @property
    def last(self) -> str | None:
        """Return the name of the step that no step of the part follows."""
        return self.until or self.only

    @property
    def options(self) -> dict[str, str]:
        """Return the name of a step by each option that is set, as the command line has them."""
        names = {"--only": self.only, "--until": self.until, "--from": self.from_step, "--force": self.force}
        return {option: name for option, name in names.items() if name is not None}


@dataclass(frozen=True)
class Rerun:
    """Plans with the steps to run, and the stored steps to delete first because they are to be computed again."""

    plans: list[Plan]
    to_delete: list[StoredStep]
    store: Store
    recipes: list[str]  # all of the command, also those without a step to run
    force: str | None

    def to_run(self) -> list[Step]:
        """Return the steps that are not finished, or that will be deleted."""
        deleted = {stored.key for stored in self.to_delete}
        steps = [step for plan in self.plans for step in plan.steps_to_run]
        missing = {step.key for step in unfinished(steps, self.store)}
        return [step for step in steps if step.key in deleted | missing]

    def check(self) -> None:
        """Raise WinnowError where a run of another recipe needs a result that is to be deleted."""
        deleted = {stored.key for stored in self.to_delete}
        others = [
            run
            for run, steps in (self.store.runs() if deleted else {}).items()
            if run not in self.recipes and any(link["key"] in deleted for link in steps.values())
        ]
        if others:
            forget = [word for run in others for word in ("--forget", run)]
            command = shlex.join([COMMAND, "gc", "--store", str(self.store.root), *forget, "--yes"])
            needs, recipes = ("need", "their recipes") if len(others) > 1 else ("needs", "its recipe")
            raise WinnowError(
                f"--force {self.force}: {', '.join(others)} {needs} what would be deleted; add {recipes} to the "
                f"command, or remove {'them' if len(others) > 1 else 'it'} from the store: `{command}`"
            )

    def delete(self) -> None:
        """Delete the stored steps, followers first: wherever this ends, no finished step lacks its inputs.

        The step that is forced takes no rows of other steps.

        Raise WinnowError, with nothing deleted, where another run computes one of them, or needs one by now.
        """

        def is_needed() -> bool:
            self.check()
            return False

        with ExitStack() as claims:
            for stored in self.to_delete:
                claim = stored.folder.try_lock()
                if claim is None:
                    raise WinnowError(
                        f"--force: another run is computing {stored.stage} {stored.key}, which would be deleted; "
                        "wait for it, or stop it"
                    )
                claims.callback(claim.release)
            remove([stored.folder for stored in self.to_delete], is_needed)
        for plan in self.plans if self.force else ():
            for step in matching(plan, self.force or ""):
                step.takes_earlier_rows = False


def rerun(plans: list[Plan], store: Store, part: Part = Part()) -> Rerun:
    """Return what a part means for several recipes at once.

    Nothing is changed yet. Raise WinnowError for unknown steps, for inputs that are not finished, and where a run would
    lose a result that it needs: one that is not among the plans, or one of them whose part does not compute it again.
    """
    parts = narrowed(plans, part)
    to_delete = _to_delete(plans, part.force, store) if part.force is not None else []
    result = Rerun(parts, to_delete, store, [plan.name for plan in plans], part.force)
    result.check()
    deleted = {stored.key for stored in to_delete}
    if part.only or part.from_step:  # a plan, and `--until`, contain all that their steps read
        _require_inputs(parts, deleted, store, part)
    again = {step.key for plan in parts for step in plan.steps_to_run}
    lost = {step.name: None for plan in plans for step in plan.steps if step.key in deleted - again}
    if lost:
        option, step_name = next(iter(part.options.items()))
        raise WinnowError(
            f"{option} {step_name} --force {part.force}: {', '.join(lost)} would be deleted, as computed from "
            f"{part.force}, and not run; omit {option} {step_name}, and all of it runs again"
        )
    return result


def _require_inputs(parts: list[Plan], deleted: set[str], store: Store, part: Part) -> None:
    """Raise WinnowError where what the parts read is not finished, or computed by this part or an earlier one."""
    option, step_name = next(iter(part.options.items()))
    computed: set[str] = set()
    problems = []
    for plan in parts:
        computed |= {step.key for step in plan.steps_to_run}
        sources = {source.name: source for step in plan.steps_to_run for source in step.inputs.values()}
        missing = {step.name for step in unfinished(list(sources.values()), store)}
        lacking = [
            name
            for name, source in sources.items()
            if source.key not in computed and (source.key in deleted or name in missing)
        ]
        if lacking:
            first = ", then ".join(f"--until {source}" for source in lacking)
            problems.append(
                f"{plan.name}: {option} {step_name}: it reads {' and '.join(lacking)}, which "
                f"{'are' if len(lacking) > 1 else 'is'} not finished; run with {first} in place of {option} first, "
                f"or omit {option}"
            )
    if problems:
        raise WinnowError(*problems)


def narrowed(plans: list[Plan], part: Part) -> list[Plan]:
    """Return plans with the steps of a part, without those that have none of them.

    Raise WinnowError for a step that no plan has, for two options at once that select steps, and for a forced step that
    is none of the part. No store is needed.
    """
    selections = {option: name for option, name in part.options.items() if option != "--force"}
    if len(selections) > 1:
        words = " ".join(f"{option} {name}" for option, name in selections.items())
        raise WinnowError(f"{words}: give one of them; --from runs what follows a step too, --until what it needs")
    for option, name in part.options.items():
        if not name:
            raise WinnowError(f"{option} '': name a step")
        if not any(matching(plan, name) for plan in plans):
            names = {word for plan in plans for step in plan.steps for word in (step.name, split_round(step.name)[0])}
            recipes = " and ".join(plan.name for plan in plans)
            raise WinnowError(f"{option} {name}: no step {name!r} in {recipes}; {nearest(name, sorted(names))}")
    if not selections:
        return plans
    ((option, name),) = selections.items()
    select = {"--only": matching, "--until": predecessors, "--from": followers}[option]
    parts = [replace(plan, part=steps) for plan in plans if (steps := select(plan, name))]
    if part.force is not None and not any(
        step in plan.steps_to_run for plan in parts for step in matching(plan, part.force)
    ):
        raise WinnowError(
            f"--force {part.force}: {option} {name} leaves it out, so that it would be deleted and not run again; omit "
            "one of them"
        )
    return parts


def unfinished(steps: list[Step], store: Store) -> list[Step]:
    """Return the steps that are not finished in a store."""
    return [step for step in steps if store.folder(step).manifest is None]


def matching(plan: Plan, name: str) -> list[Step]:
    """Return the step of this name, or, by a name without a round, that of every round."""
    return [step for step in plan.steps if name in (step.name, split_round(step.name)[0])]


def followers(plan: Plan, name: str) -> list[Step]:
    """Return a step and all that is computed from it."""
    names = {step.name for step in matching(plan, name)}
    for step in plan.steps:  # inputs come before what reads them
        if any(source.name in names for source in step.inputs.values()):
            names.add(step.name)
    return [step for step in plan.steps if step.name in names]


def predecessors(plan: Plan, name: str) -> list[Step]:
    """Return a step and all that it is computed from."""
    names = {step.name for step in matching(plan, name)}
    for step in reversed(plan.steps):
        if step.name in names:
            names |= {source.name for source in step.inputs.values()}
    return [step for step in plan.steps if step.name in names]


def _to_delete(plans: list[Plan], name: str, store: Store) -> list[StoredStep]:
    """Return the stored results of a step and of all that follows from it, in whichever recipe; followers first."""
    inventory = Inventory(store)
    inputs = {key: stored.inputs for key, stored in inventory.steps.items()}
    inputs |= {step.key: frozenset(s.key for s in step.inputs.values()) for plan in plans for step in plan.steps}
    needed_elsewhere = inventory.reached(tuple(plan.name for plan in plans))
    keys = {step.key for plan in plans for step in matching(plan, name)}
    # A result whose inputs are not known may follow from the step too.
    keys |= {key for key, sources in inputs.items() if sources is None and key not in needed_elsewhere}
    while more := {key for key, sources in inputs.items() if sources and sources & keys} - keys:
        keys |= more
    return [inventory.steps[key] for key in followers_first(inputs) if key in keys and key in inventory.steps]

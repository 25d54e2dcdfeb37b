"""Parts of plans: one step, a step with what follows or precedes it, a step again. Checked before anything changes."""

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split_round
from pipeline.registry import nearest
from pipeline.store.gc import remove
from pipeline.store.inventory import Inventory, StoredStep, followers_first
from pipeline.store.store import Store
from schemas import WinnowError


@dataclass(frozen=True)
class Rerun:
    """Plans with the steps to run, and the stored steps to delete first because they are to be computed again.

    check: raises WinnowError where another run has come to need one of them.
    """

    plans: list[Plan]
    to_delete: list[StoredStep]
    check: Callable[[], None]

    def to_run(self, store: Store) -> list[Step]:
        """Return the steps that are not finished, or that will be deleted."""
        deleted = {stored.key for stored in self.to_delete}
        steps = [step for plan in self.plans for step in plan.steps_to_run]
        missing = {step.key for step in unfinished(steps, store)}
        return [step for step in steps if step.key in deleted | missing]

    def delete(self) -> None:
        """Delete the stored steps, followers first: wherever this ends, no finished step lacks its inputs.

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


def rerun(
    plans: list[Plan],
    store: Store,
    only: str | None = None,
    from_step: str | None = None,
    force: str | None = None,
    until: str | None = None,
) -> Rerun:
    """Return what `--only`, `--from` (from_step), `--until` and `--force` a step mean, for several recipes at once.

    Nothing is changed yet. Raise WinnowError for unknown steps, for inputs that are not finished, and where a run that
    is not among the plans would lose a result that it needs.
    """
    parts = narrowed(plans, only, from_step, force, until)
    to_delete = _to_delete(plans, force, store) if force else []
    keys = {stored.key for stored in to_delete}

    def check() -> None:
        if keys:
            _check_unneeded(store, plans, keys, f"--force {force}")

    check()
    if not (only or from_step):  # a plan, and `--until`, contain all that their steps read
        return Rerun(parts, to_delete, check)

    # What the parts read must be finished, or computed by this part or an earlier one.
    option, name = ("--only", only) if only else ("--from", from_step)
    computed: set[str] = set()
    problems = []
    for plan in parts:
        computed |= {step.key for step in plan.steps_to_run}
        sources = {source.name: source for step in plan.steps_to_run for source in step.inputs.values()}
        missing = {step.name for step in unfinished(list(sources.values()), store)}
        lacking = [
            name
            for name, source in sources.items()
            if source.key not in computed and (source.key in keys or name in missing)
        ]
        if lacking:
            first = ", then ".join(f"--until {source}" for source in lacking)
            problems.append(
                f"{plan.name}: {option} {name}: it reads {' and '.join(lacking)}, which "
                f"{'are' if len(lacking) > 1 else 'is'} not finished; run with {first} in place of {option} first, "
                f"or omit {option}"
            )
    if problems:
        raise WinnowError(*problems)
    return Rerun(parts, to_delete, check)


def narrowed(
    plans: list[Plan],
    only: str | None = None,
    from_step: str | None = None,
    force: str | None = None,
    until: str | None = None,
) -> list[Plan]:
    """Return plans with the steps that `--only`, `--from` or `--until` selects, without those that have none of them.

    Raise WinnowError for a step that no plan has, and for two of these options at once. No store is needed.
    """
    selections = [
        (option, name, select)
        for option, name, select in (
            ("--only", only, matching),
            ("--from", from_step, followers),
            ("--until", until, predecessors),
        )
        if name
    ]
    if len(selections) > 1:
        words = " ".join(f"{option} {name}" for option, name, _ in selections)
        raise WinnowError(f"{words}: give one of them; --from runs what follows a step too, --until what it needs")
    for option, name in [*((option, name) for option, name, _ in selections), ("--force", force)]:
        if name and not any(matching(plan, name) for plan in plans):
            names = {word for plan in plans for step in plan.steps for word in (step.name, split_round(step.name)[0])}
            recipes = " and ".join(plan.name for plan in plans)
            raise WinnowError(f"{option} {name}: no step {name!r} in {recipes}; {nearest(name, sorted(names))}")
    if not selections:
        return plans
    _, step, select = selections[0]
    return [replace(plan, part=steps) for plan in plans if (steps := select(plan, step))]


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


def _check_unneeded(store: Store, plans: list[Plan], deleted: set[str], option: str) -> None:
    """Raise WinnowError where a run that is not among the plans needs a result that is to be deleted."""
    ours = {plan.name for plan in plans}
    others = [
        run
        for run, steps in store.runs().items()
        if run not in ours and any(link["key"] in deleted for link in steps.values())
    ]
    if others:
        forget = [word for run in others for word in ("--forget", run)]
        command = shlex.join(["winnow", "gc", "--store", str(store.root), *forget, "--yes"])
        needs, recipes = ("need", "their recipes") if len(others) > 1 else ("needs", "its recipe")
        raise WinnowError(
            f"{option}: {', '.join(others)} {needs} what would be deleted; add {recipes} to the command, or remove "
            f"{'them' if len(others) > 1 else 'it'} from the store: `{command}`"
        )

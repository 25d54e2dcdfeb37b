"""One step alone, a step and what follows it, a step made again: parts of plans, checked before anything is touched."""

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split
from pipeline.registry import nearest
from pipeline.store.gc import remove
from pipeline.store.inventory import Inventory, StoredStep, followers_first, links
from pipeline.store.store import Store
from schemas import WinnowError

Check = Callable[[], None]


@dataclass(frozen=True)
class Rerun:
    """Plans with the steps to make, and the sealed or begun steps that go first because they are made again."""

    plans: list[Plan]
    gone: list[StoredStep]
    check: Check

    def to_make(self, store: Store) -> list[Step]:
        """The steps that are not sealed, or not for long."""
        gone = {made.key for made in self.gone}
        wanted = [step for plan in self.plans for step in plan.wanted]
        lacking = {step.key for step in unsealed(wanted, store)}
        return [step for step in wanted if step.key in gone | lacking]

    def drop(self) -> None:
        """Delete them, those that follow first: whenever this ends, no step stands on what is not there.

        Raises WinnowError, with nothing deleted, where another run is making one of them, or reaches one by now.
        """
        with ExitStack() as claims:
            for made in self.gone:
                claim = made.folder.claim()
                if claim is None:
                    raise WinnowError(
                        f"--force: another run is making {made.stage} {made.key}, which would be made again; "
                        "wait for it, or stop it"
                    )
                claims.callback(claim.release)
            remove([made.folder for made in self.gone], self._reached)

    def _reached(self) -> bool:
        self.check()
        return False


def rerun(
    plans: list[Plan], store: Store, only: str | None = None, onward: str | None = None, force: str | None = None
) -> Rerun:
    """What `--only`, `--from` (onward) and `--force` a step come to, several recipes at once; nothing is changed yet.

    Raises WinnowError for unknown steps, for what they read and is not sealed, and where a run that is not among the
    plans would lose what it stands on.
    """
    parts = narrowed(plans, only, onward, force)
    gone = _to_drop(plans, force, store) if force else []
    keys = {made.key for made in gone}
    check: Check = partial(_refuse_if_reached, store, plans, keys, f"--force {force}") if gone else _nothing
    check()
    if only or onward:
        _check_sealed(parts, f"--only {only}" if only else f"--from {onward}", store, keys)
    return Rerun(parts, gone, check)


def narrowed(
    plans: list[Plan], only: str | None = None, onward: str | None = None, force: str | None = None
) -> list[Plan]:
    """Plans with the steps that `--only` or `--from` leaves to make, without those that have none; needs no store.

    Raises WinnowError for steps that no plan has.
    """
    if only and onward:
        raise WinnowError(f"--only {only} --from {onward}: give one of them; --from makes what follows too")
    for option, name in (("--only", only), ("--from", onward), ("--force", force)):
        if name:
            _check_known(plans, f"{option} {name}", name)
    name, choose = (only, chosen) if only else (onward, followers)
    return [replace(plan, part=steps) for plan in plans if (steps := choose(plan, name))] if name else plans


def unsealed(steps: list[Step], store: Store) -> list[Step]:
    return [step for step in steps if store.folder(step).manifest is None]


def _nothing() -> None: ...


def chosen(plan: Plan, name: str) -> list[Step]:
    """A step, or, by its name without a round, that of every round."""
    return [step for step in plan.steps if name in (step.name, split(step.name)[0])]


def followers(plan: Plan, name: str) -> list[Step]:
    """A step, and all that is made of it."""
    found = {step.name for step in chosen(plan, name)}
    for step in plan.steps:  # inputs come before what reads them
        if any(source.name in found for source in step.inputs.values()):
            found.add(step.name)
    return [step for step in plan.steps if step.name in found]


def _check_known(plans: list[Plan], place: str, name: str) -> None:
    if not any(chosen(plan, name) for plan in plans):
        names = {word for plan in plans for step in plan.steps for word in (step.name, split(step.name)[0])}
        which = " and ".join(plan.name for plan in plans)
        raise WinnowError(f"{place}: no step {name!r} in {which}; {nearest(name, sorted(names))}")


def _check_sealed(parts: list[Plan], place: str, store: Store, gone: set[str]) -> None:
    """What parts of plans read besides; an earlier one may make what a later one reads."""
    making: set[str] = set()
    problems = []
    for plan in parts:
        making |= {step.key for step in plan.wanted}
        read = {source.name: source for step in plan.wanted for source in step.inputs.values()}
        lacking = [
            name
            for name, source in read.items()
            if source.key not in making and (source.key in gone or store.folder(source).manifest is None)
        ]
        problems += [f"{plan.name}: {place}: {_lacks(place, lacking)}"] if lacking else []
    if problems:
        raise WinnowError(*problems)


def _lacks(place: str, lacking: list[str]) -> str:
    """What to do about what is not there."""
    these, option = " and ".join(lacking), place.split()[0]
    targets = ", then ".join(f"--set target={name}" for name in lacking)
    return (
        f"it reads {these}, which {'are' if len(lacking) > 1 else 'is'} not sealed; first, in place of {option}, "
        f"{targets} makes what is missing; or leave {option} out"
    )


def _to_drop(plans: list[Plan], name: str, store: Store) -> list[StoredStep]:
    """What lies in the store of this step and of all that follows from it, of whichever recipe; followers first."""
    contents = Inventory(store)
    inputs = {key: made.inputs for key, made in contents.made.items()}
    inputs |= {step.key: frozenset(s.key for s in step.inputs.values()) for plan in plans for step in plan.steps}
    outside = contents.reached(tuple(plan.name for plan in plans))
    keys = {step.key for plan in plans for step in chosen(plan, name)}
    keys |= {key for key, sources in inputs.items() if sources is None and key not in outside}  # it may follow too
    while more := {key for key, sources in inputs.items() if sources and sources & keys} - keys:
        keys |= more
    return [contents.made[key] for key in followers_first(inputs) if key in keys and key in contents.made]


def _refuse_if_reached(store: Store, plans: list[Plan], gone: set[str], place: str) -> None:
    ours = {plan.name for plan in plans}
    others = [
        run
        for run, steps in links(store).items()
        if run not in ours and any(link["key"] in gone for link in steps.values())
    ]
    if others:
        many = len(others) > 1
        forget = [word for run in others for word in ("--forget", run)]
        command = shlex.join(["winnow", "gc", "--store", str(store.root), *forget, "--yes"])
        raise WinnowError(
            f"{place}: {', '.join(others)} would lose what {'they stand' if many else 'it stands'} on; name "
            f"{'their recipes' if many else 'its recipe'} in the command too, or do without: `{command}`"
        )

"""Other runs that a policy is compared with: `judges: {NAME: {against: RUN}}`, found in a store when a plan is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.keys import differences
from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split_round
from pipeline.registry import nearest
from pipeline.store.store import Json, Store
from schemas import WinnowError
from stages.evaluation.other_run import other_run

# Options of `sample` in which draws to compare may differ: everything else changes what is compared.
FREE = ("n", "seed", "engine", "engine_options", "dtype", "steer", "steer_top", "steer_every")


def find_opponents(plans: Sequence[Plan], store: Store) -> None:
    """Put the draws of the run that each step of stage `other_run` names in its place.

    That is a run of the store, or one that stands before in the same command. A plan is not compared with itself: a
    note says so. Call it before the keys of the plans are read. Raise WinnowError for a run that is not there, not
    finished, or was evaluated on other prompts or with other sampling.
    """
    problems: list[str] = []
    for position, plan in enumerate(plans):
        for step in [step for step in plan.steps if step.entry.fn is other_run]:
            name, round = split_round(step.options["run"])
            if name == plan.name and round is None:
                gone = [step, *_followers(plan, [step])]  # it is not compared with itself
                plan.steps = [other for other in plan.steps if other not in gone]
                plan.evaluations = [other for other in plan.evaluations if other not in gone]
                plan.notes.append(f"judges: {plan.name} is not compared with itself")
                continue
            if name == plan.name:
                problems.append(
                    f"{plan.name}: against: {step.options['run']!r}: a round of the run itself; run it under a name of "
                    "its own before (`--name`), and compare with that"
                )
                continue
            before = next((other for other in plans[:position] if other.name == name), None)
            readers = [reader.inputs for reader in plan.steps if reader.inputs.get("baseline") is step]
            candidates = next((inputs["candidates"] for inputs in readers if "candidates" in inputs), None)
            if candidates is None:
                problems.append(
                    f"{plan.name}: {step.name}: no step reads it as its baseline, beside candidates; "
                    f"`judges: {{NAME: {{against: {step.options['run']}}}}}` in a config makes steps that do"
                )
                continue
            try:
                _fill(step, name, round, candidates, before, store)
            except WinnowError as error:
                problems += [f"{plan.name}: {problem}" for problem in error.problems]
        # What reads another run's draws has its key by them, also if somebody has looked at its key before.
        for step in _followers(plan, [step for step in plan.steps if step.entry.fn is other_run]):
            for name in ("identity", "key", "row_key"):
                step.__dict__.pop(name, None)
    if problems:
        raise WinnowError(*dict.fromkeys(problems))


def _followers(plan: Plan, steps: list[Step]) -> list[Step]:
    """Return the steps of a plan that read these, or what follows from these."""
    followers: list[Step] = []
    for step in plan.steps:  # inputs come before what reads them
        if any(source in steps or source in followers for source in step.inputs.values()):
            followers.append(step)
    return followers


def _fill(step: Step, run: str, round: int | None, candidates: Step, before: Plan | None, store: Store) -> None:
    """Give the step the stage, identity and key of the run's draws; `candidates` are those that it is compared with."""
    where, sampling = f"against: {step.options['run']!r}", split_round(candidates.name)[0]
    if before is not None:
        named = {other.name: other for other in before.steps}
        name = _name_in_run(list(named), sampling, round, where, run)
        identity, key, code = named[name].identity, named[name].key, named[name].code
        prompts = named[name].inputs["prompts"].identity if "prompts" in named[name].inputs else None
    else:
        runs = store.runs()
        if run not in runs:
            raise WinnowError(
                f"{where}: no run {run!r} in {store.root}; {nearest(run, sorted(runs))}; run it first, or name it "
                "before this one in the command"
            )
        links = runs[run]
        link = links[_name_in_run(list(links), sampling, round, where, run)]
        manifest = store.at(link["stage"], link["key"]).manifest
        if manifest is None:
            raise WinnowError(f"{where}: {sampling} of that run is not finished; the same winnow run of it continues")
        identity, key, code = {"stage": link["stage"]} | manifest["identity"], link["key"], manifest.get("code") or {}
        prompts = _identity_of(identity["inputs"].get("prompts"), links.values(), store)

    # In what the draws differ beside the policy, and their prompts beside the columns that are kept of them.
    def conditions(draws: Mapping[str, Any], prompts: Mapping[str, Any] | None) -> dict[str, Any]:
        of_prompts: Any = draws["inputs"].get("prompts")
        if prompts is not None:
            of_prompts = {**prompts, "options": {**prompts["options"], "keep": None}}
        options = {name: value for name, value in draws["options"].items() if name not in FREE}
        return {"stage": draws["stage"], "options": options, "prompts": of_prompts}

    now = candidates.inputs["prompts"].identity if prompts and "prompts" in candidates.inputs else None
    changes = differences(conditions(identity, now and prompts), conditions(candidates.identity, now))
    if changes:
        raise WinnowError(
            f"{where}: its responses are not comparable: {'; '.join(changes)} (that run -> this one); evaluate both "
            "on the same prompts with the same sampling"
        )
    step.entry = replace(step.entry, name=identity["stage"])
    step.__dict__.update(identity=identity, key=key, row_key=key, code=code)  # in place of what would be computed


def _identity_of(key: str | None, links: Iterable[Json], store: Store) -> Json | None:
    """Return what decided the result of a run's step, by its key; None if it is not there any more."""
    for link in links:
        if link["key"] == key and (manifest := store.at(link["stage"], link["key"]).manifest):
            return {"stage": link["stage"]} | manifest["identity"]
    return None


def _name_in_run(names: list[str], sampling: str, round: int | None, where: str, run: str) -> str:
    """Return the name of the step in a run: of one round, by default the last."""
    rounds = {number: name for name in names for step, number in [split_round(name)] if step == sampling}
    if round is None and rounds:
        return rounds[max(rounds, key=lambda number: number or 0)]
    if round not in rounds:
        numbers = ", ".join(str(number) for number in rounds if number)
        cure = f"its rounds are {numbers}" if numbers else "it has no rounds"
        cure = cure if rounds else f"it has no step {sampling!r}"
        raise WinnowError(f"{where}: run {run!r}: {cure}")
    return rounds[round]

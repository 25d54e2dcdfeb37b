"""Judges of a recipe: each that a config names becomes a step that judges and one that computes its win rate.

They read the prompts and draws that step `judge` reads, which a config may have set: `prompts` and `eval_sample` in
jobs/recipes/_base.yaml. With

    judges:
      gold: {ranker: {use: model, with: {path: /models/gold}}, against: [sft, target]}

the steps are

    ranker_of_gold:            {use: model, with: {path: /models/gold}}
    judge_by_gold:             {use: judge, from: {prompts: prompts, candidates: eval_sample, baseline: eval_baseline,
                                ranker: ranker_of_gold}}
    evaluate_by_gold:          {use: win_rate, from: {candidates: eval_sample, baseline: eval_baseline,
                                judgements: judge_by_gold}, with: {judge: gold, against: sft}}

and the same against the target texts, `judge_by_gold_vs_target` and `evaluate_by_gold_vs_target`. A judge's steps read
no other judge's, so that a change of one computes nothing of the others again. The judge `proxy` is that of step
`judge` itself: what is said of it lies over that step.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pipeline.config.layers import Layer, below_configs, merge, merge_all
from pipeline.registry import name_or, nearest
from pipeline.stage import signature_of, stages
from schemas import WinnowError

PROXY, GOLD = "proxy", "gold"
NAME = re.compile(r"[a-z][a-z0-9_]*")
VERSUS = "_vs_"  # in names of steps and metrics, between a judge and its opponent
SFT, TARGET = "sft", "target"
OPPONENTS = {SFT: "eval_baseline", TARGET: "targets"}  # by what `against` says; anything else names a run
READ = {"prompts": "prompts", "candidates": "eval_sample"}  # by a judge, unless step `judge` reads others


class JudgeRanker(BaseModel):
    """Model or program that a judge asks, as the body of a step."""

    model_config = ConfigDict(strict=True, extra="forbid")
    use: str = Field(description="the name of a stage, or of a program")
    inputs: dict[str, str | None] = Field({}, alias="from", description="a mapping of inputs to steps")
    options: dict[str, Any] = Field({}, alias="with", description="a mapping of options to values")


STEP_OR_BODY = name_or(JudgeRanker, "the name of a step, or its body: {use: ..., with: {...}}")


def _parse_against(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("must be sft, target, the name of a run, or a list of these")
    return names


class JudgeBody(BaseModel):
    """Judge as a config writes it: a step of stage `judge`, or `use`, with what it asks and what it compares with."""

    model_config = ConfigDict(strict=True, extra="forbid")
    use: str = Field("judge", description="the name of a stage that judges: judge, autosxs or ratings")
    ranker: Annotated[str | JudgeRanker | None, STEP_OR_BODY] = None
    options: dict[str, Any] = Field({}, alias="with", description="a mapping of options to values")
    against: Annotated[list[str], PlainValidator(_parse_against)] = [SFT]


def with_judges(layers: list[Layer], judges: Mapping[str, JudgeBody | None]) -> tuple[list[Layer], list[str]]:
    """Return the layers with one more, which has the judges' steps, and the names of the steps to end with.

    It lies below the configs, which may say more of its steps. A judge that is null is none. Raise WinnowError with all
    mistakes.
    """
    if not any(judges.values()):
        return layers, []
    recipe = merge_all(layers)
    inputs = _inputs_of("judge", recipe)
    shared = {item: inputs.get(item, source) for item, source in READ.items()}
    problems: list[str] = []
    steps: dict[str, Any] = {}
    ends: list[str] = []
    opponents: dict[str, str] = {}  # by the step that has their draws
    for name, judge in judges.items():
        if judge is None:
            continue
        problems += _judge_problems(name, judge, recipe)
        ranker = judge.ranker
        if isinstance(ranker, JudgeRanker):
            steps[f"ranker_of_{name}"] = ranker.model_dump(by_alias=True)
            ranker = f"ranker_of_{name}"
        if name == PROXY:
            steps["judge"] = ({"from": {"ranker": ranker}} if ranker else {}) | {"with": judge.options}
        for opponent in judge.against:
            suffix = "" if opponent == SFT else VERSUS + re.sub(r"\W+", "_", opponent)
            if name == PROXY and not suffix:
                continue  # which `evaluate` has
            baseline = OPPONENTS.get(opponent, f"against{suffix.removeprefix('_vs')}")
            if opponent not in OPPONENTS:
                steps[baseline] = {"use": "other_run", "with": {"run": opponent}}
            if (other := opponents.setdefault(baseline, opponent)) != opponent:
                problems.append(f"judges.{name}.against: {opponent!r} differs from {other!r} only in signs; omit one")
            judging = f"judge_by_{name}{suffix}"
            steps[judging] = _judging_step(name, judge, shared | {"baseline": baseline}, ranker, opponent)
            sources = {"candidates": shared["candidates"], "baseline": baseline, "judgements": judging}
            if judge.use in stages.entries and signature_of(stages.entries[judge.use]).makes("votes"):
                sources["votes"] = judging
            options = {"judge": name, "against": opponent}
            steps[f"evaluate_by_{name}{suffix}"] = {"use": "win_rate", "from": sources, "with": options}
            ends.append(f"evaluate_by_{name}{suffix}")
    if problems:
        raise WinnowError(*dict.fromkeys(problems))
    return below_configs(layers, Layer("judges", steps, is_config=True, is_own=True)), ends


def _inputs_of(step: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what a step reads, also by `like`. A cycle of steps ends it, and is reported with all other mistakes."""
    inputs: dict[str, Any] = {}
    seen: set[str] = set()
    while step in recipe and step not in seen:
        seen.add(step)
        inputs = merge(recipe[step].get("from") or {}, inputs)
        step = recipe[step].get("like") or ""
    return inputs


def _judging_step(
    name: str, judge: JudgeBody, sources: dict[str, Any], ranker: str | None, opponent: str
) -> dict[str, Any]:
    """Return the body of the step that compares with one opponent."""
    entry = stages.entries.get(judge.use)
    # Draws of two runs have the same seeds: those of one number are no independent draws.
    extra = {"matches": "other_k"} if opponent not in OPPONENTS else {}
    extra = extra if entry is None or "matches" in entry.options.model_fields else {}
    if name == PROXY:
        return {"like": "judge", "from": {"baseline": sources["baseline"]}, "with": extra | judge.options}
    sources = sources | ({"ranker": ranker} if ranker else {})
    if entry is not None:  # one of a plugin is not loaded yet
        names = {item.name for item in signature_of(entry).inputs}
        sources = {item: source for item, source in sources.items() if item in names}
    return {"use": judge.use, "from": sources, "with": extra | judge.options}


def _judge_problems(name: str, judge: JudgeBody, recipe: dict[str, Any]) -> list[str]:
    """Return what is wrong with a judge before any stage is asked."""
    where, problems = f"judges.{name}", []
    if not NAME.fullmatch(name) or VERSUS in name:
        problems.append(
            f"{where}: a judge's name is part of steps and metrics: small letters, digits and underscores, the first a "
            f"letter, without {VERSUS!r}"
        )
    entry = stages.entries.get(judge.use)
    if entry is not None and not signature_of(entry).makes("judgements"):
        judging = [other for other, item in stages.entries.items() if signature_of(item).makes("judgements")]
        problems.append(f"{where}.use: stage {judge.use} judges nothing; {nearest(judge.use, judging)}")
    if name == PROXY and judge.use != "judge":
        problems.append(f"{where}.use: {judge.use!r}, and the proxy is the judge of step `judge`; choose another name")
    if name != PROXY and judge.use == "judge" and judge.ranker is None and "by" not in judge.options:
        problems.append(
            f"{where}: says of nobody who judges; set `ranker` to a step, a model or a program, or `with: {{by: ...}}`"
        )
    if (
        entry is not None
        and judge.ranker is not None
        and not any(i.name == "ranker" for i in signature_of(entry).inputs)
    ):
        problems.append(f"{where}.ranker: stage {judge.use} asks none; remove it")
    evaluate = recipe.get("evaluate")
    if name == GOLD and isinstance(evaluate, dict) and (evaluate.get("with") or {}).get("gold") is not None:
        problems.append(
            f"{where}: `evaluate.gold` is a reward of that name already, and both would be `gold_win`; choose another "
            "name, or set `evaluate: {with: {gold: null}}`"
        )
    counts = Counter(judge.against)
    problems += [f"{where}.against: {text!r} is listed {n} times; list it once" for text, n in counts.items() if n > 1]
    return problems

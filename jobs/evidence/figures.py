"""Figures of the field: which policies each of them compares, as ordinary recipes with overrides.

A point is a recipe with options, trained with several seeds: of the draws and of the training at once. Points of
several figures that are the same steps run once, and what the store has already is not computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from jobs.recipes import FOLDER, plan_named, recipe_path
from pipeline.config.plan import Plan, Step
from pipeline.config.recipe import merged
from pipeline.config.rounds import split_round
from pipeline.registry import Bound
from schemas import WinnowError
from stages.ranking.rankers import ranker as rankers
from stages.work import most_rows

OTHER_PROMPTS = Path(__file__).parent / "other_prompts.yaml"
ANCHOR = ("examples.imitate=chosen", "optimize.nll_weight=1.0")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {  # line -> recipe and options
    "rso": ("rso", ()),
    "rso + nll": ("rso", ANCHOR),
    "sft_sample_rank": ("sft_sample_rank", ()),
    "sft_sample_rank + nll": ("sft_sample_rank", ANCHOR),
    "dpo": ("dpo", ()),
    "raft": ("raft", ()),
    "rest": ("rest", ()),
    "iterated_dpo": ("iterated_dpo", ()),
    "iterated_dpo + nll": ("iterated_dpo", ANCHOR),
    "iterated_rso": ("iterated_rso", ()),
    "iterated_rso + nll": ("iterated_rso", ANCHOR),
}
PAIRED = (("rso + nll", "sft_sample_rank + nll"), ("rso", "sft_sample_rank"))  # compared at equal KL


@dataclass(frozen=True)
class Scale:
    """How much of each figure is drawn. Factors are of the config's own epochs and betas."""

    seeds: int  # along KL, and of methods without rounds
    seeds_of_settings: int  # of n and the betas
    seeds_of_rounds: int  # of what repeats the pipeline, and of other rankers, which cost most
    lines: tuple[str, ...]  # along KL
    gamma_lines: tuple[str, ...]
    compute_lines: tuple[str, ...]
    epochs: tuple[float, ...]
    sizes: tuple[int, ...]
    factors: tuple[float, ...]
    labels: tuple[int, ...]


SCALES = {
    "small": Scale(
        seeds=2, seeds_of_settings=1, seeds_of_rounds=1, lines=("rso + nll", "sft_sample_rank + nll"),
        gamma_lines=("rso + nll",),
        compute_lines=("sft_sample_rank + nll", "rso + nll", "dpo", "raft", "iterated_rso + nll"),
        epochs=(0.5, 1, 2), sizes=(8, 64), factors=(0.2, 1, 5), labels=(500,),
    ),
    "full": Scale(
        seeds=5, seeds_of_settings=3, seeds_of_rounds=2,
        lines=("rso + nll", "sft_sample_rank + nll", "rso", "sft_sample_rank"),
        gamma_lines=("rso + nll", "sft_sample_rank + nll"),
        compute_lines=(
            "sft_sample_rank + nll", "rso + nll", "dpo", "raft", "rest", "iterated_dpo + nll", "iterated_rso + nll",
        ),
        epochs=(0.5, 1, 2, 4), sizes=(8, 16, 32, 64, 128, 256), factors=(0.1, 0.2, 0.5, 1, 2, 5),
        labels=(500, 2000, 8000),
    ),
}  # fmt: skip
SEEDS = ("sample.seed", "optimize.seed")
TWO_DRAWS = ("eval_sample.n=2", "eval_baseline.n=2")  # per held-out prompt: half the time, and more seeds


@dataclass(frozen=True)
class Point:
    """Policy of a figure: its line, its place on the axis in words and as a number, and the recipe that trains it."""

    line: str
    at: str
    x: float | None
    recipe: str
    method: tuple[str, ...] = ()  # options of the line, which --set outranks
    sets: tuple[str, ...] = ()  # of the place on the axis
    overlay: dict[str, Any] = field(default_factory=dict)  # laid over the configs
    seeds: int = 1

    @property
    def run(self) -> str:
        """Return the beginning of its runs' names."""
        return f"evidence {self.line} {self.at}".strip()


@dataclass(frozen=True)
class Basis:
    """Basis of the figures: the command's recipes and configs, and what these say of RSO with an anchor."""

    configs: list[Path]
    sets: list[str]
    scale: Scale
    plan: Plan
    other_prompts: Path | None = None
    overlay: dict[str, Any] = field(default_factory=dict)  # laid over the configs, for all points

    def step(self, name: str) -> Step | None:
        """Return a step of the first round of the basis, None if it has none of this name."""
        return next((step for step in self.plan.steps if split_round(step.name)[0] == name), None)

    def option(self, step: str, *path: str) -> Any:
        """Return an option of a step of the basis, which may be one of a function's."""
        of_basis = self.step(step)
        value: Any = None if of_basis is None else of_basis.options.get(path[0])
        for name in path[1:]:
            value = value.options.get(name) if isinstance(value, Bound) else None
        return value

    @property
    def gold(self) -> Bound | None:
        """Return the gold reward of the evaluation, None if the config names none."""
        value = self.option("evaluate", "gold")
        return value if isinstance(value, Bound) else None

    def point(self, line: str, at: str = "", x: float | None = None, *sets: str, **rest: Any) -> Point:
        recipe, options = METHODS[line]
        return Point(line, at, x, recipe, options, sets, seeds=rest.pop("seeds", self.scale.seeds), **rest)


class NotDrawnError(Exception):
    """A configuration cannot support a figure; the message is the reason."""


def make_basis(configs: list[Path], sets: list[str], scale: Scale, other_prompts: Path | None) -> Basis:
    """Return the basis of the figures. Raise WinnowError with all mistakes, or if there is nothing to evaluate with."""
    if reserved := [text for text in sets if text.partition("=")[0].strip() in (*SEEDS, "evaluations")]:
        raise WinnowError(*(f"--set {text}: the figures set this themselves; omit it" for text in reserved))
    # A figure is of gold and proxy, and other judges would cost as much again for each of its points.
    judges = merged(recipe_path("rso"), tuple(configs), (FOLDER,)).get("judges")
    overlay: dict[str, Any] = {"judges": dict.fromkeys(judges)} if judges else {}
    plan = plan_over(overlay, "rso", configs, ["evaluations=[]", *TWO_DRAWS, *ANCHOR, *sets], "evidence")
    if split_round(plan.target.name)[0] != "evaluate":
        raise WinnowError("evidence: the configs give nothing to evaluate with: "
                          f"{'; '.join(plan.left_out) or 'no step evaluate'}")  # fmt: skip
    return Basis(configs, sets, scale, plan, other_prompts, overlay)


def plan_over(overlay: dict[str, Any], recipe: str, configs: list[Path], sets: list[str], run: str) -> Plan:
    """Return the plan of a recipe with one more config, which is given as its content; as `plan_named` otherwise."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "evidence.yaml"
        file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return plan_named(recipe, [*configs, *([file] if overlay else [])], sets, run)


# The policies of each figure.


def training_points(basis: Basis) -> list[Point]:
    """Return each method trained for half the config's epochs, as many, and more; each is a training of its own."""
    base = int(basis.option("optimize", "epochs"))
    epochs = sorted({max(1, round(factor * base)) for factor in basis.scale.epochs})
    return [basis.point(line, f"epochs={n}", n, f"optimize.epochs={n}") for line in basis.scale.lines for n in epochs]


def size_points(basis: Basis) -> list[Point]:
    """Return RSO from n candidates per prompt, where the rule can keep as many as it is asked for."""
    k = int(basis.option("select", "rule", "k") or 1)
    sizes = [n for n in basis.scale.sizes if n >= k]
    seeds = basis.scale.seeds_of_settings
    return [basis.point("rso + nll", f"n={n}", n, f"sample.n={n}", seeds=seeds) for n in sizes]


def beta_points(basis: Basis) -> list[Point]:
    """Return RSO with other temperatures of rejection sampling."""
    reason = "the config's select.rule has no beta of its own (it may name `ess` or `kl`)"
    return scaled_points(basis, ("rso + nll",), "beta", ("select", "rule", "beta"), reason)


def gamma_points(basis: Basis) -> list[Point]:
    """Return both methods with other factors of the log-ratio in the loss, which the paper calls gamma."""
    option = ("optimize", "objective", "beta")
    return scaled_points(basis, basis.scale.gamma_lines, "gamma", option, "optimize.objective has no beta")


def scaled_points(
    basis: Basis, lines: tuple[str, ...], symbol: str, option: tuple[str, ...], reason: str
) -> list[Point]:
    """Return lines with multiples of the config's value of an option; raise NotDrawnError(reason) without a value."""
    value = basis.option(*option)
    if not value:
        raise NotDrawnError(reason)
    values = [round(value * factor, 6) for factor in basis.scale.factors]
    name, seeds = ".".join(option), basis.scale.seeds_of_settings
    return [basis.point(line, f"{symbol}={v:g}", v, f"{name}={v:g}", seeds=seeds) for line in lines for v in values]


def compute_points(basis: Basis) -> list[Point]:
    """Return each method as its recipe has it; those with rounds have a point for each."""
    lines, drawn_before = basis.scale.compute_lines, basis.scale.lines
    points = [
        basis.point(line, seeds=basis.scale.seeds if line in drawn_before else basis.scale.seeds_of_rounds)
        for line in lines
    ]
    if (annotator := gold_as_ranker(basis)) is not None:
        points[-1] = replace(points[-1], overlay={"annotator": annotator})
    return points


def ranker_points(basis: Basis) -> list[Point]:
    """Return RSO with rankers that were trained on fewer labels, with the config's own, and with gold as the ranker.

    Labels are taken away as a validation split, so that the held-out ones stay as they are.
    """
    trained = basis.step("ranker")
    examples = trained and trained.inputs.get("examples")
    labels = examples and examples.inputs.get("pairs")
    if trained is None or labels is None or trained.stage != "optimize" or labels.stage != "preferences":
        raise NotDrawnError("the config's ranker is not trained here from `preferences`, so there are no labels to "
                            "take away")  # fmt: skip
    seeds = basis.scale.seeds_of_rounds
    rows = most_rows(labels.options.get("path"))
    heldout = float(labels.options["heldout"])
    available = None if rows is None else (1 - heldout) * rows
    points = []
    for number in basis.scale.labels:
        if rows is None or available is None or number >= available:
            continue
        share = round(1 - heldout - number / rows, 4)
        sets = f"{labels.name}.validation={share}"
        points.append(basis.point("rso + nll", f"labels={number}", number, sets, seeds=seeds))
    points.append(basis.point("rso + nll", "", None if available is None else round(available), seeds=seeds))
    if (gold := gold_as_ranker(basis)) is not None:
        overlay = {"annotator": gold, "reward": {"from": {"ranker": "annotator"}},
                   "compare": {"from": {"ranker": "annotator"}}}  # fmt: skip
        points.append(basis.point("rso + nll", "gold as the ranker", None, overlay=overlay, seeds=seeds))
    return points


def other_prompts_points(basis: Basis) -> list[Point]:
    """Return methods that are also evaluated on prompts from another file."""
    if basis.other_prompts is None:
        raise NotDrawnError("no prompts from another distribution: `--other-prompts FILE`, with a column `prompt`")
    overlay = yaml.safe_load(OTHER_PROMPTS.read_text(encoding="utf-8"))
    overlay["other_prompts"]["with"]["path"] = str(basis.other_prompts.absolute())
    lines = ("sft_sample_rank + nll", "rso + nll", "dpo", "raft")
    return [basis.point(line, overlay=overlay, seeds=basis.scale.seeds if "nll" in line else 1) for line in lines]


def gold_as_ranker(basis: Basis) -> dict[str, Any] | None:
    """Return the step of a ranker that is the gold reward itself, None if it is registered as none."""
    if basis.gold is None or basis.gold.name not in rankers.entries:
        return None
    return {"use": basis.gold.name, "with": dict(basis.gold.options)}


@dataclass(frozen=True)
class Figure:
    """Figure of the page: its title, what it shows, the policies that it compares."""

    name: str
    title: str
    about: str
    points: Callable[[Basis], list[Point]]


FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "over-optimisation", "Gold and proxy along KL",
            "Each method trained for more and more epochs; every point is a training of its own with the config's "
            "schedule. Over-optimisation is where proxy goes on and gold turns (arXiv 2210.10760).", training_points,
        ),
        Figure(
            "equal-kl", "Two methods at equal KL",
            "Gold of RSO minus gold of plain sampling where both are as far from the SFT policy, between the points of "
            "the figure before. Above zero, RSO is better.", training_points,
        ),
        Figure(
            "candidates", "Candidates per prompt",
            "RSO with the likelihood of the chosen beside its loss, from n draws per prompt.", size_points,
        ),
        Figure(
            "beta", "Temperature of rejection sampling",
            "select.rule.beta: low keeps the best by the ranker, high keeps draws as they come.", beta_points,
        ),
        Figure(
            "gamma", "Factor of the log-ratio in the loss",
            "optimize.objective.beta, gamma in the RSO paper: low lets the policy move further.", gamma_points,
        ),
        Figure(
            "compute", "Gold against compute",
            "Sampling, ranking and training of each method, without what all share (the SFT policy, the first ranker, "
            "the data) and without evaluation. Tokens and ranker calls are priced at the mean rates of this store, so "
            "that draws which another run had already made are counted in full. Lines join the rounds of a method.",
            compute_points,
        ),
        Figure(
            "ranker", "Rankers of several qualities",
            "RSO with rankers that saw fewer labels, and with gold itself as the ranker; proxy is the win rate by the "
            "ranker that the policy was trained with.", ranker_points,
        ),
        Figure(
            "other-prompts", "Prompts from another distribution",
            "The same policies on held-out prompts and on prompts of another file, each against the SFT policy's "
            "responses to these prompts.", other_prompts_points,
        ),
    )
}  # fmt: skip

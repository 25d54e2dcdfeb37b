"""What `optimize` needs of the steps that it is wired to: a plan whose data never make it is refused."""

from collections.abc import Mapping
from typing import Any

from pipeline import Bound, InputStep
from stages.training.objectives import nll

LIKELIHOOD = Bound(nll.entry, {})  # type: ignore[attr-defined]


def optimize_needs(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """Plan-time check: everything that a loss is a function of is made, and nothing that it would ignore.

    But for a cached reference, which losses without one leave unread: one table of examples may serve both kinds.
    """
    objective, weight = options["objective"], options["nll_weight"]
    tables = dict.fromkeys(("examples", "heldout"), (objective, weight))
    tables |= dict.fromkeys(("demonstrations", "heldout_demonstrations"), (LIKELIHOOD, 0.0))
    problems = [
        f"{name}: {problem}"
        for name, (loss, nll_weight) in tables.items()
        if name in wired and wired[name].stage == "examples"
        for problem in _lacks(wired[name], loss, nll_weight)
    ]
    if options["nll_per"] == "response" and not (weight or objective.metadata["per"] == "likelihood" or options["mix"]):
        problems.append("nll_per: response, and there is no likelihood to average; set nll_weight, or unset it")
    if not options["lora_r"]:
        given = [name for name in ("lora_alpha", "lora_target_modules") if options[name]]
        problems += [f"{name}: {options[name]}, and all weights are trained; set lora_r, or unset it" for name in given]
    ranks, size = options["world_size"], options["batch_size"]
    if ranks > size:
        problems.append(
            f"world_size: {ranks}, and a step has {size} of what is shared; set world_size to {size} at most"
        )
    return problems + _mix(options["mix"], wired) + _reference(options, wired)


def _lacks(examples: InputStep, objective: Bound, nll_weight: float) -> list[str]:
    reads, per, name = objective.metadata["reads"], objective.metadata["per"], objective.name
    made, inputs = examples.options, examples.inputs
    imitates = made.get("imitate", "nothing")
    likelihood = bool(nll_weight) or per == "likelihood"
    labelled = made.get("desirable", "nothing") != "nothing"
    read = imitates == "chosen" or made.get("desirable") == "pairs"
    checks = {
        f"objective {name} reads a reference; wire `reference` in it": ("ref" in reads, "reference" not in inputs),
        f"objective {name} reads pairs; wire `pairs` in it": (per == "pairs", "pairs" not in inputs),
        f"objective {name} reads no pairs; unwire `pairs` in it": (per != "pairs", "pairs" in inputs and not read),
        "nll reads responses with a weight; set its `imitate`": (likelihood, imitates == "nothing"),
        f"objective {name} reads no weights; unset its `imitate`": (not likelihood, imitates != "nothing"),
        f"objective {name} reads unpaired labels; set its `desirable`": ("desirable" in reads, not labelled),
        f"objective {name} reads no unpaired labels; unset its `desirable`": ("desirable" not in reads, labelled),
        f"objective {name} reads mismatched rows; wire `mismatched` in it": ("kl" in reads, "mismatched" not in inputs),
        f"objective {name} reads no mismatched rows; unwire them in it": ("kl" not in reads, "mismatched" in inputs),
        f"objective {name} takes every label as certain; set its `labels: hard`": (
            "label" not in reads,
            made.get("labels", "hard") == "soft",
        ),
        f"objective {name} is the likelihood itself; set nll_weight to 0": (per == "likelihood", bool(nll_weight)),
    }
    return [problem for problem, both in checks.items() if all(both)]


def _mix(mix: Bound | None, wired: Mapping[str, InputStep]) -> list[str]:
    problems = []
    if (mix is None) != ("demonstrations" not in wired):
        problems.append("`mix` and the input `demonstrations` go together: set both or neither")
    for name in ("heldout_demonstrations", "preference_optimum", "imitation_optimum"):
        if name in wired and (mix is None or (name.endswith("optimum") and not mix.metadata["watches"])):
            problems.append(f"{name} is wired, and mix {mix and mix.name} does not read it; unwire it")
    return problems


def _reference(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """The cached log-probs are those of `init` in the training's own arithmetic, or it is said that they are not."""
    reads = "ref" in options["objective"].metadata["reads"]
    if options["reference"] == "other" and not reads:
        return [f"reference: other, and objective {options['objective'].name} reads none; leave it at init"]
    cached = wired["examples"].inputs.get("reference") if "examples" in wired else None
    if not reads or cached is None or cached.stage != "reference":
        return []
    problems = []
    if options["reference"] == "init" and cached.inputs.get("policy") != wired.get("init"):
        problems.append(
            "init: training starts from another step than the one whose log-probs are cached; wire `reference.policy` "
            "and `init` to the same step, or set `reference: other` to keep an older policy as reference"
        )
    if cached.options and cached.options["dtype"] != options["dtype"]:
        problems.append(f"dtype: {options['dtype']}, and the reference is scored in {cached.options['dtype']}")
    return problems

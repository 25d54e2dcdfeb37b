"""Inputs that a loss reads, checked against the steps that a plan has and against the tables that training gets."""

from collections.abc import Mapping
from typing import Any

from pipeline import Bound, InputStep
from stages.model_config import input_problems, planned_output
from stages.training.objectives import nll
from stages.training.trackers import tracker_problems

SCORES_ONLY = "objective {} reads log-probs, and a reward model gives scores; use `sigmoid`, or give a policy"
LIKELIHOOD = Bound(nll.entry, {})  # type: ignore[attr-defined]
# What a loss may read, by the input or the option of `examples` that provides it.
INPUTS = {"reference": "a reference", "pairs": "pairs", "mismatched": "mismatched rows"}
OPTIONS = {"imitate": "responses with a weight", "desirable": "unpaired labels"}


def trains_scores(objective: Bound, nll_weight: float) -> bool:
    """Return whether the loss is a function of scores, which is all that a reward model gives."""
    fields, per = objective.metadata["reads"], objective.metadata["per"]
    return per == "pairs" and not nll_weight and {*fields} <= {"label"}


def data_needs(objective: Bound, nll_weight: float) -> dict[str, bool]:
    """Return by input and option of `examples` whether objective + nll_weight * nll reads what it provides."""
    fields, per = objective.metadata["reads"], objective.metadata["per"]
    return {
        "reference": "ref" in fields,
        "pairs": per == "pairs",
        "imitate": bool(nll_weight) or per == "likelihood",
        "desirable": "desirable" in fields or per == "rows",
        "mismatched": "kl" in fields,
    }


def missing_data(objective: Bound, nll_weight: float, present: dict[str, bool], soft_labels: bool) -> list[str]:
    """Return what the loss reads and the examples, planned or in a table, lack."""
    problems = []
    for name, needed in data_needs(objective, nll_weight).items():
        if needed and not present[name]:
            reader = "nll" if name == "imitate" else f"objective {objective.name}"
            cure = f"add `{name}` to the inputs of `examples`" if name in INPUTS else f"set `{name}` in `examples`"
            problems.append(f"{reader} reads {(INPUTS | OPTIONS)[name]}, and the examples have none; {cure}")
    if soft_labels and "label" not in objective.metadata["reads"]:
        problems.append(f"objective {objective.name} takes every label as certain; set `labels: hard` in `examples`")
    return problems


def check_optimize(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why the data will not have all that a loss is a function of, or more than it reads.

    A cached reference may be more: losses without one leave it unread, so that one table of examples serves both kinds.
    """
    objective, nll_weight, mix = options["objective"], options["nll_weight"], options["mix"]
    problems = [*input_problems(inputs, "init"), *tracker_problems(options["track"])]
    if "init" in inputs and planned_output(inputs["init"]) == "score" and not trains_scores(objective, nll_weight):
        problems.append(f"init: {SCORES_ONLY.format(objective.name)}")
    terms = dict.fromkeys(("examples", "heldout"), (objective, nll_weight))
    terms |= dict.fromkeys(("demonstrations", "heldout_demonstrations"), (LIKELIHOOD, 0.0))
    for name, (loss, weight) in terms.items():
        if name not in inputs or inputs[name].stage != "examples":
            labels = inputs[name].options.get("labels") if name in inputs else None
            if labels == "right" and inputs[name].stage == "ranker_examples" and data_needs(loss, weight)["pairs"]:
                problems.append(
                    f"{name}: objective {loss.name} reads pairs, and `labels: right` has none; set `labels: both` in "
                    "`ranker_examples`"
                )
            continue
        planned = inputs[name].options
        present = {source: source in inputs[name].inputs for source in INPUTS}
        present |= {option: planned.get(option, "nothing") != "nothing" for option in OPTIONS}
        data_problems = missing_data(loss, weight, present, planned.get("labels") == "soft")
        needs = data_needs(loss, weight)
        needs["reference"] = True  # or not: see above
        needs["pairs"] |= planned.get("imitate") in ("chosen", "winner") or planned.get("desirable") == "pairs"
        for surplus in (key for key in needs if present[key] and not needs[key]):
            cure = f"remove `{surplus}` from the inputs" if surplus in INPUTS else f"unset `{surplus}`"
            data_problems.append(f"objective {loss.name} reads no {(INPUTS | OPTIONS)[surplus]}; {cure}")
        if weight and loss.metadata["per"] == "likelihood":
            data_problems.append(f"objective {loss.name} is the likelihood itself; set nll_weight to 0")
        problems += [f"{name}: {problem}" for problem in data_problems]

    # Options that nothing reads.
    if options["nll_per"] == "response" and not (nll_weight or objective.metadata["per"] == "likelihood" or mix):
        problems.append("nll_per: response, and there is no likelihood to average; set nll_weight, or unset it")
    for name in ("lora_alpha", "lora_target_modules", "merge_lora"):
        if options[name] and not options["lora_r"]:
            problems.append(f"{name}: {options[name]}, and all weights are trained; set lora_r, or unset it")
    if options["save_dtype"] != "float32" and options["lora_r"] and not options["merge_lora"]:
        problems.append(
            f"save_dtype: {options['save_dtype']}, and a LoRA is saved as it was trained, beside the weights of `init` "
            "as they are; set merge_lora, or unset it"
        )
    if options["save_rounding"] != "nearest" and options["save_dtype"] == "float32":
        problems.append(
            f"save_rounding: {options['save_rounding']}, and nothing is rounded; set `save_dtype: bfloat16`, or leave "
            "it at nearest"
        )
    if options["world_size"] > options["batch_size"]:
        problems.append(
            f"world_size: {options['world_size']}, and a step has {options['batch_size']} pairs (or labels, or "
            f"responses) to share; set world_size to {options['batch_size']} at most"
        )

    # Inputs of a mix, and the option that its decorator names.
    interval = mix.metadata.get("measure_every") if mix else None
    if mix and interval is not None and not isinstance(mix.options.get(interval), int):
        problems.append(
            f"{mix.entry.location()}: its decorator sets measure_every={interval!r}, which is no option of it that is "
            f"an integer; its options are {', '.join(mix.options) or 'none'}"
        )
    if (mix is None) != ("demonstrations" not in inputs):
        problems.append("`mix` and the input `demonstrations` go together: set both or neither")
    for name in ("heldout_demonstrations", "preference_optimum", "imitation_optimum"):
        if name in inputs and (mix is None or (name.endswith("optimum") and not mix.metadata["uses_losses"])):
            problems.append(f"mix {mix and mix.name} does not read {name}; remove it from `from` (`{name}: null`)")

    # The cached log-probs are those of `init` in the training's own arithmetic, or `reference: other` is set.
    reads_reference = "ref" in objective.metadata["reads"]
    if options["reference"] == "other" and not reads_reference:
        problems.append(f"reference: other, and objective {objective.name} reads none; leave it at init")
    reference = inputs["examples"].inputs.get("reference") if "examples" in inputs else None
    if reads_reference and reference is not None and reference.stage == "reference":
        if options["reference"] == "init" and reference.inputs.get("policy") != inputs.get("init"):
            problems.append(
                "init: training starts from another step than the one whose log-probs are cached; give "
                "`reference.policy` and `init` the same step, or set `reference: other` to keep an older policy as "
                "reference"
            )
        if reference.options and reference.options["dtype"] != options["dtype"]:
            problems.append(
                f"dtype: {options['dtype']}, and the reference is scored in {reference.options['dtype']}; "
                "set both to the same"
            )
    return problems

"""Plan-time check of `optimize` against the steps behind its inputs: a plan whose data are never made is refused."""

from collections.abc import Mapping
from typing import Any

from pipeline import Bound, InputStep
from stages.training.objectives import nll

LIKELIHOOD = Bound(nll.entry, {})  # type: ignore[attr-defined]


def check_optimize(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why the data will not have all that a loss is a function of, or more than it reads.

    A cached reference may be more: losses without one leave it unread, so that one table of examples serves both kinds.
    """
    objective, nll_weight, mix = options["objective"], options["nll_weight"], options["mix"]
    problems = []
    terms = dict.fromkeys(("examples", "heldout"), (objective, nll_weight))
    terms |= dict.fromkeys(("demonstrations", "heldout_demonstrations"), (LIKELIHOOD, 0.0))
    for name, (loss, weight) in terms.items():
        if name in inputs and inputs[name].stage == "examples":
            problems += [f"{name}: {problem}" for problem in _examples_problems(inputs[name], loss, weight)]

    # Options that nothing reads.
    if options["nll_per"] == "response" and not (nll_weight or objective.metadata["per"] == "likelihood" or mix):
        problems.append("nll_per: response, and there is no likelihood to average; set nll_weight, or unset it")
    for name in ("lora_alpha", "lora_target_modules"):
        if options[name] and not options["lora_r"]:
            problems.append(f"{name}: {options[name]}, and all weights are trained; set lora_r, or unset it")
    if options["world_size"] > options["batch_size"]:
        problems.append(
            f"world_size: {options['world_size']}, and a step has {options['batch_size']} pairs (or labels, or "
            f"responses) to share; set world_size to {options['batch_size']} at most"
        )

    # Inputs of a mix.
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


def _examples_problems(examples: InputStep, objective: Bound, nll_weight: float) -> list[str]:
    fields, per, name = objective.metadata["reads"], objective.metadata["per"], objective.name
    options, inputs = examples.options, examples.inputs
    imitates = options.get("imitate", "nothing") != "nothing"
    labelled = options.get("desirable", "nothing") != "nothing"
    pairs_used = per == "pairs" or options.get("imitate") == "chosen" or options.get("desirable") == "pairs"
    likelihood = bool(nll_weight) or per == "likelihood"
    checks = [
        ("ref" in fields and "reference" not in inputs, "reads a reference; add `reference` to its inputs"),
        (per == "pairs" and "pairs" not in inputs, "reads pairs; add `pairs` to its inputs"),
        ("pairs" in inputs and not pairs_used, "reads no pairs; remove `pairs` from its inputs"),
        (imitates and not likelihood, "reads no weights; unset its `imitate`"),
        ("desirable" in fields and not labelled, "reads unpaired labels; set its `desirable`"),
        (labelled and "desirable" not in fields, "reads no unpaired labels; unset its `desirable`"),
        ("kl" in fields and "mismatched" not in inputs, "reads mismatched rows; add `mismatched` to its inputs"),
        (
            "mismatched" in inputs and "kl" not in fields,
            "reads no mismatched rows; remove `mismatched` from its inputs",
        ),
        (
            "label" not in fields and options.get("labels") == "soft",
            "takes every label as certain; set its `labels: hard`",
        ),
        (per == "likelihood" and bool(nll_weight), "is the likelihood itself; set nll_weight to 0"),
    ]
    problems = [f"objective {name} {problem}" for applies, problem in checks if applies]
    if likelihood and not imitates:
        problems.append("nll reads responses with a weight; set its `imitate`")
    return problems

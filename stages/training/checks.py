"""Inputs that a loss reads, checked against the steps that a plan has and against the tables that training gets."""

import warnings
from collections.abc import Mapping
from typing import Any

from pipeline import Bound, InputStep
from schemas import WinnowWarning
from stages.model_config import (
    SCORED_AT_END,
    id_problems,
    input_problems,
    planned_config,
    planned_context,
    planned_output,
)
from stages.options import split_problems
from stages.ranking.rankers import ranker_for, reads_its_model
from stages.sampling.engines.options import name_of
from stages.training.objectives import nll
from stages.training.trackers import tracker_problems

SCORES_ONLY = "objective {} reads log-probs, and a reward model gives scores; use `sigmoid`, or give a policy"
# Learning rates beyond which a plan warns, and usual ones. A step of AdamW moves a weight by about the rate, whatever
# its gradient, and a language model's weights have a standard deviation of some 0.02, of which 0.01 is half. Small
# models are trained from scratch at up to 3e-3; LoRAs, which begin at zero, at about ten times the rate of all weights.
HIGHEST_RATES = {
    "all": (1e-2, "1e-7 to 1e-5 for preferences, up to 3e-3 from scratch"),
    "lora": (1e-1, "1e-6 to 1e-3"),
}
LIKELIHOOD = Bound(nll.entry, {})  # type: ignore[attr-defined]
# What a loss may read, by the input or the option of `examples` that provides it.
INPUTS = {"reference": "a reference", "pairs": "pairs", "mismatched": "mismatched rows"}
OPTIONS = {"imitate": "responses with a weight", "desirable": "unpaired labels"}


# Options of evaluations during training with their defaults, and what else only these read.
EVALUATION = {
    "evaluate_split": "validation", "evaluate_n": 1, "evaluate_temperature": 1.0, "evaluate_max_tokens": None,
    "evaluate_stop": None, "evaluate_stop_token_ids": None, "by": None, "keep": "last",
}  # fmt: skip
EVALUATED = ("prompts", "baseline", "ranker")


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


def _reading_problems(inputs: Mapping[str, InputStep], name: str) -> list[str]:
    """Return why a reward model would be trained on other ids than it scores: a policy's, and it is somebody else's."""
    init, examples = inputs.get("init"), inputs.get(name)
    if init is None or examples is None or examples.stage != "examples" or planned_output(init) != "score":
        return []
    from stages.data.chat_templates import planned_chat_templates  # jinja2, which training itself does without

    prompts = examples.inputs.get("prompts", InputStep(""))
    templates = [planned_chat_templates(step) for step in (init, prompts.inputs.get("tokenizer", InputStep("")))]
    while "init" in init.inputs:
        init = init.inputs["init"]
    config = planned_config(init) if init.stage == "model" else None  # else `reward_head` made it of a policy
    is_foreign = config is not None and not config.content.get(SCORED_AT_END)
    if not is_foreign and (None in templates or templates[0] == templates[1]):
        return []
    return [
        f"{name}: `examples` has the ids of the policy, and the reward model reads responses by its own chat template, "
        "up to what that writes behind them; read the pairs by a step of stage `ranker_examples` whose `tokenizer` is "
        "the reward model"
    ]


def check_optimize(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why the data will not have all that a loss is a function of, or more than it reads.

    A cached reference may be more: losses without one leave it unread, so that one table of examples serves both kinds.
    """
    objective, nll_weight, mix = options["objective"], options["nll_weight"], options["mix"]
    problems = [*input_problems(inputs, "init"), *tracker_problems(options["track"])]
    for name in ("examples", "heldout", "demonstrations", "heldout_demonstrations"):
        problems += _reading_problems(inputs, name) or id_problems(inputs, name, "init")
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

    limit, usual = HIGHEST_RATES["lora" if options["lora_r"] else "all"]
    if (rate := options["learning_rate"] * options["learning_rate_scale"]) > limit:
        what = "of a LoRA" if options["lora_r"] else "of all weights"
        warnings.warn(
            f"learning_rate: {rate:g} is so high that training {what} will most likely destroy the policy; "
            f"usual are {usual}",
            WinnowWarning,
            stacklevel=2,
        )

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

    problems += validation_problems(options, inputs)

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


def validation_choices(inputs: Mapping[str, InputStep]) -> dict[str, Any]:
    """Return options of evaluations that follow from their inputs: the kind of ranker, and what ends a response."""
    choices: dict[str, Any] = {}
    if "ranker" in inputs:
        choices["by"] = ranker_for(inputs).get("by", "pairwise")
    if "baseline" in inputs:
        ends = {name: inputs["baseline"].options.get(name) for name in ("max_tokens", "stop", "stop_token_ids")}
        choices |= {f"evaluate_{name}": value for name, value in ends.items() if value}
    return choices


def validation_problems(options: Mapping[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why evaluations during training cannot be made, or what is set for none."""
    every, by, split = options["evaluate_every"], options["by"], options["evaluate_split"]
    if not every:
        read = [name for name in EVALUATED if name in inputs]
        changed = [name for name, default in EVALUATION.items() if options[name] != default and not read]
        return [
            f"{name}: only evaluations during training read it, and there are none; set `evaluate_every`, or unset it"
            for name in (*read, *changed)
        ]
    lacking = [name for name in ("prompts", "baseline") if name not in inputs]
    if by is None and "ranker" not in inputs:
        lacking.append("ranker")
    problems = [
        f"evaluate_every: {every}, and there is no `{name}`; add it under `from`, as in `{{prompts: prompts, baseline: "
        "validation_baseline, ranker: ranker}`"
        for name in lacking
    ]

    # What cannot be sampled here.
    init, baseline = inputs.get("init"), inputs.get("baseline")
    config = planned_config(init) if init else None
    if init and planned_output(init) == "score":
        problems.append(f"evaluate_every: {every}, and `init` is a reward model, which draws no responses; set it to 0")
    elif config and config.content.get("is_encoder_decoder"):
        problems.append(
            f"evaluate_every: {every}, and {config.architecture} is an encoder-decoder, which no engine here samples "
            "from; set it to 0"
        )
    if "examples" in inputs and inputs["examples"].stage == "ranker_examples":
        problems.append(
            f"evaluate_every: {every}, and the examples train a ranker, whose responses nothing judges; set it to 0"
        )
    if options["world_size"] > 1:
        problems.append(
            f"evaluate_every: {every}, and `world_size: {options['world_size']}`: a network that is divided among "
            "processes is not sampled from while it trains; set world_size to 1, or evaluate_every to 0"
        )

    # The ranker, which is opened beside the network.
    if by is not None:
        problems += reads_its_model(dict(options), inputs)
        if name_of(by.options.get("engine", "")) == "vllm":
            problems.append(
                f"by: {by.name} would start vLLM beside the network that is trained, at every evaluation; serve the "
                "judge, and set `engine: {name: endpoint, url: ..., model: ...}` in `by`"
            )

    # The prompts, and the baseline's responses to them.
    problems += split_problems(options, inputs.get("prompts"), "evaluate_split")
    of_baseline = baseline.options if baseline else {}
    if of_baseline.get("split", split) != split:
        problems.append(
            f"baseline: its responses are to prompts of split {of_baseline['split']}, and `evaluate_split: {split}`; "
            "set both to the same"
        )
    if baseline and "prompts" in baseline.inputs and baseline.inputs["prompts"] != inputs.get("prompts"):
        problems.append("baseline: its responses are to the prompts of another step; give both the same `prompts`")
    if of_baseline.get("ignore_eos"):
        problems.append("baseline: its responses go on after EOS, which draws during training do not; unset ignore_eos")
    if split == "heldout" and options["keep"] == "best":
        warnings.warn(
            "evaluate_split: heldout, and `keep: best`: the prompts that choose the policy are those that the "
            "final evaluation judges it by, whose win rate is then too high; set a share `validation` of `prompts`, "
            "and `evaluate_split: validation`",
            WinnowWarning,
            stacklevel=2,
        )
    length, longest = planned_context(init), options["evaluate_max_tokens"]
    if baseline and longest is None:
        problems.append(
            "evaluate_max_tokens: the step of `baseline` does not say how long a response may be; set it, such as to "
            "max_tokens of `sample`"
        )
    if longest and length and longest >= length:
        problems.append(
            f"evaluate_max_tokens: {longest:,} leaves no room for a prompt in the policy's context of {length:,}; set "
            "it lower"
        )
    return problems

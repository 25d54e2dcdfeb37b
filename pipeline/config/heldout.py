"""Held-out prompts in a file of their own: a step that a config names, and what reads it.

With `heldout_prompts: {with: {path: ./test.jsonl}}`, that step holds out all of its file, with the other options of
`prompts`, of which nothing is held out. All that evaluates reads it: the steps of jobs/recipes/_base.yaml below, those
that are like them, and judges.
"""

from typing import Any

from pipeline.config.layers import Layer, below_configs, merge_all

HELDOUT = "heldout_prompts"
OWN_CANDIDATES = "own_candidates"  # has the prompts to train on where candidates are of another system
READERS = (
    "eval_sample",
    "eval_baseline",
    "eval_sample_as_sampled",
    "eval_baseline_as_sampled",
    "eval_logp",
    "eval_logp_sft",
    "judge",
    "evaluate",
    "targets",
    "demonstration_heldout",
)
TRAINING = "validation_baseline"  # like `eval_baseline`, on prompts of a split of those to train on


def with_heldout_prompts(layers: list[Layer]) -> list[Layer]:
    """Return the layers, with one more below the configs if there is a step `heldout_prompts`."""
    recipe = merge_all(layers)
    if HELDOUT not in recipe:
        return layers
    steps: dict[str, Any] = {
        "prompts": {"with": {"heldout": 0.0}},
        HELDOUT: {"like": "prompts", "with": {"heldout": 1.0, "validation": 0.0}},
    }
    steps |= {OWN_CANDIDATES: {"with": {"heldout": 0.0}}} if OWN_CANDIDATES in recipe else {}
    steps |= {step: {"from": {"prompts": HELDOUT}} for step in READERS if step in recipe}
    steps |= {TRAINING: {"from": {"prompts": "prompts"}}} if TRAINING in recipe else {}
    return below_configs(layers, Layer(HELDOUT, steps, is_config=True, is_own=True))

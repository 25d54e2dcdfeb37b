"""Measure what selection rules keep of cached candidates: stage `select` itself, with one seed after the other."""

import tempfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs.diagnosis.cached import CachedCandidates
from jobs.winnow import alone
from pipeline.registry import Bound
from stages.selection.groups import Floats
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select

MOST_REPETITIONS, FEWEST_REPETITIONS, REPEATED_ROWS = 64, 16, 2**22  # of a rule that draws at random; rows in all
PAIR_REPETITIONS = 8  # of those, whose weights are remembered
UNSCALED = ("best_of", "everything", "plain")  # rules that read the order of the rewards alone, or nothing


@dataclass
class RuleOutcome:
    """Candidates that a rule keeps, over repetitions with other seeds."""

    label: str
    rule: Bound
    shares: Floats  # of each candidate in what is kept of its prompt, [N]; 0 for a prompt of which nothing is
    number: Floats  # kept candidates per prompt, mean of the repetitions, [G]
    repetitions: float  # infinite if all keep the same
    weights: list[Floats]  # of the candidates in single repetitions, [N] each


def compared_rules(
    recipe_rule: Bound, recipe_scale: Bound, extra: list[Bound], k: int, beta: float
) -> list[tuple[Bound, Bound]]:
    """Return the recipe's own rule, the extra ones, and those of the recipes that ship, with its k and beta; each once.

    With the scale on which each reads the rewards.
    """
    raw, temperature = reward_scale.bind("raw"), dict(k=k, beta=beta)
    shipped = [
        (dict(name="rejection_sample", **temperature), recipe_scale),
        (dict(name="gumbel_top_k", **temperature), recipe_scale),
        (dict(name="best_of", k=1), raw),
        (dict(name="best_of", k=k), raw),
        (dict(name="plain", k=k), raw),
        (dict(name="above", threshold=0.7), reward_scale.bind("unit")),
        (dict(name="softmax_weights", beta=1.0), reward_scale.bind("standardized")),
        (dict(name="advantage_weights", beta=1.0), raw),
        (dict(name="chi_square", beta=1.0), raw),
    ]
    rules = [(recipe_rule, recipe_scale), *((rule, recipe_scale) for rule in extra)]
    rules += [(selection_rule.bind(options), scale) for options, scale in shipped]
    return list({label_of(rule, scale): (rule, scale) for rule, scale in rules}.values())


def label_of(rule: Bound, scale: Bound) -> str:
    """Return a rule with k, its options that are no defaults, and its scale: `rejection_sample k=8, beta=0.5`."""
    defaults = {name: info.default for name, info in rule.entry.options.model_fields.items()}
    values = {name: value.name if isinstance(value, Bound) else value for name, value in rule.options.items()}
    words = [f"{name}={value}" for name, value in values.items() if name == "k" or value != defaults.get(name)]
    words += [] if scale.name == "raw" or rule.name in UNSCALED else [f"scale={scale.name}"]
    return f"{rule.name} {', '.join(words)}".strip()


def keep(cached: CachedCandidates, rule: Bound, scale: Bound, rewards: pa.Table | None = None) -> RuleOutcome:
    """Return what a rule keeps of the candidates by their rewards, or by others in a table of the same rows."""
    groups = cached.groups
    most = int(np.clip(REPEATED_ROWS // len(groups.values), FEWEST_REPETITIONS, MOST_REPETITIONS))
    shares, number, repetitions = np.zeros(len(groups.values)), np.zeros(len(groups.sizes)), 0.0
    weights: list[Floats] = []
    table = cached.rewards if rewards is None else rewards
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(most):
            selected = select(table, alone(folder), rule=rule, scale=scale, seed=seed)
            weight = np.zeros(len(groups.values))
            weight[cached.index(selected["candidate_id"])] = selected["weight"].to_numpy()
            total = groups.sum(weight)
            shares += weight / groups.broadcast(np.where(total > 0, total, 1.0))
            number += groups.sum((weight > 0).astype(np.float64))
            repetitions += 1
            if seed < PAIR_REPETITIONS:
                weights.append(weight)
            if seed == 1 and (weights[0] == weights[1]).all():
                return RuleOutcome(label_of(rule, scale), rule, shares / 2, number / 2, np.inf, weights[:1])
    return RuleOutcome(label_of(rule, scale), rule, shares / repetitions, number / repetitions, repetitions, weights)

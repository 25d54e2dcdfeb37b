"""How preferences and demonstrations share the steps. A mix returns one number: the weight of the preference term.

The loss of a step is weight * preference + (1 - weight) * imitation; a term of weight 0 is neither drawn nor
forwarded. ALRIGHT and MAXRIGHT (arXiv:2410.15483) give 0 or 1. To add a mix, add a function here and declare

* `uses_losses`: whether it reads the excess losses of `MixState`. The loop then measures both before the first step.
* `measure_every`: the name of the option that says after how many steps the loss of a term that a step did not take is
  measured again. Without it that loss stays as it was when the term was last taken.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired

import numpy as np

from pipeline import ADDED, Range, Registry
from stages.options import Count

mix = Registry("mix", "state", uses_losses=bool, measure_every=NotRequired[str])
COIN = 2  # beside the terms' 0 and 1, so that coins and batches are drawn from different streams
UnitInterval = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class MixState:
    """Progress of training. An excess loss is a term's last measured loss minus its optimum, which it reaches alone."""

    step: int
    steps: int
    seed: int
    preference_excess: float = 0.0
    imitation_excess: float = 0.0


@mix(uses_losses=False)
def joint(state: MixState, *, weight: UnitInterval = 0.5) -> float:
    """Return `weight` in every step, the plain mixture of both losses; 0 and 1 train one objective alone."""
    return weight


@mix(uses_losses=False)
def sequence(
    state: MixState,
    *,
    weight: UnitInterval = 0.5,
    first: Annotated[Literal["imitation", "preference"], ADDED] = "imitation",
) -> float:
    """Return 0 (imitation), and 1 (preference) for the last `weight` of the steps; `first: preference` is the reverse.

    Then preference has the first `weight` of the steps.
    """
    if first == "preference":
        return float(state.step < round(weight * state.steps))
    return float(state.step >= round((1 - weight) * state.steps))


@mix(uses_losses=False)
def alright(state: MixState, *, weight: UnitInterval = 0.5) -> float:
    """Toss a coin per step, from (seed, step) alone, so that every rank and every resumed run toss the same."""
    return float(np.random.default_rng([state.seed, state.step, COIN]).random() < weight)


@mix(uses_losses=True, measure_every="refresh")
def maxright(state: MixState, *, weight: UnitInterval = 0.5, refresh: Count = 20) -> float:
    """Take the objective with the larger weighted excess loss; imitation on a tie.

    A loss is that of the last step that took the term; every `refresh` steps the one not taken is measured again,
    without gradient, on the batch that it would take next. The authors' code has refresh 10, which here made a step
    10 % more expensive; at 20 it costs less than 5 %.
    """
    return float(weight * state.preference_excess > (1 - weight) * state.imitation_excess)

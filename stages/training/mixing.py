"""Preferences or demonstrations, this step? A mix is one number: the weight of the preference objective.

The loss of a step is weight * preference + (1 - weight) * imitation; an objective of weight 0 is neither
drawn nor forwarded. ALRIGHT and MAXRIGHT (arXiv:2410.15483) give 0 or 1. To add a mix, add a function here.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from pipeline import Range, Registry

mix = Registry("mix", "watches")
COIN = 2  # beside the legs' 0 and 1, so that coins and batches are drawn apart
Share = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class MixState:
    """Where training stands. The gaps are the last known losses minus what each objective alone would reach."""

    step: int
    steps: int
    seed: int
    preference_gap: float = 0.0
    imitation_gap: float = 0.0


@mix(watches=False)
def joint(now: MixState, *, weight: Share = 0.5) -> float:
    """The plain mixture of both losses in every step; 0 and 1 train one objective alone."""
    return weight


@mix(watches=False)
def sequence(now: MixState, *, weight: Share = 0.5) -> float:
    """First imitation, then preference for the last `weight` of the steps."""
    return float(now.step >= round((1 - weight) * now.steps))


@mix(watches=False)
def alright(now: MixState, *, weight: Share = 0.5) -> float:
    """A coin a step, from (seed, step) alone, so that every rank and every resumed run toss the same."""
    return float(np.random.default_rng([now.seed, now.step, COIN]).random() < weight)


@mix(watches=True)
def maxright(now: MixState, *, weight: Share = 0.5, refresh: Annotated[int, Range(gt=0)] = 20) -> float:
    """The objective with the larger weighted gap; imitation on a tie.

    A loss is known from the last step that took it; every `refresh` steps the one not taken is measured
    again, without gradient, on the batch that it would take next. The authors' code has refresh 10, which here made
    a step 10 % dearer; at 20 it costs less than 5 %.
    """
    return float(weight * now.preference_gap > (1 - weight) * now.imitation_gap)

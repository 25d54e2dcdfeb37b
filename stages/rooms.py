"""Every room, in the order in which a prompt walks through them: importing this registers all stages."""

from stages import (
    compare,
    evaluate,
    examples,
    judge,
    models,
    optimize,
    own_candidates,
    pair,
    preferences,
    prompts,
    ranker_examples,
    reference,
    reward,
    sample,
    select,
)

__all__ = [
    "compare",
    "evaluate",
    "examples",
    "judge",
    "models",
    "optimize",
    "own_candidates",
    "pair",
    "preferences",
    "prompts",
    "ranker_examples",
    "reference",
    "reward",
    "sample",
    "select",
]

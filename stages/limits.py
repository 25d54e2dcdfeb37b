"""Limits of a model, read from its config alone, before any weight is loaded."""

from collections.abc import Sequence
from pathlib import Path

from schemas import Model, WinnowError
from stages.model_config import ModelConfig

# Tokens in a forward pass of scoring, which keeps no activations; training has its own option.
SCORING_TOKENS_PER_PASS = 16_384
# Logits that the head computes at once, by the type of the device: on a CPU 8 MiB in fp32, which its cache can hold
# some of; on a GPU 2 GiB, thousands of rows, so that the head is read seldom.
LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 29}
KEPT_FRACTION = 1 / 16  # of a card's memory, for what the head's forward pass keeps for its backward pass


def context_length(folder: Path) -> int:
    """Return the length of the longest sequence that the model in this folder reads, in tokens."""
    return ModelConfig(folder).context_length or 1 << 30


def check_ids(model: Model, what: str, ids: Sequence[Sequence[int]]) -> None:
    """Raise WinnowError if `ids` (of the rows named by `what`) contain one that the model has no embedding for."""
    vocabulary = ModelConfig(model.folder).vocabulary or 1 << 30
    highest = max((max(row) for row in ids if len(row)), default=0)
    if highest >= vocabulary:
        raise WinnowError(
            f"{what} hold token id {highest}, but model {model.digest[:12]} has only ids below {vocabulary}: they come "
            "from another tokenizer; set `tokenizer` and the policy to the same model under `from`"
        )

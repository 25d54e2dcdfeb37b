"""What a model takes, read from its config alone, before any weight is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

from schemas import Model, WinnowError

BUDGET = 16_384  # tokens a forward pass of scoring


def context_length(folder: Path) -> int:
    """Longest sequence that the model in this folder takes, in tokens."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def check_ids(model: Model, what: str, ids: Sequence[Sequence[int]]) -> None:
    """Refuse ids that the model has no embedding for, before any weight is loaded."""
    config = json.loads((model.folder / "config.json").read_text())
    vocabulary = config.get("vocab_size", 1 << 30)
    highest = max((max(row) for row in ids if len(row)), default=0)
    if highest >= vocabulary:
        raise WinnowError(
            f"{what} hold token id {highest}, and model {model.digest[:12]} knows ids below {vocabulary}: "
            "they were made with another tokenizer; wire `tokenizer` and the policy to the same model"
        )

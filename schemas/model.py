"""Model on disk, as a stage takes and returns it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """Hugging Face model folder (config, tokenizer, safetensors) with the digest of its content.

    Only the digest enters a key: the folder may be another on every machine.
    """

    folder: Path
    digest: str

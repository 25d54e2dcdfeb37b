"""A model on disk, as a stage sees it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder (config, tokenizer, safetensors) and the digest of its content.

    The folder is where it lies today and is never part of an identity; the digest is what it is.
    """

    folder: Path
    digest: str

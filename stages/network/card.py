"""Model cards: the README.md of a model's folder, whose front matter the hub reads. It is in no digest.

What follows a model through the pipeline is in the front matter: the base model, its licence and languages.
"""

from pathlib import Path
from typing import Any

import yaml

from pipeline.store.fingerprints import CARD, HubPath

LICENCE = ("license", "license_name", "license_link", "language")  # as the hub spells them
CARRIED = (*LICENCE, "base_model", "winnow")


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's card; empty without one, and for one that is no YAML mapping."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def write_card(folder: Path, text: str, metadata: dict[str, Any]) -> None:
    """Write a folder's card: the text below the front matter, in place of any other card."""
    from huggingface_hub import metadata_save

    (folder / CARD).write_text(text, encoding="utf-8")
    metadata_save(folder / CARD, metadata)


def write_copy_card(folder: Path, path: HubPath, adapter: HubPath | None) -> None:
    """Write the card of a copied model: where it comes from, and the licence and languages that its own card states.

    Of a model by name, that is the base model of what will be trained from it.
    """
    origin = read_metadata(path.path)
    metadata = {name: origin[name] for name in LICENCE if name in origin}
    if path.hub_name:
        metadata["base_model"] = path.hub_name
    metadata["winnow"] = {"base": path.source, **({"adapter": adapter.source} if adapter else {})}
    merged = f", with the adapter {adapter.source} merged into it" if adapter else ""
    write_card(folder, f"\n# {path.source}\n\nA copy by Winnow of {path.source}{merged}.\n", metadata)


def carried(folder: Path) -> dict[str, Any]:
    """Return the part of a model's front matter that belongs to what is trained from it too."""
    metadata = read_metadata(folder)
    return {name: metadata[name] for name in CARRIED if name in metadata}

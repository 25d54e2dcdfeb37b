"""Card of a trained model: base, method, data, options and the figures known when its training ends."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas import Model
from stages.model_config import ModelConfig
from stages.network.card import carried, write_card
from stages.training.config import SPEED


def write_trained_card(
    folder: Path,
    init: Model,
    method: str,
    options: Mapping[str, Any],
    examples: pa.Table,
    outcome: Mapping[str, Any],
) -> None:
    """Write the card of a policy or reward model.

    options: those that are not the defaults of `optimize`; outcome: what the trainer returns. The same training gives
    the same bytes: neither speeds nor dates are in it.
    """
    is_policy = ModelConfig(folder).output == "vocabulary"
    metadata = carried(init.folder)
    base = metadata.get("winnow", {}).get("base", "random weights")
    metadata["library_name"] = "transformers"
    metadata["pipeline_tag"] = "text-generation" if is_policy else "text-classification"
    metadata["tags"] = ["winnow", method.partition("(")[0].partition(" ")[0]]

    responses, pairs = (pc.sum(pc.list_value_length(examples[name])).as_py() or 0 for name in ("responses", "pairs"))
    facts = {
        "base": base,
        "trained from": f"weights {init.digest[:16]}",
        "method": f"`{method}`",
        "data": f"{examples.num_rows:,} prompts, {responses:,} responses, {pairs:,} pairs",
        "steps": f"{outcome['steps']:,} ({outcome['tokens']:,} tokens)",
        "parameters": f"{outcome['parameters']:,}",
    }
    figures: dict[str, tuple[float, float]] = {}
    for entry in outcome["history"]:
        for name, value in entry.items():
            if name != "step" and not name.startswith(SPEED):
                figures[name] = (figures.get(name, (value, value))[0], value)
    kind = "Policy" if is_policy else "Reward model"
    changes = [(name, f"`{value}`") for name, value in options.items()]
    measured = [(name, f"{first:.4g}", f"{last:.4g}") for name, (first, last) in figures.items()]
    lines = ["", f"# {kind} trained by Winnow", "", *markdown_table(("", ""), facts.items()), ""]
    lines += ["## Options of the training", "", "Those that are not defaults.", ""]
    lines += [*markdown_table(("option", "value"), changes), "", "## Figures of the training", ""]
    lines += ["Of the first and the last step that have them; the last of `heldout/` are of what was saved.", ""]
    lines += markdown_table(("metric", "first", "last"), measured)
    text = "\n".join(lines)
    write_card(folder, text + "\n", metadata)


def markdown_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table in Markdown; a bar in a cell is written as a character of its own."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(cell).replace("|", "&#124;") for cell in row) for row in rows]
    return [f"| {line} |" for line in lines]

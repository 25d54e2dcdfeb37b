"""Command that writes data for other trainers: export."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.app import STORE, StorePath, console, existing_store
from jobs.export import Split, export_pairs
from jobs.export_formats import FORMATS, FormatName


def export(
    run: Annotated[str, typer.Option("--run", help="the run whose pairs are written")],
    format: Annotated[FormatName, typer.Option(help="TRL's, OpenAI's, or rows with every column")],
    out: Annotated[Path, typer.Option(help="the file: .jsonl, and .parquet for trl")],
    store: StorePath = STORE,
    split: Annotated[Split, typer.Option(help="what the policy is trained on, or measured on")] = "train",
    round: Annotated[int | None, typer.Option(help="of a run with rounds; the last by default")] = None,
) -> None:
    """Write the pairs of a run, with their reference log-probs, for other trainers."""
    result, form = export_pairs(existing_store(store), run, format, out, split, round), FORMATS[format]
    lines = [f"wrote {result.out}: {result.rows:,} pairs of run {run}, step {result.source.step}"]
    lines += [f"rejected: {n:,} {reason} ({result.rejects_file.name})" for reason, n in result.rejects.most_common()]
    if form.references and result.source.cached:
        lines.append(f"reference log-probs are those of {result.source.policy.folder}")
    elif form.references:
        lines.append("no reference log-probs: the recipe caches none, so ref_chosen_logps and ref_rejected_logps "
                     "are absent")  # fmt: skip
    if result.weighted and not form.weights:
        lines.append(f"{result.weighted:,} pairs have a weight or a label other than 1, which this format cannot hold")
    lines.append(f"the longest pair has {result.longest:,} tokens, prompt included")
    console.print("\n  ".join(lines), highlight=False, markup=False)

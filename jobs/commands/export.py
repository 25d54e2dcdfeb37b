"""Commands that carry out: export."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.app import STORE, StorePath, app, console, used
from jobs.export import Exported, Split
from jobs.export import export as write
from jobs.export_formats import FORMATS, Format, Name


@app.command()
def export(
    run: Annotated[str, typer.Option("--run", help="whose pairs")],
    format: Annotated[Name, typer.Option(help="TRL's, OpenAI's, or rows with everything that is known")],
    out: Annotated[Path, typer.Option(help="the file: .jsonl, and .parquet for trl")],
    store: StorePath = STORE,
    split: Annotated[Split, typer.Option(help="what the policy is trained on, or measured on")] = "train",
    round: Annotated[int | None, typer.Option(help="of a run with rounds; the last by default")] = None,
) -> None:
    """Write the pairs of a run, with their reference log-probs, for other trainers."""
    made = write(used(store), run, format, out, split, round)
    console.print("\n  ".join(_told(made, run, FORMATS[format])), highlight=False, markup=False)


def _told(made: Exported, run: str, form: Format) -> Iterator[str]:
    """What is in the file, what is not, and what its reader has to know."""
    yield f"wrote {made.out}: {made.rows:,} pairs of run {run}, step {made.source.step}"
    for reason, count in made.left.most_common():
        yield f"left out: {count:,} {reason} ({made.rejects.name})"
    if form.references and made.source.cached:
        yield f"reference log-probs are those of {made.source.policy.folder}"
    elif form.references:
        yield "no reference log-probs: the recipe caches none, so ref_chosen_logps and ref_rejected_logps are absent"
    if made.weighted and not form.weighs:
        yield f"{made.weighted:,} pairs have a weight or a label other than 1, for which this format has no place"
    yield f"the longest pair has {made.longest:,} tokens, prompt included"

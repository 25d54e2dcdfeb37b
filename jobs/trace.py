"""Trace of one prompt through a run: its rows of every table, in the order of the stages."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jobs.console import as_table
from pipeline.sql.catalog import open_catalog, query
from pipeline.sql.views import sql_literal
from pipeline.store.store import Store
from schemas import WinnowError

# Title and query of each section, in the order of the stages; sections without rows are not printed.
TRACE = (Path(__file__).parent / "trace.sql").read_text(encoding="utf-8")


def trace_prompt(store: Store, run: str, prefix: str, console: Console, round: int | None = None) -> None:
    """Print the prompt whose id begins with `prefix`; without a prefix, the first prompt that reached the last stage.

    In one round, by default the last, where the run has rounds. Raises WinnowError if no prompt of the run, or more
    than one, has an id that begins with `prefix`.
    """
    if not all(letter in "0123456789abcdef" for letter in prefix):
        raise WinnowError(f"prompt id {prefix!r}: ids are hexadecimal digits")
    all_rounds = open_catalog(store, run)
    if not round:  # the last round with a finished step
        (row,) = query(all_rounds, "SELECT max(round) AS last FROM runs JOIN steps USING (stage, key)").to_pylist()
        round = row["last"]
    catalog = all_rounds.for_run(run, round)

    prompts = query(
        catalog,
        f"SELECT DISTINCT prompt_id, text, split, len(token_ids) AS tokens, "
        f"prompt_id IN (SELECT prompt_id FROM rewards) AS scored, prompt_id IN (SELECT prompt_id FROM pairs) AS paired "
        f"FROM prompts WHERE starts_with(prompt_id, '{prefix}') AND prompt_id IN (SELECT prompt_id FROM candidates) "
        f"ORDER BY scored DESC, paired DESC, prompt_id",
    ).to_pylist()
    if not prompts:
        raise WinnowError(f"run {run}: no prompt id begins with {prefix!r}; omit it to see the first prompt")
    if prefix and len(prompts) > 1:
        raise WinnowError(f"run {run}: {len(prompts)} prompt ids begin with {prefix!r}; add digits")

    prompt = prompts[0]
    about = f"{prompt['split']}, {prompt['tokens']} tokens" + (f", round {round}" if round else "")
    console.print(f"[bold]{escape(prompt['prompt_id'])}[/] ({escape(about)})", highlight=False)
    console.print(prompt["text"], markup=False, highlight=False)
    for section in TRACE.split("-- ")[1:]:
        title, _, sql = section.partition("\n")
        rows = query(catalog, sql.format(prompt_id=sql_literal(prompt["prompt_id"])))
        if rows.num_rows:
            console.print(as_table(rows, title))

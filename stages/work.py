"""Rows that the stages make and tokens that they go through, as bounds from options and from the steps before them.

For a plan (`Cost.work` of pipeline/costs.py): what is finished, and what a store has of earlier runs, outranks them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import DataPath, InputStep
from pipeline.costs import UNKNOWN, Amount, Work
from stages.model_config import planned_context

Options = Mapping[str, Any]
Inputs = Mapping[str, InputStep]
Works = Mapping[str, Work]
LINES = (".jsonl", ".csv", ".tsv")  # of which each row takes a line or more
WITH_HEADER = (".csv", ".tsv")
CALLS = "calls"


def prompts_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most a prompt per row of the file, held out by hash: of each split, about its share."""
    rows, shares = most_rows(options.get("path")), {name: float(options[name]) for name in ("heldout", "validation")}
    shares["train"] = 1 - sum(shares.values())
    splits = {name: Amount(rows and rows * share, "estimated") for name, share in shares.items()}
    return Work({"prompts": Amount(rows, "at most")}, splits=splits)


def preferences_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most a prompt, a pair and two candidates per row of the file."""
    prompts = prompts_work(options, inputs, work)
    pairs = prompts.of("prompts")
    return Work({"prompts": pairs, "pairs": pairs, "candidates": pairs.times(2)}, splits=prompts.splits)


def sampling_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return n draws per prompt of the split, of max_tokens at most."""
    prompts = work["prompts"].splits.get(options["split"], UNKNOWN) if "prompts" in work else UNKNOWN
    rows = prompts.times(Amount(options["n"], "at most"))
    tokens = Amount(options["max_tokens"], "at most")
    return Work({"candidates": rows}, rows.times(tokens))


def ranking_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most a read of each candidate, or of it beside another in one order or both."""
    rows = _candidates(work).times(Amount(1, "at most"))
    return Work({"rewards": rows}, rows.times(_reads_per_pair(options)), CALLS)


def judging_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most a read in each order per candidate and draw of the baseline to its prompt."""
    rows = _judgements(options, inputs, work)
    return Work({"judgements": rows}, rows.times(_reads_per_pair(options)), CALLS)


def voting_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most so many votes per candidate and draw of the baseline to its prompt."""
    rows = _judgements(options, inputs, work)
    votes = rows.times(Amount(options["votes"], "at most"))
    return Work({"judgements": rows, "votes": votes}, rows, CALLS)


def calls(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return that work is counted in calls of the ranker, of which nothing is known before."""
    return Work(unit=CALLS)


def scoring_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most the candidates, or those that are selected, each with its prompt once."""
    rows = work["selections"].of("selections") if "selections" in work else _candidates(work)
    if "mismatched" in work:
        rows = rows.plus(work["mismatched"].of("candidates"))
    rows = rows.times(Amount(1, "at most"))
    return Work({"reference": rows, "features": rows}, _tokens(rows, inputs, work))


def examples_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return at most the tokens of all responses that have a reference, or else of all, and of all prompts.

    Without candidates, the responses are the demonstrations that come with prompts.
    """
    if "candidates" not in work:
        prompts = work["prompts"].of("prompts") if "prompts" in work else UNKNOWN
        return Work(units=prompts.times(Amount(_limit(inputs.get("prompts")), "at most")).times(2))
    rows = work["reference"].of("reference") if "reference" in work else _candidates(work)
    return Work(units=_tokens(rows.times(Amount(1, "at most")), inputs, work))


def training_work(options: Options, inputs: Inputs, work: Works) -> Work:
    """Return the tokens of the examples, as often as they are gone through."""
    examples = work["examples"].units if "examples" in work else UNKNOWN
    return Work(units=examples.times(int(options["epochs"])))


def most_rows(source: DataPath | None) -> int | None:
    """Return as many rows as a file can have, None if that takes more than a look: of a folder, an archive, a hub."""
    path = Path(source.path) if isinstance(source, DataPath) else None
    if path is None or not path.is_file():
        return None
    if path.suffix == ".parquet":
        try:
            return int(pq.read_metadata(path).num_rows)
        except (OSError, pa.ArrowInvalid):  # which the stage's own check reports
            return None
    if path.suffix not in LINES:
        return None
    with path.open("rb") as file:
        lines, last = 0, b"\n"
        for block in iter(lambda: file.read(1 << 20), b""):
            lines, last = lines + block.count(b"\n"), block[-1:]
    lines += last != b"\n"  # the last line may have no end
    return max(0, lines - (path.suffix in WITH_HEADER))


def _reads_per_pair(options: Options) -> int:
    """Return how often a ranker reads a pair at most: once if it scores each response alone, whatever the orders."""
    by = options["by"]
    is_scored = by.metadata.get("program") or by.metadata.get("output") == "score"
    return 1 if is_scored or options.get("orders") == "one" else 2


def _judgements(options: Options, inputs: Inputs, work: Works) -> Amount:
    baseline = inputs.get("baseline")
    many = options["matches"] != "same_k" and baseline is not None
    return _candidates(work).times(Amount(baseline.options.get("n", 1) if baseline and many else 1, "at most"))


def _candidates(work: Works) -> Amount:
    return work["candidates"].of("candidates") if "candidates" in work else UNKNOWN


def _tokens(rows: Amount, inputs: Inputs, work: Works) -> Amount:
    """Return at most the tokens of so many responses, by the limit of the step that drew or read them, and prompts."""
    limits = [_limit(inputs.get(name)) for name in ("candidates", "prompts")]
    prompts = work["prompts"].of("prompts") if "prompts" in work else UNKNOWN
    responses, prompt_tokens = (Amount(limit, "at most") for limit in limits)
    return rows.times(responses).plus(prompts.times(prompt_tokens))


def _limit(step: InputStep | None) -> int | None:
    """Return the most tokens of a prompt, or of a response, that a step makes: its limit, or its model's context."""
    if step is None or "max_tokens" not in step.options:
        return None
    context = planned_context(step.inputs.get("tokenizer") or step.inputs.get("policy"))
    return min(int(step.options["max_tokens"]), context or 1 << 30)

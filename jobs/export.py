"""Pairs of a run as files that others train from: TRL's, as ids or as text, OpenAI's, and rows with every column.

How a pair becomes a row of a format is in export_formats.py. DuckDB sorts the pairs, on disk if need be, and they are
read in batches, so their number is not limited by memory.
"""

import filecmp
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.console import as_json
from jobs.export_formats import (
    FORMATS,
    IDS,
    REFS,
    SEVERAL_TURNS,
    SIDES,
    FormatName,
    PairFormat,
    Reject,
    Row,
    without_turns,
)
from pipeline.config.rounds import run_and_round, split_round
from pipeline.sql.catalog import Catalog, open_catalog
from pipeline.store.store import Json, Store, columns_with_statistics
from schemas import COMMAND, Model, WinnowError

if TYPE_CHECKING:
    from stages.data.tokenizer import Tokenizer

Split = Literal["train", "heldout"]
BATCH = 4096  # pairs whose texts are in memory at once
# The last ids of the responses, the most frequent first.
ENDS = """
SELECT response.token_ids[-1] AS id FROM (SELECT unnest(responses) AS response FROM examples WHERE key = '{examples}')
GROUP BY id ORDER BY count(*) DESC, id
"""
PAIRS = (Path(__file__).parent / "export.sql").read_text(encoding="utf-8")


@dataclass(frozen=True)
class PairSource:
    """Keys of a run's tables, and the model whose tokens and reference log-probs they hold."""

    step: str
    keys: dict[str, str]
    policy: Model
    cached: bool  # whether reference log-probs are


@dataclass
class ExportResult:
    """Counts of pairs: written, rejects by reason, with a weight or label other than 1, tokens of the longest.

    `end` is the token that texts end with, to be the EOS token of the tokenizer that reads them; None if it is already.
    """

    out: Path
    source: PairSource
    form: PairFormat
    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    weighted: int = 0
    end: str | None = None

    @property
    def complete(self) -> FormatName:
        """Return the format that holds all pairs which this one rejects: of several turns, one with masks."""
        (masks,) = (name for name, form in FORMATS.items() if form.masks)
        return masks if SEVERAL_TURNS in self.rejects else self.form.complete or masks

    @property
    def rejects_file(self) -> Path:
        return self.out.with_name(self.out.name + ".rejects.jsonl")


def export_pairs(
    store: Store, run: str, name: FormatName, out: Path, split: Split = "train", round: int | None = None
) -> ExportResult:
    """Write the pairs that a run's policy was trained on in format `name`, ordered by their ids; all or none.

    Rejected pairs are written beside the file, in FILE.rejects.jsonl. The same run gives the same bytes. Raise
    WinnowError for an unknown run or round, a suffix that the format does not have, a run without pairs, if all are
    rejected, and if the file exists with other content.
    """
    from stages.data.tokenizer import Tokenizer

    form = FORMATS[name]
    if out.suffix not in form.suffixes:
        raise WinnowError(f"--out {out}: {name} is written as {' or '.join(form.suffixes)}; name such a file")
    run, round = run_and_round(run, store.runs(), round)
    catalog = open_catalog(store, run)
    source = find_pairs(store, catalog, run, split, round)
    result = ExportResult(out, source, form)
    tokenizer = Tokenizer(source.policy)
    if name == "trl":
        result.end = _end_as_eos(tokenizer, catalog.sql(ENDS.format(**source.keys)).arrow()["id"].to_pylist())
    columns = dict(form.columns) | {column: pa.float32() for column in REFS if source.cached}
    # Batches of equal size give the same row groups, and so the same bytes; those of DuckDB differ from call to call.
    batches = catalog.sql(PAIRS.format(**{"rewards": ""} | source.keys)).batches()
    slices = (batch.slice(start, BATCH) for batch in batches for start in range(0, batch.num_rows, BATCH))
    pairs = (row for rows in slices for row in rows.to_pylist())
    rejects_file = _writer(result.rejects_file, overwrites=True)  # outside: nothing is written where `out` stays
    with rejects_file as write_rejects, _writer(out, pa.schema(columns)) as write_rows:
        while rows := list(islice(pairs, BATCH)):
            converted = [
                (row, (None if form.masks else without_turns(row)) or item)
                for row, item in zip(rows, form.convert(rows, tokenizer), strict=True)
            ]
            accepted = [(row, item) for row, item in converted if not isinstance(item, Reject)]
            rejects = [(row, item) for row, item in converted if isinstance(item, Reject)]
            write_rows([item for _, item in accepted])
            write_rejects([{name: row[name] for name in IDS} | item._asdict() for row, item in rejects])
            result.rows += len(accepted)
            result.rejects.update(item.reason for _, item in rejects)
            result.weighted += sum(row["weight"] != 1 or row["label"] != 1 for row, _ in accepted)
            for row, _ in accepted:
                length = len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in SIDES)
                result.longest = max(result.longest, length)
        if not result.rows and not result.rejects:
            raise WinnowError(f"run {run}: no pairs in its examples; `{COMMAND} trace {run}` shows why for a prompt")
        if not result.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in result.rejects.most_common())
            raise WinnowError(
                f"run {run}: {name} would reject all of its pairs ({reasons}); --format {result.complete} loses none"
            )
    if not result.rejects:
        result.rejects_file.unlink()
    return result


def find_pairs(store: Store, catalog: Catalog, run: str, split: Split, round: int | None) -> PairSource:
    """Return the examples of the run's policy in one round, by default the last that has any.

    Raise WinnowError if there are none, or if they hold no pairs.
    """
    links, finished = catalog.runs[run], {manifest["key"]: manifest for manifest in catalog.manifests}
    numbers = sorted({number for _, number in map(split_round, links) if number}, reverse=True)
    if round is not None and round not in numbers:
        available = f"its rounds are 1 to {numbers[0]}" if numbers else "it has no rounds; omit --round"
        raise WinnowError(f"run {run}: no round {round}; {available}")
    rounds: list[int | None] = [round] if round is not None else [*numbers] or [None]
    for number in rounds:
        # What the policy of this round reads; before it is trained, the step `examples`.
        keys = {name: link["key"] for name, link in links.items() if split_round(name)[1] in (None, number)}
        keys = {split_round(name)[0]: key for name, key in keys.items()}
        if policy := finished.get(keys.get("optimize", "")):
            key = policy["identity"]["inputs"].get("examples" if split == "train" else "heldout")
        else:
            key = keys.get("examples") if split == "train" else None
        if key in finished:
            break
    else:
        if split == "heldout":
            problem = (
                "its policy has no held-out examples; add `heldout` under `from` of optimize, or export --split train"
            )
        elif {"optimize", "examples"} & {split_round(name)[0] for name in links}:
            problem = "its examples are not finished yet; the same winnow run continues with them"
        else:
            problem = "no pairs, because it trains no policy on examples; export a run of a recipe that does, like rso"
        raise WinnowError(f"run {run}: {problem}")

    step = next(name for name, link in links.items() if link["key"] == key)
    inputs = finished[key]["identity"]["inputs"]
    if "pairs" not in inputs:
        raise WinnowError(
            f"run {run}: no pairs, because {step} has none to train on (it imitates, or has unpaired labels); export a "
            "run of a recipe with pairs, like rso or dpo"
        )
    keys = {"examples": key, "prompts": inputs["prompts"], "pairs": inputs["pairs"]}
    if rewards := _nearest_source(finished, inputs["pairs"], lambda manifest: manifest["rows"].get("rewards")):
        keys["rewards"] = rewards
    # The model whose log-probs are cached; without a reference the nearest one, which has the same tokenizer.
    if reference := inputs.get("reference"):
        model = finished[reference]["identity"]["inputs"]["policy"]
    else:
        model = _nearest_source(finished, key, lambda manifest: manifest["model"])
    assert model is not None  # prompts are tokenised, with the tokenizer of a model
    return PairSource(step, keys, store.at(finished[model]["stage"], model).model(), reference is not None)


def _nearest_source(finished: dict[str, Json], key: str, matches: Callable[[Json], Any]) -> str | None:
    """Return the key of the nearest matching step behind this one; the search does not go past a model."""
    queue = [key]
    for candidate in queue:
        manifest = finished.get(candidate)
        if manifest and matches(manifest):
            return candidate
        if manifest and not manifest["model"]:
            queue += [source for source in manifest["identity"]["inputs"].values() if source not in queue]
    return None


def _end_as_eos(tokenizer: "Tokenizer", last_ids: list[int | None]) -> str | None:
    """Make the most frequent end token EOS, and return it; None if it is. Others may be what a chat template ends with.

    For trainers that write the tokenizer's EOS token at the end of texts.
    """
    ends, eos = tokenizer.stop, tokenizer.inner.eos_token_id
    end = next((last for last in last_ids if last in ends), eos)
    if end == eos:
        return None
    tokenizer.inner.eos_token = tokenizer.inner.convert_ids_to_tokens(end)
    return str(tokenizer.inner.eos_token)


@contextmanager
def _writer(
    path: Path, schema: pa.Schema | None = None, *, overwrites: bool = False
) -> Iterator[Callable[[list[Row]], Any]]:
    """Yield a function that writes rows to a file, which appears when all are written, and not at all on failure.

    Raise WinnowError at the end if it exists with other content, unless this one overwrites it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".parquet":
            assert schema is not None  # of a format with columns
            statistics = columns_with_statistics(schema)
            with pq.ParquetWriter(scratch, schema, compression="zstd", write_statistics=statistics) as parquet:
                yield lambda rows: parquet.write_table(pa.Table.from_pylist(rows, schema=schema)) if rows else None
        else:
            with scratch.open("w", encoding="utf-8", newline="\n") as file:
                yield lambda rows: file.writelines(as_json(row) + "\n" for row in rows)
        if not overwrites and path.exists() and not filecmp.cmp(scratch, path, shallow=False):
            raise WinnowError(f"--out {path}: exists already, with other content; delete it, or give another name")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)

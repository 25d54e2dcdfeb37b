"""Pairs of a run as files that others train from: TRL's preferences, OpenAI's, and plain rows with every column.

How a pair becomes a row of a format is in export_formats.py. Pairs are read one slice of prompts at a time, so their
number is not limited by memory.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.console import as_json
from jobs.export_formats import FORMATS, IDS, REFS, SIDES, FormatName, Reject, Row
from pipeline.config.rounds import split_round
from pipeline.registry import nearest
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.store.store import Store
from schemas import Model, WinnowError

Split = Literal["train", "heldout"]
SLICE = 65_536  # pairs that one query sorts in memory
BATCH = 4096  # pairs whose texts are in memory at once
HEX = "0123456789abcdef"
TABLES_READ = ("examples", "prompts", "pairs", "rewards")

# One slice of prompts; a table's name in braces is a condition. `position` orders duplicates of a pair in the data.
PAIRS = """
WITH flat AS (
    SELECT prompt_id, prompt_ids, responses, unnest(pairs) AS pair, generate_subscripts(pairs, 1) AS position
    FROM examples WHERE {examples}
), sides AS (
    SELECT *, responses[pair.chosen + 1] AS chosen, responses[pair.rejected + 1] AS rejected,
        responses[pair.chosen + 1].candidate_id AS chosen_id, responses[pair.rejected + 1].candidate_id AS rejected_id
    FROM flat
), origins AS (
    SELECT prompt_id, chosen_id, rejected_id, max(gap) AS gap, max(rule) AS rule FROM pairs WHERE {pairs} GROUP BY ALL
), prompt_texts AS (
    SELECT prompt_id, text FROM prompts WHERE {prompts}
), scores AS (
    SELECT candidate_id, reward FROM rewards WHERE {rewards}
)
SELECT prompt_id, chosen_id, rejected_id, text, prompt_ids,
    chosen.token_ids AS chosen_ids, rejected.token_ids AS rejected_ids, pair.weight, pair.label, gap, rule,
    winner.reward AS chosen_reward, loser.reward AS rejected_reward,
    chosen.ref_logp AS ref_chosen_logps, rejected.ref_logp AS ref_rejected_logps
FROM sides
JOIN prompt_texts USING (prompt_id)
LEFT JOIN origins USING (prompt_id, chosen_id, rejected_id)
LEFT JOIN scores AS winner ON winner.candidate_id = chosen_id
LEFT JOIN scores AS loser ON loser.candidate_id = rejected_id
ORDER BY prompt_id, chosen_id, rejected_id, position
"""


@dataclass(frozen=True)
class PairSource:
    """Keys of a run's tables, and the model whose tokens and reference log-probs they hold."""

    step: str
    keys: dict[str, str]
    policy: Model
    cached: bool  # whether reference log-probs are


@dataclass
class ExportResult:
    """Counts of pairs: written, rejects by reason, with a weight or label other than 1, tokens of the longest."""

    out: Path
    source: PairSource
    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    weighted: int = 0

    @property
    def rejects_file(self) -> Path:
        return self.out.with_name(self.out.name + ".rejects.jsonl")


def export_pairs(
    store: Store, run: str, name: FormatName, out: Path, split: Split = "train", round: int | None = None
) -> ExportResult:
    """Write the pairs that a run's policy was trained on in format `name`, ordered by their ids; all or none.

    Rejected pairs are written beside the file, in FILE.rejects.jsonl. The same run gives the same bytes. Raise
    WinnowError for an unknown run or round, a suffix that the format does not have, a run without pairs, and if all
    are rejected.
    """
    from stages.data.tokenizer import Tokenizer

    form = FORMATS[name]
    if out.suffix not in form.suffixes:
        raise WinnowError(f"--out {out}: {name} is written as {' or '.join(form.suffixes)}; name such a file")
    source = find_pairs(store, run, split, round)
    result = ExportResult(out, source)
    tokenizer = Tokenizer(source.policy)
    with _writer(out, source.cached) as write_rows, _writer(result.rejects_file, source.cached) as write_rejects:
        for rows in _batches(open_catalog(store, run), source):
            converted = list(zip(rows, form.convert(rows, tokenizer), strict=True))
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
            raise WinnowError(f"run {run}: no pairs in its examples; winnow trace {run} shows why for a prompt")
        if not result.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in result.rejects.most_common())
            raise WinnowError(
                f"run {run}: {name} would reject all of its pairs ({reasons}); --format jsonl writes them as token ids"
            )
    if not result.rejects:
        result.rejects_file.unlink()
    return result


def find_pairs(store: Store, run: str, split: Split, round: int | None) -> PairSource:
    """Return the examples of the run's policy in one round, by default the last that has any.

    Raise WinnowError if there are none, or if they hold no pairs.
    """
    runs = store.runs()
    if run not in runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(run, list(runs))}")
    lineage = Lineage(store, runs[run])
    numbers = sorted({number for _, number in map(split_round, lineage.links) if number}, reverse=True)
    if round is not None and round not in numbers:
        available = f"its rounds are 1 to {numbers[0]}" if numbers else "it has no rounds; omit --round"
        raise WinnowError(f"run {run}: no round {round}; {available}")
    rounds: list[int | None] = [round] if round is not None else [*numbers] or [None]
    examples = next((item for number in rounds if (item := lineage.examples(number, split))), None)
    if examples is None:
        if split == "heldout":
            problem = (
                "its policy has no held-out examples; add `heldout` under `from` of optimize, or export --split train"
            )
        elif {"optimize", "examples"} & {split_round(name)[0] for name in lineage.links}:
            problem = "its examples are not finished yet; the same winnow run continues with them"
        else:
            problem = "no pairs, because it trains no policy on examples; export a run of a recipe that does, like rso"
        raise WinnowError(f"run {run}: {problem}")

    step, key = examples
    inputs = lineage.inputs(key)
    if "pairs" not in inputs:
        raise WinnowError(
            f"run {run}: no pairs, because {step} has none to train on (it imitates, or has unpaired labels); export a "
            "run of a recipe with pairs, like rso or dpo"
        )
    keys = {"examples": key, "prompts": inputs["prompts"], "pairs": inputs["pairs"]}
    if rewards := lineage.nearest(inputs["pairs"], lambda manifest: "rewards" in manifest["rows"]):
        keys["rewards"] = rewards
    # The model whose log-probs are cached; without a reference the nearest one, which has the same tokenizer.
    reference = inputs.get("reference")
    policy = lineage.inputs(reference)["policy"] if reference else lineage.nearest(key, lambda item: item["model"])
    assert policy is not None  # prompts are tokenised, with the tokenizer of a model
    return PairSource(step, keys, store.at(lineage.stages[policy], policy).model(), reference is not None)


class Lineage:
    """Steps of a run, and the steps that each was computed from, by the manifests."""

    def __init__(self, store: Store, links: Row) -> None:
        self.store, self.links = store, links
        self.stages = {link["key"]: link["stage"] for link in links.values()}
        self._manifests: dict[str, Row | None] = {}

    def manifest(self, key: str | None) -> Row | None:
        if key is None:
            return None
        if key not in self._manifests:
            self._manifests[key] = self.store.at(self.stages[key], key).manifest
        return self._manifests[key]

    def inputs(self, key: str) -> dict[str, str]:
        manifest = self.manifest(key)
        return dict(manifest["identity"]["inputs"]) if manifest else {}

    def examples(self, round: int | None, split: Split) -> tuple[str, str] | None:
        """Return name and key of what the policy reads; before it is trained, of the step `examples`."""

        def key_of(step: str) -> str | None:  # in this round, or of all rounds
            names = [name for name in self.links if split_round(name) in ((step, round), (step, None))]
            return self.links[names[0]]["key"] if names else None

        policy = self.manifest(key_of("optimize"))
        key = policy["identity"]["inputs"].get("examples" if split == "train" else "heldout") if policy else None
        if policy is None and split == "train":
            key = key_of("examples")
        if key is None or self.manifest(key) is None:
            return None
        return next(name for name, link in self.links.items() if link["key"] == key), key

    def nearest(self, key: str, matches: Callable[[Row], Any]) -> str | None:
        """Return the key of the nearest matching step behind this one; the search does not go past a model."""
        queue = [key]
        for candidate in queue:
            manifest = self.manifest(candidate)
            if manifest and matches(manifest):
                return candidate
            if manifest and not manifest["model"]:
                queue += [source for source in self.inputs(candidate).values() if source not in queue]
        return None


def _batches(catalog: Catalog, source: PairSource) -> Iterator[list[Row]]:
    """Yield the pairs ordered by their ids. Prompt ids are hashes, so their first digits cut equal slices."""
    count = f"SELECT coalesce(sum(len(pairs)), 0) AS n FROM examples WHERE key = '{source.keys['examples']}'"
    for low, high in slices(int(query(catalog, count)["n"][0].as_py())):
        # A table that the run does not have matches nothing.
        conditions = {
            name: f"key = '{source.keys[name]}' AND prompt_id >= '{low}' AND prompt_id < '{high}'"
            if name in source.keys
            else "false"
            for name in TABLES_READ
        }
        table = query(catalog, PAIRS.format(**conditions)).combine_chunks()  # chunk sizes differ from call to call
        yield from (batch.to_pylist() for batch in table.to_batches(BATCH))


def slices(pairs: int) -> list[tuple[str, str]]:
    """Return the ends of ranges of prompt ids, so many that each has at most about SLICE pairs."""
    starts = [""]
    while pairs > SLICE * len(starts):
        starts = [start + digit for start in starts for digit in HEX]
    return list(zip(starts, [*starts[1:], "g"], strict=True))


@contextmanager
def _writer(path: Path, cached: bool) -> Iterator[Callable[[list[Row]], Any]]:
    """Yield a function that writes rows to a file, which appears when all are written, and not at all on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".parquet":
            names = ("prompt", *SIDES)
            references = [pa.field(name, pa.float32()) for name in REFS if cached]
            schema = pa.schema([*(pa.field(name, pa.string()) for name in names), *references])
            with pq.ParquetWriter(scratch, schema, compression="zstd") as parquet:
                yield lambda rows: parquet.write_table(pa.Table.from_pylist(rows, schema=schema)) if rows else None
        else:
            with scratch.open("w", encoding="utf-8", newline="\n") as file:
                yield lambda rows: file.writelines(as_json(row) + "\n" for row in rows)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)

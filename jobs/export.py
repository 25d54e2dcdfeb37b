"""A run's pairs as files that others train from: TRL's preferences, OpenAI's, and plain rows with everything.

What becomes of a pair in a format is in formats.py. Pairs are read a slice of prompts at a time: their number is no
matter of memory.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.console import as_json
from jobs.export_formats import FORMATS, IDS, REFS, SIDES, Left, Name, Row
from pipeline.config.rounds import split as step_and_round
from pipeline.registry import nearest
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import Model, WinnowError

Split = Literal["train", "heldout"]
SLICE = 65_536  # pairs that a query sorts in memory
AT_ONCE = 4096  # pairs whose texts are in hand
HEX = "0123456789abcdef"
TABLES_READ = ("examples", "prompts", "pairs", "rewards")

# One slice of prompts; a table's name in braces is a condition. `place` orders a pair that people brought twice.
PAIRS = """
WITH flat AS (
    SELECT prompt_id, prompt_ids, responses, unnest(pairs) AS pair, generate_subscripts(pairs, 1) AS place
    FROM examples WHERE {examples}
), sides AS (
    SELECT *, responses[pair.chosen + 1] AS chosen, responses[pair.rejected + 1] AS rejected,
        responses[pair.chosen + 1].candidate_id AS chosen_id, responses[pair.rejected + 1].candidate_id AS rejected_id
    FROM flat
), origins AS (
    SELECT prompt_id, chosen_id, rejected_id, max(gap) AS gap, max(rule) AS rule FROM pairs WHERE {pairs} GROUP BY ALL
), asked AS (
    SELECT prompt_id, text FROM prompts WHERE {prompts}
), scored AS (
    SELECT candidate_id, reward FROM rewards WHERE {rewards}
)
SELECT prompt_id, chosen_id, rejected_id, text, prompt_ids,
    chosen.token_ids AS chosen_ids, rejected.token_ids AS rejected_ids, pair.weight, pair.label, gap, rule,
    winner.reward AS chosen_reward, loser.reward AS rejected_reward,
    chosen.ref_logp AS ref_chosen_logps, rejected.ref_logp AS ref_rejected_logps
FROM sides
JOIN asked USING (prompt_id)
LEFT JOIN origins USING (prompt_id, chosen_id, rejected_id)
LEFT JOIN scored AS winner ON winner.candidate_id = chosen_id
LEFT JOIN scored AS loser ON loser.candidate_id = rejected_id
ORDER BY prompt_id, chosen_id, rejected_id, place
"""


@dataclass(frozen=True)
class Source:
    """Where a run's pairs lie: keys of the tables, and the model whose tokens and log-probs they are."""

    step: str
    keys: dict[str, str]
    policy: Model
    cached: bool


@dataclass
class Exported:
    """What was written, what was left out by reason, and how many pairs have a weight or a label other than 1."""

    out: Path
    source: Source
    rows: int = 0
    left: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    weighted: int = 0

    @property
    def rejects(self) -> Path:
        return self.out.with_name(self.out.name + ".rejects.jsonl")


def export(store: Store, run: str, name: Name, out: Path, split: Split = "train", round: int | None = None) -> Exported:
    """Write the pairs that a run's policy was trained on as format `name`, ordered by their ids; all of them or none.

    Those left out stand beside the file, in FILE.rejects.jsonl. The same run gives the same bytes. Raises WinnowError
    for an unknown run or round, a file name that the format does not have, a run without pairs, and if none is left.
    """
    from stages.data.tokenizer import Tokenizer

    form = FORMATS[name]
    if out.suffix not in form.suffixes:
        raise WinnowError(f"--out {out}: {name} is written as {' or '.join(form.suffixes)}; name such a file")
    source = find(store, run, split, round)
    made = Exported(out, source)
    tokens = Tokenizer(source.policy)
    with _whole(out, source.cached) as keep, _whole(made.rejects, source.cached) as leave:
        for rows in _batches(partial(query, open_catalog(store, run)), source):
            _tally(made, rows, list(form.write(rows, tokens)), keep, leave)
        if not made.rows:
            raise WinnowError(_none_left(run, name, made))
    if not made.left:
        made.rejects.unlink()
    return made


def _tally(made: Exported, rows: list[Row], answers: list[Row | Left], keep: "Sink", leave: "Sink") -> None:
    kept = [(row, answer) for row, answer in zip(rows, answers, strict=True) if not isinstance(answer, Left)]
    left = [(row, answer) for row, answer in zip(rows, answers, strict=True) if isinstance(answer, Left)]
    keep([answer for _, answer in kept])
    leave([{name: row[name] for name in IDS} | answer._asdict() for row, answer in left])
    made.rows += len(kept)
    made.left.update(answer.reason for _, answer in left)
    made.longest = max([made.longest, *(_length(row) for row, _ in kept)])
    made.weighted += sum(row["weight"] != 1 or row["label"] != 1 for row, _ in kept)


def _length(row: Row) -> int:
    return len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in SIDES)


def _none_left(run: str, name: str, made: Exported) -> str:
    if not made.left:
        return f"run {run}: no pairs in its examples; winnow trace {run} shows what became of a prompt"
    reasons = ", ".join(f"{count} {reason}" for reason, count in made.left.most_common())
    return f"run {run}: all its pairs would be left out of {name} ({reasons}); --format jsonl has them as token ids"


# Where a run's pairs lie


def find(store: Store, run: str, split: Split, round: int | None) -> Source:
    """The examples of the run's policy, in one round (the last that has any); raises WinnowError without pairs."""
    runs = store.runs()
    if run not in runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(run, list(runs))}")
    trail = Trail(store, runs[run])
    found = [made for number in trail.rounds(run, round) if (made := trail.examples(number, split))]
    if not found:
        raise WinnowError(_no_examples(run, split, trail))
    step, key = found[0]
    inputs = trail.inputs(key)
    if "pairs" not in inputs:
        raise WinnowError(
            f"run {run}: no pairs, for {step} has none to train on (it imitates, or has unpaired labels); export a "
            "run of a recipe that pairs, as rso or dpo do"
        )
    keys = {"examples": key, "prompts": inputs["prompts"], "pairs": inputs["pairs"]}
    if rewards := trail.nearest(inputs["pairs"], lambda manifest: "rewards" in manifest["rows"]):
        keys["rewards"] = rewards
    return Source(step, keys, trail.policy(key), "reference" in inputs)


def _no_examples(run: str, split: Split, trail: "Trail") -> str:
    if split == "heldout":
        return f"run {run}: its policy has no held-out examples; wire `heldout` of optimize, or export --split train"
    if {"optimize", "examples"} & {step_and_round(name)[0] for name in trail.links}:
        return f"run {run}: its examples are not made yet; the same winnow run goes on with them"
    return f"run {run}: no pairs, for it trains no policy on examples; export a run of a recipe that does, as rso"


class Trail:
    """From a step of a run to what it was made from, by the manifests."""

    def __init__(self, store: Store, links: Row) -> None:
        self.store, self.links = store, links
        self.stages = {link["key"]: link["stage"] for link in links.values()}
        self.manifest = cache(self._read)

    def rounds(self, run: str, round: int | None) -> list[int | None]:
        """The round asked for, or all from the last to the first; raises WinnowError for one that is not there."""
        have = sorted({number for _, number in map(step_and_round, self.links) if number}, reverse=True)
        if round is not None and round not in have:
            there = f"its rounds are 1 to {have[0]}" if have else "it has no rounds; leave --round out"
            raise WinnowError(f"run {run}: no round {round}; {there}")
        return [*have] or [None] if round is None else [round]

    def key(self, step: str, round: int | None) -> str | None:
        """A step's key in a round, or that of all rounds."""
        names = [name for name in self.links if step_and_round(name) in ((step, round), (step, None))]
        return self.links[names[0]]["key"] if names else None

    def examples(self, round: int | None, split: Split) -> tuple[str, str] | None:
        """Name and key of what the policy reads; before it is trained, of the step `examples`."""
        policy = self.manifest(self.key("optimize", round))
        wire = "examples" if split == "train" else "heldout"
        key = policy["identity"]["inputs"].get(wire) if policy else None
        if policy is None and split == "train":
            key = self.key("examples", round)
        if key is None or self.manifest(key) is None:
            return None
        return next(name for name, link in self.links.items() if link["key"] == key), key

    def policy(self, examples: str) -> Model:
        """The model whose log-probs are cached; without a reference the nearest one, which has the same tokenizer."""
        reference = self.inputs(examples).get("reference")
        key = self.inputs(reference)["policy"] if reference else self.nearest(examples, lambda made: made["model"])
        assert key is not None  # prompts are made with a tokenizer, which is a model's
        return self.store.at(self.stages[key], key).model()

    def nearest(self, key: str, meant: Callable[[Row], Any]) -> str | None:
        """The key of the nearest step behind this one that is meant; what made a model is not looked through."""
        queue = [key]
        for each in queue:
            manifest = self.manifest(each)
            if manifest and meant(manifest):
                return each
            if manifest and not manifest["model"]:
                queue += [source for source in self.inputs(each).values() if source not in queue]
        return None

    def inputs(self, key: str) -> dict[str, str]:
        manifest = self.manifest(key)
        return dict(manifest["identity"]["inputs"]) if manifest else {}

    def _read(self, key: str | None) -> Row | None:
        return self.store.at(self.stages[key], key).manifest if key else None


# Reading


def _batches(ask: Callable[[str], pa.Table], source: Source) -> Iterator[list[Row]]:
    """The pairs, ordered by their ids: prompt ids are hashes, so their first digits cut them into equal slices."""
    count = f"SELECT coalesce(sum(len(pairs)), 0) AS n FROM examples WHERE key = '{source.keys['examples']}'"
    for low, high in _slices(int(ask(count)["n"][0].as_py())):
        where = {name: _slice(source.keys.get(name), low, high) for name in TABLES_READ}
        table = ask(PAIRS.format(**where)).combine_chunks()  # chunks as they come are not the same twice
        yield from (batch.to_pylist() for batch in table.to_batches(AT_ONCE))


def _slices(pairs: int) -> list[tuple[str, str]]:
    """Ends of ranges of prompt ids, so many that each has at most about SLICE pairs."""
    starts = [""]
    while pairs > SLICE * len(starts):
        starts = [start + digit for start in starts for digit in HEX]
    return list(zip(starts, [*starts[1:], "g"], strict=True))


def _slice(key: str | None, low: str, high: str) -> str:
    """Of one step's table, if it was made."""
    return f"key = '{key}' AND prompt_id >= '{low}' AND prompt_id < '{high}'" if key else "false"


# Writing

Sink = Callable[[list[Row]], Any]


@contextmanager
def _whole(path: Path, cached: bool) -> Iterator[Sink]:
    """A file that appears when all is written, and not at all if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with (_parquet if path.suffix == ".parquet" else _lines)(scratch, cached) as sink:
            yield sink
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _parquet(path: Path, cached: bool) -> Iterator[Sink]:
    refs = [pa.field(name, pa.float32()) for name in REFS if cached]
    schema = pa.schema([*(pa.field(name, pa.string()) for name in ("prompt", *SIDES)), *refs])
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        yield lambda rows: file.write_table(pa.Table.from_pylist(rows, schema=schema)) if rows else None


@contextmanager
def _lines(path: Path, cached: bool) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda rows: file.writelines(as_json(row) + "\n" for row in rows)

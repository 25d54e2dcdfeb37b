"""Data to measure on: random tables of any size, sealed steps that hold them, and a recipe with a small model.

Ids, tokens and numbers are random: what a stage or a query takes depends on how many and how long they are.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import jobs.recipes  # noqa: F401 - registers every stage, in every process
from pipeline.config.plan import Plan, Step, make_plan
from pipeline.config.recipe import Recipe
from pipeline.context import StageContext, WarmCache
from pipeline.execution.run import record_of
from pipeline.stage import stages
from pipeline.store.fingerprints import DataPath
from pipeline.store.store import Store
from schemas import TABLES
from schemas.tables import CANDIDATES, COMPARISONS, PAIRS, PROMPTS, REFERENCE, REJECTS, REWARDS, SELECTIONS

Json = dict[str, Any]
Tables = dict[str, pa.Table]
HEX = np.array([f"{byte:02x}".encode() for byte in range(256)], dtype="S2").view(np.uint16)
SELECTED = 8  # candidates per prompt in a selection
WORDS = [
    f"{start}{end}" for start in ("ba", "co", "di", "lu", "ne", "po", "ri", "su") for end in ("ck", "ll", "nd", "st")
]
TOKENS = 8  # per response
SAMPLING: Json = {"n": 64, "max_tokens": 32, "temperature": 0.7, "top_k": 40}


@dataclass(frozen=True)
class Part:
    """Rows of one part in every table; random, and the same for the same seed."""

    prompts: int
    draws: int
    seed: int
    version: int = 0  # another one has other responses to the same prompts

    def candidates(self) -> pa.Table:
        rng, (prompt, candidate) = self._rng(1), self.ids()
        n = len(prompt)
        lengths = rng.integers(1, 2 * TOKENS, size=n)
        ids = pa.array(rng.integers(32_000, size=lengths.sum(), dtype=np.int32))
        return _table(
            CANDIDATES,
            prompt_id=prompt,
            candidate_id=candidate,
            k=np.tile(np.arange(self.draws, dtype=np.int32), self.prompts),
            token_ids=pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), ids),
            text=pc.binary_join_element_wise(*(_choices(rng, WORDS, n) for _ in range(4)), " "),
            logp=rng.normal(-20, 5, n),
            logp_kind=_choices(rng, ["raw"], n),
            n_tokens=lengths.astype(np.int32),
            finish_reason=_choices(rng, ["stop", "stop", "stop", "length"], n),
            seed=rng.integers(2**62, size=n),
        )

    def rewards(self) -> pa.Table:
        rng, (prompt, candidate) = self._rng(2), self.ids()
        reward, bias = rng.normal(size=len(prompt)), rng.normal(0, 0.1, len(prompt))
        return _table(
            REWARDS,
            prompt_id=prompt,
            candidate_id=candidate,
            reward=reward,
            baseline_id=candidate.take(pa.array(np.repeat(np.arange(self.prompts) * self.draws, self.draws))),
            logit_ab=reward + bias,
            logit_ba=reward - bias,
        )

    def prompt_table(self, split: str = "train") -> pa.Table:
        rng, prompt = self._rng(3), self._prompt_ids()
        ids = pa.array(rng.integers(32_000, size=self.prompts * TOKENS, dtype=np.int32))
        return _table(
            PROMPTS,
            prompt_id=prompt,
            text=pc.binary_join_element_wise(*(_choices(rng, WORDS, self.prompts) for _ in range(4)), " "),
            token_ids=pa.ListArray.from_arrays(np.arange(self.prompts + 1, dtype=np.int32) * TOKENS, ids),
            split=_choices(rng, [split], self.prompts),
        )

    def selections(self) -> pa.Table:
        rng, rewards = self._rng(4), self.rewards()
        is_selected = np.tile(np.arange(self.draws) % (self.draws // SELECTED) == 0, self.prompts)
        selected = rewards.take(pa.array(np.flatnonzero(is_selected)))
        n = selected.num_rows
        numbers = {name: np.repeat(rng.random(self.prompts), n // self.prompts) for name in ("acceptance", "ess")}
        return _table(
            SELECTIONS,
            **{name: selected[name] for name in ("prompt_id", "candidate_id", "reward")},
            draw=np.tile(np.arange(n // self.prompts, dtype=np.int32), self.prompts),
            round=rng.integers(3, size=n, dtype=np.int32),
            weight=np.ones(n),
            beta=np.full(n, 0.5),
            **numbers,
        )

    def matches(self) -> Tables:
        """Return comparisons of neighbours among the selected candidates, and their pairs."""
        selected, rng = self.selections(), self._rng(5)
        first, second = (selected.take(pa.array(np.arange(side, selected.num_rows, 2))) for side in (0, 1))
        n, prompt = first.num_rows, first["prompt_id"]
        logit = rng.normal(size=n)
        compared = {"left_id": first["candidate_id"], "right_id": second["candidate_id"], "logit": logit}
        paired = {"chosen_id": first["candidate_id"], "rejected_id": second["candidate_id"], "gap": np.abs(logit)}
        rule = _choices(rng, ["matches"], n)
        return {
            "comparisons": _table(COMPARISONS, prompt_id=prompt, **compared, round=np.zeros(n, np.int32)),
            "pairs": _table(PAIRS, prompt_id=prompt, **paired, weight=np.ones(n), rule=rule),
        }

    def reference(self) -> pa.Table:
        selected, rng = self.selections(), self._rng(6)
        n = selected.num_rows
        return _table(
            REFERENCE,
            prompt_id=selected["prompt_id"],
            candidate_id=selected["candidate_id"],
            logp=rng.normal(-20, 5, n).astype(np.float32),
            n_tokens=np.full(n, TOKENS, np.int32),
            tokens=selected["candidate_id"],
            model=_choices(rng, ["0123456789abcdef"], n),
            dtype=_choices(rng, ["float32"], n),
        )

    def ids(self) -> tuple[pa.Array, pa.Array]:
        """Return prompt id and candidate id of each candidate; both in order, as `reward` leaves them."""
        n = self.prompts * self.draws
        prompt = self._prompt_ids().take(pa.array(np.repeat(np.arange(self.prompts), self.draws)))
        raw = self._rng(7).integers(256, size=(self.prompts, self.draws, 10), dtype=np.uint8)
        raw[:, :, 0] = np.arange(self.draws) * 256 // self.draws
        return prompt, _hex_ids(raw.reshape(n, 10))

    def _prompt_ids(self) -> pa.Array:
        ids = _hex_ids(np.random.default_rng([self.seed, 8]).integers(256, size=(self.prompts, 10), dtype=np.uint8))
        return ids.take(pc.sort_indices(ids))

    def _rng(self, table: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, table, self.version])


def _hex_ids(raw: np.ndarray) -> pa.Array:
    """Return each row of bytes, uint8 [N, 10], as hex digits."""
    offsets = np.arange(len(raw) + 1, dtype=np.int32) * 20
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(HEX[raw]))


def _choices(rng: np.random.Generator, values: list[str], n: int) -> pa.Array:
    return pa.array(values).take(pa.array(rng.integers(len(values), size=n)))


def _table(schema: pa.Schema, **columns: Any) -> pa.Table:
    """Return the columns as a table; those of the schema that are missing are null."""
    rows = len(next(iter(columns.values())))
    arrays = [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in schema]
    return pa.table(arrays, schema=schema)


def one_row(schema: pa.Schema, **values: Any) -> pa.Table:
    """Return a table of one row, in which other columns than `values` are null, empty or 0."""
    row: Json = {}
    for field in schema:
        if field.nullable:
            row[field.name] = None
        elif pa.types.is_list(field.type):
            row[field.name] = []
        else:
            row[field.name] = "" if pa.types.is_string(field.type) else 0
    return pa.Table.from_pylist([row | values], schema=schema)


def make_step(
    stage: str, shards: int, name: str | None = None, inputs: dict[str, Step] | None = None, **options: Any
) -> Step:
    """Return a step outside any checked plan: inputs of the stage that are missing here are not read."""
    entry = stages.entries[stage]
    return Step(name or stage, entry, entry.validate(options, stage), inputs or {}, shards)


def seal_step(store: Store, step: Step, tables_of: Callable[[int], Tables]) -> None:
    """Write a finished step as a run leaves it, from the tables of each part."""
    folder = store.folder(step)
    for shard in range(step.shards):
        tables = tables_of(shard) | {"rejects": REJECTS.empty_table()}
        record = {"seconds": 1.0, "gpu_seconds": 0.0, "cpu_seconds": 1.0, "counters": {}, "rejects": {}, "inputs": {}}
        folder.write_part(shard, {name: tables[name] for name in TABLES if name in tables}, record)
    folder.seal(record_of(step, 1.0), lambda manifest: None)


def make_policy(folder: Path, hidden: int, layers: int) -> None:
    """Write `policy`: a Llama of random weights, with a tokenizer of the words that prompts consist of."""
    from stages.network.models import untrained

    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": " ".join(WORDS[n:] + WORDS[:n])}) + "\n" for n in range(len(WORDS))))
    scratch = StageContext(folder / "made", WarmCache(), lambda *report: None)
    size = {"vocabulary": 512, "hidden": hidden, "layers": layers, "heads": max(1, hidden // 64), "context": 256}
    untrained(scratch, corpus=DataPath(str(corpus)), columns=["text"], **size).folder.rename(folder / "policy")


def write_prompts(folder: Path, count: int) -> None:
    """Write `prompts.jsonl`: `count` different prompts of about twelve words."""
    rng = np.random.default_rng(0)
    rows = ({"prompt": f"{n} {' '.join(rng.choice(WORDS, 12))}"} for n in range(count))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pipeline_plan(folder: Path, target: str, shards: int, **sampling: Any) -> Plan:
    """Return a plan from prompts to training groups in which only `sample`, with these options, reads the model."""
    by: Json = {"with": {"by": {"name": "brevity", "words": 12}}}
    inputs = {"prompts": "prompts", "candidates": "sample"}
    steps: dict[str, Json] = {
        "policy": {"use": "model", "with": {"path": str(folder / "policy")}},
        "prompts": {"from": {"tokenizer": "policy"}, "with": {"path": str(folder / "prompts.jsonl"), "heldout": 0.0}},
        "sample": {"from": {"prompts": "prompts", "policy": "policy"}, "with": sampling},
        "reward": {"from": inputs} | by,
        "select": {"from": {"rewards": "reward"}, "with": {"rule": {"name": "rejection_sample", "k": 4, "beta": 2.0}}},
        "compare": {"from": inputs | {"selections": "select"}} | by,
        "pair": {"from": {"candidates": "sample", "comparisons": "compare"}},
        "examples": {"from": inputs | {"pairs": "pair"}},
    }
    return make_plan(Recipe(name="bench", shards=shards, target=target, steps=steps))


def split_evenly(total: int, parts: int) -> Iterator[int]:
    """Yield the sizes of `parts` parts that add up to `total` and differ by at most 1."""
    return (total * (n + 1) // parts - total * n // parts for n in range(parts))

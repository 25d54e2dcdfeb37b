"""What the parts are measured on: tables of any number of rows made at once, sealed steps of them, and a small world.

Tables are of random ids, tokens and numbers; what a stage or a query takes depends on how many and how long they are.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
KEPT = 8  # candidates of a prompt that a selection keeps
WORDS = [
    f"{start}{end}" for start in ("ba", "co", "di", "lu", "ne", "po", "ri", "su") for end in ("ck", "ll", "nd", "st")
]
TOKENS = 8  # of a response
DRAWN: Json = {"n": 64, "max_tokens": 32, "temperature": 0.7, "top_k": 40}


@dataclass(frozen=True)
class Part:
    """The rows of one part in every table; random, and the same for the same seed."""

    prompts: int
    draws: int
    seed: int
    again: int = 0  # another draw of responses to the same prompts

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
            text=pc.binary_join_element_wise(*(_any(rng, WORDS, n) for _ in range(4)), " "),
            logp=rng.normal(-20, 5, n),
            logp_kind=_any(rng, ["raw"], n),
            n_tokens=lengths.astype(np.int32),
            finish_reason=_any(rng, ["stop", "stop", "stop", "length"], n),
            seed=rng.integers(2**62, size=n),
        )

    def rewards(self) -> pa.Table:
        rng, (prompt, candidate) = self._rng(2), self.ids()
        reward, off = rng.normal(size=len(prompt)), rng.normal(0, 0.1, len(prompt))
        return _table(
            REWARDS,
            prompt_id=prompt,
            candidate_id=candidate,
            reward=reward,
            baseline_id=candidate.take(pa.array(np.repeat(np.arange(self.prompts) * self.draws, self.draws))),
            logit_ab=reward + off,
            logit_ba=reward - off,
        )

    def about_prompts(self, split: str = "train") -> pa.Table:
        rng, prompt = self._rng(3), self._prompts()
        ids = pa.array(rng.integers(32_000, size=self.prompts * TOKENS, dtype=np.int32))
        return _table(
            PROMPTS,
            prompt_id=prompt,
            text=pc.binary_join_element_wise(*(_any(rng, WORDS, self.prompts) for _ in range(4)), " "),
            token_ids=pa.ListArray.from_arrays(np.arange(self.prompts + 1, dtype=np.int32) * TOKENS, ids),
            split=_any(rng, [split], self.prompts),
        )

    def selections(self) -> pa.Table:
        rng, rewards = self._rng(4), self.rewards()
        kept = rewards.take(
            pa.array(np.flatnonzero(np.tile(np.arange(self.draws) % (self.draws // KEPT) == 0, self.prompts)))
        )
        n = kept.num_rows
        numbers = {name: np.repeat(rng.random(self.prompts), n // self.prompts) for name in ("acceptance", "ess")}
        return _table(
            SELECTIONS,
            **{name: kept[name] for name in ("prompt_id", "candidate_id", "reward")},
            draw=np.tile(np.arange(n // self.prompts, dtype=np.int32), self.prompts),
            round=rng.integers(3, size=n, dtype=np.int32),
            weight=np.ones(n),
            beta=np.full(n, 0.5),
            **numbers,
        )

    def matches(self) -> Tables:
        """Comparisons of neighbours among the kept, and their pairs."""
        kept, rng = self.selections(), self._rng(5)
        first, second = (kept.take(pa.array(np.arange(side, kept.num_rows, 2))) for side in (0, 1))
        n, own = first.num_rows, {"prompt_id": first["prompt_id"]}
        logit = rng.normal(size=n)
        sides = {"left_id": first["candidate_id"], "right_id": second["candidate_id"]}
        made = {"chosen_id": first["candidate_id"], "rejected_id": second["candidate_id"], "gap": np.abs(logit)}
        return {
            "comparisons": _table(COMPARISONS, **own, **sides, logit=logit, round=np.zeros(n, np.int32)),
            "pairs": _table(PAIRS, **own, **made, weight=np.ones(n), rule=_any(rng, ["matches"], n)),
        }

    def reference(self) -> pa.Table:
        kept, rng = self.selections(), self._rng(6)
        n = kept.num_rows
        return _table(
            REFERENCE,
            prompt_id=kept["prompt_id"],
            candidate_id=kept["candidate_id"],
            logp=rng.normal(-20, 5, n).astype(np.float32),
            n_tokens=np.full(n, TOKENS, np.int32),
            tokens=kept["candidate_id"],
            model=_any(rng, ["0123456789abcdef"], n),
            dtype=_any(rng, ["float32"], n),
        )

    def ids(self) -> tuple[pa.Array, pa.Array]:
        """Of each candidate's prompt, and its own; both in order, as `reward` leaves them."""
        n = self.prompts * self.draws
        prompt = self._prompts().take(pa.array(np.repeat(np.arange(self.prompts), self.draws)))
        raw = self._rng(7).integers(256, size=(self.prompts, self.draws, 10), dtype=np.uint8)
        raw[:, :, 0] = np.arange(self.draws) * 256 // self.draws
        return prompt, _ids(raw.reshape(n, 10))

    def _prompts(self) -> pa.Array:
        found = _ids(np.random.default_rng([self.seed, 8]).integers(256, size=(self.prompts, 10), dtype=np.uint8))
        return found.take(pc.sort_indices(found))

    def _rng(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, self.again])


def _ids(raw: np.ndarray) -> pa.Array:
    """Hex of each row of bytes, uint8 [N, 10]."""
    offsets = np.arange(len(raw) + 1, dtype=np.int32) * 20
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(HEX[raw]))


def _any(rng: np.random.Generator, values: list[str], n: int) -> pa.Array:
    return pa.array(values).take(pa.array(rng.integers(len(values), size=n)))


def _table(schema: pa.Schema, **columns: Any) -> pa.Table:
    """Columns that are not given are null."""
    rows = len(next(iter(columns.values())))
    made = [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in schema]
    return pa.table(made, schema=schema)


def a_row(schema: pa.Schema, **known: Any) -> pa.Table:
    """A table of one row: what is not known is null, empty or 0."""
    empty = {field.name: None if field.nullable else _nothing(field.type) for field in schema}
    return pa.Table.from_pylist([empty | known], schema=schema)


def _nothing(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return []
    return "" if pa.types.is_string(kind) else 0


def step(
    stage: str, shards: int, name: str | None = None, inputs: dict[str, Step] | None = None, **options: Any
) -> Step:
    """Of a plan that is never checked: what is not wired is not read."""
    entry = stages.entries[stage]
    return Step(name or stage, entry, entry.validate(options, stage), inputs or {}, shards)


def seal(store: Store, made: Step, parts: Callable[[int], Tables]) -> None:
    """As a run leaves it, from the tables of each part."""
    folder = store.folder(made)
    for shard in range(made.shards):
        tables = parts(shard) | {"rejects": REJECTS.empty_table()}
        record = {"seconds": 1.0, "gpu_seconds": 0.0, "cpu_seconds": 1.0, "counters": {}, "rejects": {}, "inputs": {}}
        folder.write_part(shard, {name: tables[name] for name in TABLES if name in tables}, record)
    folder.seal(record_of(made, 1.0), made.shards, lambda manifest: None)


def make_policy(folder: Path, hidden: int, layers: int) -> None:
    """`policy`: a Llama of random weights, with a tokenizer of the words that prompts are made of."""
    from stages.network.models import untrained

    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": " ".join(WORDS[n:] + WORDS[:n])}) + "\n" for n in range(len(WORDS))))
    scratch = StageContext(folder / "made", WarmCache(), lambda *told: None)
    size = {"vocabulary": 512, "hidden": hidden, "layers": layers, "heads": max(1, hidden // 64), "context": 256}
    untrained(scratch, corpus=DataPath(str(corpus)), columns=["text"], **size).folder.rename(folder / "policy")


def write_prompts(folder: Path, count: int) -> None:
    """`prompts.jsonl`: so many different ones of about twelve words."""
    rng = np.random.default_rng(0)
    rows = ({"prompt": f"{n} {' '.join(rng.choice(WORDS, 12))}"} for n in range(count))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def corridor(folder: Path, target: str, shards: int, **drawn: Any) -> Plan:
    """From prompts to training groups, as far as no model need be read; `drawn` are options of `sample`."""
    by: Json = {"with": {"by": {"name": "brevity", "words": 12}}}
    wires = {"prompts": "prompts", "candidates": "sample"}
    steps: dict[str, Json] = {
        "policy": {"use": "model", "with": {"path": str(folder / "policy")}},
        "prompts": {"from": {"tokenizer": "policy"}, "with": {"path": str(folder / "prompts.jsonl"), "heldout": 0.0}},
        "sample": {"from": {"prompts": "prompts", "policy": "policy"}, "with": drawn},
        "reward": {"from": wires} | by,
        "select": {"from": {"rewards": "reward"}, "with": {"rule": {"name": "rejection_sample", "k": 4, "beta": 2.0}}},
        "compare": {"from": wires | {"selections": "select"}} | by,
        "pair": {"from": {"candidates": "sample", "comparisons": "compare"}},
        "examples": {"from": wires | {"pairs": "pair"}},
    }
    return make_plan(Recipe(name="bench", shards=shards, target=target, steps=steps))


class Quiet:
    """A reporter that tells nothing."""

    def step_cached(self, step: Step) -> None: ...
    def step_waiting(self, step: Step, why: str) -> None: ...
    def step_started(self, step: Step, done: int, total: int) -> None: ...
    def part_finished(self, step: Step) -> None: ...
    def progress(self, step: Step, done: float, total: float, unit: str) -> None: ...
    def prompt_rejected(self, step: Step, prompt: str, message: str) -> None: ...
    def step_finished(self, step: Step, manifest: Json) -> None: ...


def shares(total: int, parts: int) -> Iterator[int]:
    """`total` in so many parts, as equal as can be."""
    return (total * (n + 1) // parts - total * n // parts for n in range(parts))

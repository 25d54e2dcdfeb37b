"""Blind sheets for people: pairs of responses of two policies to the same prompts, shuffled, and the key apart.

Stage `ratings` (stages/evaluation/ratings.py) reads the filled sheet and the key.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.page import render
from pipeline.config.rounds import run_and_round, split_round
from pipeline.context import StageContext, WarmCache
from pipeline.registry import nearest
from pipeline.store.storage import replace
from pipeline.store.store import Json, Store
from schemas import WinnowError, seed_for
from schemas.tables import CANDIDATES, PROMPTS
from stages.evaluation.ratings import KEY
from stages.sampling.pool import pool

SUFFIXES = (".csv", ".html")
COLUMNS = ("id", "prompt", "response 1", "response 2", "rating")
FORMULA = ("=", "+", "-", "@")  # first characters of a cell that a spreadsheet computes
Row = dict[str, Any]


@dataclass(frozen=True)
class BlindSheet:
    """Files of a sheet and its key, the number of pairs, and of cells that a spreadsheet takes for formulas."""

    out: Path
    key: Path
    pairs: int
    formulas: int


def export_blind(
    store: Store, run: str, out: Path, against: str = "sft", pairs: int | None = None, round: int | None = None
) -> BlindSheet:
    """Write a pair of held-out responses per prompt, one of the run and one of `against`, in an order of no meaning.

    against: sft, target (the data's own texts) or a run. pairs: of so many prompts; by default all. Which responses,
    sides and order follow from the ids, so that the same runs give the same bytes. Raise WinnowError for an unknown
    run, for responses that are not there, and for a file that exists.
    """
    if out.suffix not in SUFFIXES:
        raise WinnowError(f"--out {out}: a blind comparison is written as {' or '.join(SUFFIXES)}; name such a file")
    key_file = out.with_name(f"{out.stem}.key.csv")
    for file in (out, key_file):
        if file.exists():
            raise WinnowError(f"--out {out}: {file} exists already and may hold ratings; give another name")
    manifests = {manifest["key"]: manifest for manifest in store.sealed()}
    sampling = _step(store, run, "eval_sample", round, manifests)
    prompts_key = sampling["identity"]["inputs"]["prompts"]
    if prompts_key not in manifests:
        raise WinnowError(f"run {run}: the prompts of its responses ({prompts_key}) are not in the store; run it again")
    prompts = _read(store, manifests[prompts_key], PROMPTS)
    candidates = _read(store, sampling, CANDIDATES)
    if against == "target":
        baseline = _targets(prompts.filter(pc.equal(prompts["split"], "heldout")), out.parent)
    else:
        name = "eval_baseline" if against == "sft" else "eval_sample"
        baseline = _read(store, _step(store, run if against == "sft" else against, name, None, manifests), CANDIDATES)

    by_prompt: dict[str, tuple[list[Row], list[Row]]] = {}
    for side, table in enumerate((candidates, baseline)):
        for row in table.select(["prompt_id", "candidate_id", "k", "text"]).to_pylist():
            by_prompt.setdefault(row["prompt_id"], ([], []))[side].append(row)
    texts = dict(zip(prompts["prompt_id"].to_pylist(), prompts["text"].to_pylist(), strict=True))
    chosen = []
    for prompt, (ours, theirs) in by_prompt.items():
        # Draws of one number of two runs have the same seed, and are no independent draws.
        options = [(a, b) for a in ours for b in theirs if against in ("sft", "target") or a["k"] != b["k"]]
        if options:
            ids = [(prompt, a["candidate_id"], b["candidate_id"]) for a, b in options]
            n = min(range(len(options)), key=lambda n: seed_for(0, "pair", *ids[n]))
            chosen.append((ids[n], options[n]))
    if not chosen:
        raise WinnowError(f"export: no prompt has a response of {run} and one of {against} to compare")
    chosen = sorted(chosen, key=lambda pair: seed_for(0, "order", *pair[0]))[:pairs]

    rows, keys = [], []
    for (prompt, candidate, opponent), responses in chosen:
        name = f"{seed_for(0, 'blind id', prompt, candidate, opponent):016x}"
        candidate_is = 1 + seed_for(0, "side", prompt, candidate, opponent) % 2
        first, second = (row["text"] for row in (responses if candidate_is == 1 else responses[::-1]))
        rows.append(dict(zip(COLUMNS, (name, texts[prompt], first, second, ""), strict=True)))
        line = dict(zip(KEY, (name, prompt, candidate, opponent, candidate_is), strict=True))
        keys.append(line | {"candidate": run, "baseline": against})
    if out.suffix == ".html":
        page = render("blind_comparison.html", {"rows": [list(row.values()) for row in rows]})
        replace(out, page.encode(), durable=False)
    else:
        replace(out, _csv(rows), durable=False)
    replace(key_file, _csv(keys), durable=False)
    cells = [cell for row in rows for cell in list(row.values())[1:4]]
    formulas = sum(cell.startswith(FORMULA) for cell in cells) if out.suffix == ".csv" else 0
    return BlindSheet(out, key_file, len(rows), formulas)


def _step(store: Store, run: str, step: str, round: int | None, manifests: dict[str, Json]) -> Json:
    """Return the manifest of a run's step, in one round or the last that is finished."""
    runs = store.runs()
    run, round = run_and_round(run, runs, round)
    if run not in runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(run, sorted(runs))}")
    by_round = {}
    for name, link in runs[run].items():
        base, number = split_round(name)
        if base == step and link["key"] in manifests and round in (None, number):
            by_round[number or 0] = manifests[link["key"]]
    if not by_round:
        of_round = f" of round {round}" if round is not None else ""
        raise WinnowError(f"run {run}: no finished step {step}{of_round}, whose responses are compared; run it first")
    return by_round[max(by_round)]


def _read(store: Store, manifest: Json, schema: pa.Schema) -> pa.Table:
    return store.at(manifest["stage"], manifest["key"]).read(schema)


def _targets(prompts: pa.Table, folder: Path) -> pa.Table:
    """Return the demonstrations of prompts as candidates, as step `targets` has them."""
    if not pc.any(pc.is_valid(prompts["demonstration"])).as_py():
        raise WinnowError("--against target: the prompts have no target texts; name their column with `demonstration`")
    targets: pa.Table = pool(StageContext(folder, WarmCache(), lambda *progress: None), prompts=prompts)
    return targets


def _csv(rows: list[Row]) -> bytes:
    """Return rows as CSV that spreadsheets read as UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")

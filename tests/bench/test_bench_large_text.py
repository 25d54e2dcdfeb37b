"""Tables with more than 2 GiB of text in one column go through the store and the stages. Needs 9 GB of memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.context import StageContext, WarmCache
from pipeline.sql.catalog import open_catalog
from pipeline.store.store import Store
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, EXAMPLES, PAIRS, PROMPTS, SELECTIONS
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select
from stages.training.examples import examples
from tests.catalogs import link, put, rejects, table

ROWS = 24 * 4096
TEXT = "x" * (24 << 10)
NAMES = [f"p{n * 7919 % ROWS:05d}" for n in range(ROWS)]  # in no order


def context(folder: Path) -> StageContext:
    return StageContext(folder, WarmCache(), lambda *progress: None)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_prompts_are_stored_read_and_made_to_examples(kind: pa.DataType, tmp_path: Path):
    """Also if a stage returns one array with offsets of 64 bits; SQL reads what was written."""
    text = pa.chunked_array([pa.array([TEXT] * 4096, kind)] * 24)
    if kind == pa.large_string():
        text = pa.chunked_array([pa.concat_arrays(text.chunks)])
    ids = pa.array([[n] for n in range(ROWS)], pa.list_(pa.int32()))
    columns = {"prompt_id": NAMES, "text": text, "token_ids": ids, "split": ["train"] * ROWS}
    columns |= {"demonstration": pa.nulls(ROWS), "demonstration_ids": pa.nulls(ROWS)}
    store = Store(tmp_path)
    put(store, "prompts", "8888", [conform(pa.table(columns), PROMPTS), rejects()])
    link(store, "one", prompts=("prompts", "8888"))
    del text, columns

    prompts = store.at("prompts", "8888").read(PROMPTS)
    assert prompts["text"].nbytes > 2**31
    sides = [(f"{name}-0", f"{name}-1") for name in NAMES]
    drawn = [{"prompt_id": side[:6], "candidate_id": side, "token_ids": [1]} for pair in sides for side in pair]
    pairs = [{"prompt_id": a[:6], "chosen_id": a, "rejected_id": b, "weight": 1.0} for a, b in sides]
    rows = examples(prompts, context(tmp_path), table(CANDIDATES, *drawn), table(PAIRS, *pairs))
    assert conform(rows, EXAMPLES)["prompt_id"].to_pylist() == sorted(NAMES)
    del prompts

    catalog = open_catalog(store)
    lengths = catalog.sql("SELECT length(text) AS n, count(*) AS rows FROM prompts GROUP BY ALL").arrow().to_pylist()
    assert lengths == [{"n": len(TEXT), "rows": ROWS}]
    assert sum(batch.num_rows for batch in catalog.sql("SELECT prompt_id, text FROM prompts").batches()) == ROWS
    assert catalog.sql("SELECT prompt_id, text FROM prompts").arrow()["text"].nbytes > 2**31
    with pytest.raises(WinnowError, match=r"more than 2 GiB of text in 65,536 rows; .* left\(text, 1000\)"):
        list(catalog.sql("SELECT repeat('x', 1 << 20) AS text FROM range(2304)").batches())


def test_select_orders_ids_of_more_than_2_gib(tmp_path: Path):
    """As long as ids of 20 letters for a hundred million candidates are together."""
    ids = pa.chunked_array([pa.array([f"{n:02d}{'x' * 2**20}" for n in range(64)][::-1])] * 36)
    names = pa.array([f"p{n // 64:02d}" for n in range(36 * 64)][::-1])
    rewards = pa.table({"prompt_id": names, "candidate_id": ids, "reward": np.arange(36 * 64) % 7.0})
    rule, scale = selection_rule.bind("best_of"), reward_scale.bind("raw")
    rows = select(rewards, context(tmp_path), rule=rule, scale=scale)
    assert rows["prompt_id"].to_pylist() == [f"p{n:02d}" for n in range(36)]
    assert conform(rows, SELECTIONS).num_rows == 36

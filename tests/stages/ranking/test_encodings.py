"""Rankers ask a tokenizer about each text once, and a device or an engine about many prompts at a time."""

from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pytest

from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound, Entry
from schemas import Model
from schemas.tables import CANDIDATES, PROMPTS
from stages.data.tokenizer import Tokenizer
from stages.network.models import reward_head
from stages.ranking.base import PROMPTS_OF_ENGINE, Ranker, prepared_batches
from stages.ranking.compare import compare
from stages.ranking.judge import judge
from stages.ranking.llm_judge import LlmJudge
from stages.ranking.pairwise import PairwiseRanker
from stages.ranking.pointwise import PointwiseRanker
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.sampling.engines import Completion, Engine

N = 8  # candidates of a prompt
TEXTS = {"p0": "Please book a boat.", "p1": "A car for two in Oslo.", "p2": "Please."}


@pytest.fixture
def encoded(monkeypatch) -> Counter[str]:
    """How often a tokenizer encoded each text of the data; not what it asks of its own template."""
    counts: Counter[str] = Counter()
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str) -> list[int]:
        if any(part in text for part in (*TEXTS.values(), "boats")):
            counts[text] += 1
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    return counts


def tables_of(model: Model, drawn_by: Model | None = None) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Prompts, candidates and a baseline, as the tokenizer of the model that drew them has them."""
    tokenizer = Tokenizer(drawn_by or model)
    prompts = [
        dict(prompt_id=name, text=text, token_ids=tokenizer.prompt_ids(text), split="train")
        for name, text in TEXTS.items()
    ]
    sides = []
    for side in "cb":
        rows = []
        for prompt, context in TEXTS.items():
            for k in range(N):
                text = f"{side} {k} boats for {prompt}"
                ids = tokenizer.response_ids(context, text)
                rows.append(dict(prompt_id=prompt, candidate_id=f"{prompt}{side}{k}", k=k, token_ids=ids, text=text,
                                 n_tokens=len(ids), finish_reason="stop", logp_kind="none"))  # fmt: skip
        sides.append(pa.Table.from_pylist(rows, schema=CANDIDATES))
    return pa.Table.from_pylist(prompts, schema=PROMPTS), *sides


def new_context() -> StageContext:
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


def run(stage: str, tables: tuple[pa.Table, pa.Table, pa.Table], model: Model, by: Bound, **options: Any) -> pa.Table:
    ctx = new_context()
    if stage == "reward":
        return reward(*tables[:2], ctx, model, by=by, **options)
    if stage == "compare":
        return compare(*tables[:2], ctx, None, model, by=by, **options)
    return judge(*tables, ctx, model, by=by, **options)


def by_opened(name: str, opened: Ranker) -> Bound:
    """The ranker `name`, open already."""
    return Bound(Entry(name, lambda model, **options: opened, rankers.find(name).metadata), {})


# Pieces of the pairwise ranker: the context, and each text after the mark of each place that it is read in.
PIECES = {
    "both orders": ("reward", {}, 1 + 2 * N),
    "one order": ("reward", {"orders": "one"}, 1 + N),
    "neighbours": ("compare", {}, 1 + 2 * N),
    "tournament": ("compare", {"rule": "tournament"}, 1 + 2 * N),
    "judge": ("judge", {}, 1 + 4 * N),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_pairwise_ranker_encodes_each_piece_once(sharp: Model, encoded: Counter[str], name: str):
    """N texts of a prompt take 1 + 2 N encodings; pieces of each pair, three times, were 9 N - 9."""
    stage, options, expected = PIECES[name]
    tables = tables_of(sharp)
    encoded.clear()
    run(stage, tables, sharp, rankers.bind("pairwise"), **options)
    assert set(encoded.values()) == {1}
    assert len(encoded) == len(TEXTS) * expected


def test_a_question_to_a_chat_model_is_rendered_once(sharp: Model, encoded: Counter[str]):
    """One per pair and order, and another with a probe as its answer, which shows where the prompt ends."""
    tables = tables_of(sharp)
    encoded.clear()
    run("reward", tables, sharp, rankers.bind({"name": "pairwise", "format": "chat"}))
    assert encoded.total() <= len(TEXTS) * (N - 1) * 2 * 2
    assert set(encoded.values()) <= {1}


@pytest.mark.parametrize("has_template", [True, False])
def test_a_reward_model_encodes_a_prompt_once(
    tiny: Model, tmp_path: Path, monkeypatch, encoded: Counter[str], has_template: bool
):
    """And no response that its own tokenizer drew."""
    model = reward_head(tiny, StageContext(tmp_path, WarmCache(), lambda *progress: None))
    if not has_template:
        (model.folder / "chat_template.jinja").unlink()
    tables = tables_of(model)
    encoded.clear()
    run("judge", tables, model, rankers.bind("pointwise"))
    assert not any("boats" in text for text in encoded)
    assert set(encoded.values()) == {1}


@pytest.mark.parametrize("stage", ["reward", "compare", "judge"])
@pytest.mark.parametrize("name", ["pairwise", "pointwise"])
def test_several_prompts_in_a_pass_have_the_numbers_of_each_alone(sharp: Model, tmp_path: Path, stage: str, name: str):
    """As a GPU has them, the next prompts encoded meanwhile in a thread: rows in the same order, equal to rounding."""
    model = sharp if name == "pairwise" else reward_head(sharp, StageContext(tmp_path, WarmCache(), lambda *_: None))
    opened: Any = PairwiseRanker(model, "float32") if name == "pairwise" else PointwiseRanker(model, "float32")
    if name == "pointwise":
        opened.network.score.weight.data.normal_()
    tables = tables_of(model)
    alone = run(stage, tables, model, by_opened(name, opened)).to_pylist()
    opened.prompts_at_once = 2
    together = run(stage, tables, model, by_opened(name, opened)).to_pylist()
    numbers = ("reward", "logit", "logit_ab", "logit_ba")
    assert len(alone) >= len(TEXTS) * N / 2
    assert [[row.pop(key, None) or 0.0 for key in numbers] for row in together] == [
        pytest.approx([row.pop(key, None) or 0.0 for key in numbers], abs=1e-4) for row in alone
    ]
    assert together == alone


def test_the_next_prompts_are_prepared_while_the_device_works():
    """The caller of a batch waits for the preparation of the next, which only another thread can begin."""

    class Ahead(Ranker):
        prompts_at_once, reads_ahead = 2, True

        def fits(self, context, first, second):
            return True

        def logits(self, context, pairs):
            raise NotImplementedError

    begun = {n: Event() for n in range(5)}

    def prepare(n: int) -> int:
        begun[n].set()
        return n

    batches = prepared_batches(Ahead(), range(5), prepare)
    seen = []
    for batch in batches:
        assert begun[min(batch[-1] + 1, 4)].wait(timeout=10)
        seen.append(list(batch))
    assert seen == [[0, 1], [2, 3], [4]]


class CountingEngine(Engine):
    """Engine that votes for A, and counts its calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.answer = tokenizer.encode("A")
        self.calls: list[int] = []

    def generate(self, requests, sampling, progress=None):
        self.calls.append(len(requests))
        return [Completion(self.answer, 0.0, "stop") for _ in requests]


@pytest.mark.parametrize(("stage", "pairs"), [("reward", N - 1), ("compare", N // 2), ("judge", N * N)])
def test_an_engine_is_asked_about_all_prompts_of_a_part_in_one_call(
    tiny: Model, encoded: Counter[str], stage: str, pairs: int
):
    """Not prompt by prompt, which would empty its batch at the end of each; and questions are encoded once."""
    engine = CountingEngine(Tokenizer(tiny))
    opened = LlmJudge(tiny, engine, "{prompt} 1: {a} 2: {b}", 8, 0.0, 0.5, 1.0, 4, 0, 124)
    tables = tables_of(tiny)
    encoded.clear()
    run(stage, tables, tiny, by_opened("llm_judge", opened))
    assert len(TEXTS) <= PROMPTS_OF_ENGINE
    assert engine.calls == [len(TEXTS) * pairs * 8]
    assert set(encoded.values()) == {1}

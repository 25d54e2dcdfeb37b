"""Responses of several turns: which of their ids the assistant wrote, by the template's own renderings."""

import json
from typing import Any

import pytest

from pipeline.context import StageContext, WarmCache
from pipeline.store.fingerprints import DataPath, ModelPath
from schemas import Model
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.tokenizer import Tokenizer
from stages.network.models import model
from tests.conftest import write_jsonl
from tests.families import TEMPLATES, write_chat_model
from tests.jobs.test_walk import CALL, RESULT, TOOL, turn

ASK = turn("user", "What is the time in Rome?")
SYSTEM = turn("system", "Be kind.")
CALLED = [CALL, RESULT, turn("assistant", "It is noon.")]
THOUGHT = [message | {"reasoning_content": "Hm."} if message["role"] == "assistant" else message for message in CALLED]
TALKED = [turn("assistant", "Where?"), turn("user", "In Rome."), turn("assistant", "Noon.")]
SILENT = [turn("assistant", "I do not know."), turn("user", "Why?"), turn("assistant", "No clock.")]


@pytest.fixture(scope="module")
def model_of(unmarked, tmp_path_factory):
    """Return a chat model of a shape, each once."""
    models: dict[str, Model] = {}

    def load(shape: str) -> Model:
        if shape not in models:
            models[shape] = write_chat_model(shape, unmarked, tmp_path_factory.mktemp(shape) / "model")
        return models[shape]

    return load


def key(messages: list[dict[str, Any]] | None) -> str:
    """Return the same text for the same messages, whatever the order of their keys."""
    return json.dumps(messages, sort_keys=True)


def read(owner: Model, tmp_path, rows, **options):
    """Return candidates by their messages as JSON, and the rejects, of rows of preferences."""
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    ctx = StageContext(tmp_path / "step", WarmCache(), lambda *progress: None)
    table, candidates, pairs = preferences(owner, ctx, path=DataPath(str(path)), **options)
    by_chat = {key(json.loads(row["chat"] or "null")): row for row in candidates.to_pylist()}
    return table, by_chat, pairs, [row["reason"] for row in ctx.rejects.to_pylist()]


@pytest.mark.parametrize(
    ("shape", "turns", "tools"),
    [
        ("qwen2", CALLED, [TOOL]),
        ("qwen2", TALKED, None),
        ("llama", CALLED, [TOOL]),
        ("llama", TALKED, None),
        ("gemma", TALKED, None),
        ("qwen3", THOUGHT, [TOOL]),
    ],
)
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_ids_are_those_of_the_conversation_and_the_mask_those_of_single_answers(
    model_of, tmp_path, shape, turns, tools, before
):
    """Every turn's ids after all before it are those of that turn as a response of one turn; the rest is masked."""
    owner, messages = model_of(shape), [*before, ASK]
    rows = [{"prompt": messages, "chosen": turns, "rejected": SILENT[:1], "tools": tools}]
    table, by_chat, pairs, rejects = read(owner, tmp_path, rows)
    assert (rejects, len(pairs)) == ([], 1)
    row, tokenizer = by_chat[key(turns)], Tokenizer(owner)
    prompt_ids = table["token_ids"][0].as_py()
    whole = list(tokenizer.inner.apply_chat_template([*messages, *turns], tools=tools)["input_ids"])
    ids, mask = row["token_ids"], row["mask"]
    assert prompt_ids + ids == whole[: len(prompt_ids + ids)]
    assert not tokenizer.rendered(whole[len(prompt_ids + ids) :]).strip()
    written: list[int] = []
    for n, message in enumerate(turns):
        if message["role"] == "assistant":
            question = [*messages, *turns[:n]]
            asked = tokenizer.inner.apply_chat_template(question, tools=tools, add_generation_prompt=True)
            answered = tokenizer.inner.apply_chat_template([*question, message], tools=tools)["input_ids"]
            answer = list(answered[len(asked["input_ids"]) :])
            written += answer[: max(n for n, token in enumerate(answer, 1) if token in tokenizer.stop)]
    assert [token for token, flag in zip(ids, mask, strict=True) if flag] == written
    assert mask[0]
    assert mask[-1]
    assert not all(mask)
    assert row["n_tokens"] == len(ids)


def test_the_mask_is_that_of_trls_template_with_generation_marks(model_of, tmp_path):
    """transformers' assistant mask, by the template that TRL ships for training on several turns.

    But for the line ends around a turn: the one before is the prompt's, and the sampler draws none after.
    """
    owner = model_of("qwen2")
    tokenizer = Tokenizer(owner)
    turns = [*CALLED, turn("user", "Sure?"), turn("assistant", "Quite.")]
    rows = [{"prompt": [ASK], "chosen": turns, "rejected": "No.", "tools": [TOOL]}]
    table, by_chat, _, _ = read(owner, tmp_path, rows)
    marked = tokenizer.inner.apply_chat_template(
        [ASK, *turns], tools=[TOOL], chat_template=(TEMPLATES / "qwen2_5_training.jinja").read_text(),
        return_assistant_tokens_mask=True, return_dict=True,
    )  # fmt: skip
    row, start = by_chat[key(turns)], len(table["token_ids"][0].as_py())
    length = start + len(row["token_ids"])
    assert marked["input_ids"][:length] == table["token_ids"][0].as_py() + row["token_ids"]
    marks = zip(row["token_ids"], row["mask"], marked["assistant_masks"][start:length], strict=True)
    differing = [(token, ours) for token, ours, theirs in marks if ours != bool(theirs)]
    assert differing
    assert {(tokenizer.rendered([token]), ours) for token, ours in differing} == {("\n", False)}


def test_a_response_of_one_turn_has_no_mask(model_of, tmp_path):
    rows = [{"prompt": [ASK], "chosen": [CALL], "rejected": "No.", "tools": [TOOL]}]
    _, by_chat, _, _ = read(model_of("qwen2"), tmp_path, rows)
    assert {row["mask"] for row in by_chat.values()} == {None}
    assert set(by_chat) == {key(None), key([CALL])}


def test_an_answer_that_both_sides_share_is_part_of_the_prompt_if_one_question_follows(model_of, tmp_path):
    """If they are asked two things after it, it is part of both responses."""
    hello = turn("assistant", "Where?")
    same = [hello, turn("user", "In Rome.")]
    rows = [
        {"prompt": [ASK], "chosen": [*same, turn("assistant", "Noon.")], "rejected": [*same, turn("assistant", "No.")]},
        {"prompt": [SYSTEM, ASK], "chosen": TALKED, "rejected": [hello, turn("user", "Oslo."), same[0]]},
    ]  # fmt: skip
    table, by_chat, _, rejects = read(model_of("llama"), tmp_path, rows)
    assert rejects == []
    assert sorted(len(json.loads(chat)["messages"]) for chat in table["chat"].to_pylist()) == [2, 3]
    assert by_chat.keys() == {key(None), key(TALKED), key(rows[1]["rejected"])}


def test_what_cannot_be_masked_is_rejected_by_name(model_of, tmp_path, tiny):
    """A template that renders an earlier turn otherwise, turns without a user between, a tokenizer without template."""
    thought = turn("assistant", "Where?") | {"reasoning_content": "Hm."}
    cases: list[tuple[str, list[dict[str, Any]], str]] = [
        ("qwen3", CALLED[:2] + TALKED[2:], "renders a turn differently once others follow"),
        ("qwen3", TALKED, "renders a turn differently once others follow"),
        ("qwen3", [thought, *TALKED[1:]], "renders a turn differently once others follow"),
        ("qwen2", [TALKED[0], TALKED[2]], "two turns of the assistant follow each other"),
        ("qwen2", [*TALKED, turn("user", "Thanks.")], "does not begin and end with an assistant turn"),
        ("qwen2", [turn("user", "And?"), TALKED[0]], "does not begin and end with an assistant turn"),
        ("gemma", CALLED, "template"),
        ("qwen2", [turn("assistant", "<|im_end|>"), *TALKED[1:]], "special token"),
        ("qwen2", [TALKED[0], turn("user", "<|im_end|>"), TALKED[2]], "special token"),
    ]
    for shape, turns, reason in cases:
        rows = [{"prompt": [ASK], "chosen": turns, "rejected": "No."}]
        _, _, pairs, rejects = read(model_of(shape), tmp_path, rows)
        assert len(pairs) == 0
        assert len(rejects) == 1
        assert reason in rejects[0]
    prefix = turn("assistant", "In")
    rows = [{"prompt": [ASK, prefix], "chosen": TALKED, "rejected": "No."}]
    _, _, _, rejects = read(model_of("qwen2"), tmp_path, rows, prefill="continue")
    assert rejects == ["a response of several turns cannot continue a turn of the prompt"]


def test_responses_with_rewards_have_masks_and_demonstrations_of_several_turns_are_rejected(model_of, tmp_path):
    rows = [{"prompt": [ASK], "response": TALKED, "reward": 1.0, "answer": TALKED}]
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", rows)))
    ctx = StageContext(tmp_path / "step", WarmCache(), lambda *progress: None)
    _, candidates, _ = own_candidates(model_of("llama"), ctx, path=path, reward="reward")
    assert any(candidates["mask"][0].as_py())
    assert ctx.rejects.num_rows == 0
    table = prompts(model_of("llama"), ctx, path=path, demonstration="answer")
    assert table["demonstration_ids"].to_pylist() == [None]
    assert "demonstration of several turns" in ctx.rejects["reason"][0].as_py()


def test_a_response_that_is_cut_keeps_as_much_of_its_mask(model_of, tmp_path):
    turns = [*TALKED[:2], turn("assistant", "Noon, I think. " * 40)]
    rows = [{"prompt": [ASK], "chosen": turns, "rejected": "No."}]
    _, whole, _, _ = read(model_of("llama"), tmp_path, rows)
    row = whole[key(turns)]
    size = len(row["token_ids"]) - 2
    _, cut, pairs, _ = read(model_of("llama"), tmp_path, rows, max_tokens=size, too_long="cut")
    assert len(pairs) == 1
    assert cut[key(turns)]["mask"] == row["mask"][:size]
    assert cut[key(turns)]["finish_reason"] == "length"
    _, _, pairs, rejects = read(model_of("llama"), tmp_path, rows, max_tokens=size)
    assert rejects == ["response too long"]


def test_the_template_options_of_the_model_hold_in_every_turn(unmarked, tmp_path):
    """With thinking off, Qwen3 asks with an empty thought, which earlier turns lack: still rejected by name."""
    own = write_chat_model("qwen3", unmarked, tmp_path / "own")
    ctx = StageContext(tmp_path / "copy", WarmCache(), lambda *progress: None)
    quick = model(ctx, path=ModelPath(str(own.folder)), chat_template_kwargs={"enable_thinking": False})
    _, _, _, rejects = read(quick, tmp_path, [{"prompt": [ASK], "chosen": TALKED, "rejected": "No."}])
    assert len(rejects) == 1
    assert "once others follow" in rejects[0]

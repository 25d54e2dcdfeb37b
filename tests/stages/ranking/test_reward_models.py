"""Reward models: a score at each response's last token, made from a policy, trained, saved, and read as a ranker."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.context import StageContext, WarmCache
from pipeline.store.fingerprints import DataPath, ModelPath, model_digest
from schemas import Model, WinnowError, WinnowWarning, conform
from schemas.tables import CANDIDATES, EXAMPLES, PROMPTS
from stages.data.preferences import preferences
from stages.data.prompts import chat_json
from stages.data.texts import Conversation, readable
from stages.data.tokenizer import Tokenizer
from stages.model_config import SCORED_AT_END
from stages.network.forward import completion_scores
from stages.network.load import is_reward_model, load_network, save_network
from stages.network.models import reward_head
from stages.ranking.base import Response
from stages.ranking.compare import compare
from stages.ranking.judge import judge
from stages.ranking.ranker_examples import ranker_examples
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.training.optimize import optimize
from tests.conftest import write_jsonl
from tests.families import write_chat_model
from tests.material import alone
from tests.stages.ranking.test_rankers import BAD, CONTEXT, GOOD, LONG, candidates_with, one_prompt, words

LIMIT = 1e-4
few = settings(deadline=None, max_examples=25)
ids = st.lists(st.integers(0, 300), min_size=1, max_size=12)
PAD = 2  # of the tiny model; transformers' own forward would step back over one at the end of a row
rows_of = st.lists(st.tuples(ids, ids.filter(lambda row: row[-1] != PAD)), min_size=1, max_size=6)


def headed(policy, folder):
    """`policy` with a score instead of its vocabulary, as the pipeline makes it."""
    model = reward_head(policy, StageContext(folder, WarmCache(), lambda *progress: None))
    return Model(model.folder, model_digest(model.folder))


@pytest.fixture(scope="module")
def fresh(tiny, tmp_path_factory):
    return headed(tiny, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def opinionated(tiny, tmp_path_factory):
    """The tiny model with larger weights and a random head: scores lie units apart, ten thousand times LIMIT."""
    init = headed(tiny, tmp_path_factory.mktemp("head"))
    network = load_network(init)
    with torch.no_grad():
        for weight in network.model.parameters():
            if weight.dim() == 2:
                weight.mul_(3)
        network.score.weight.copy_(torch.randn(network.score.weight.shape, generator=torch.Generator().manual_seed(3)))
    model = save_network(network, init, tmp_path_factory.mktemp("opinionated") / "model")
    return Model(model.folder, model_digest(model.folder))


@pytest.fixture(scope="module")
def network(opinionated):
    return load_network(opinionated)


@torch.inference_mode()
def scores(network, rows):
    return completion_scores(network, alone(rows), "float32").tolist()


@torch.inference_mode()
def naive(network, prompt, response):
    """One row, no padding: transformers' own forward, whose last token is then the row's."""
    return float(network(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, 0])


def test_a_fresh_head_scores_zero_and_keeps_the_policys_weights(tiny, fresh):
    """Same backbone bit for bit, one label, no vocabulary left, tokenizer and template there, safetensors only."""
    policy, rewarding = load_network(tiny), load_network(fresh)
    theirs, ours = policy.model.state_dict(), rewarding.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert scores(rewarding, [([3, 4], [5]), ([3], [7, 8, 9])]) == [0.0, 0.0]
    assert rewarding.config.num_labels == 1
    assert not hasattr(rewarding, "lm_head")
    assert Tokenizer(fresh).prompt_ids("Hello there.") == Tokenizer(tiny).prompt_ids("Hello there.")
    ModelPath(str(fresh.folder))
    assert {file.suffix for file in fresh.folder.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt", ".md"}


def test_the_folder_is_what_transformers_calls_a_sequence_classifier(fresh):
    """AutoModelForSequenceClassification loads it with no weight missing and none left over."""
    config = json.loads((fresh.folder / "config.json").read_text())
    assert config[SCORED_AT_END] is True  # as all that is trained from it
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    _, info = AutoModelForSequenceClassification.from_pretrained(fresh.folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_kind_of_a_model_is_read_from_its_config_or_its_class(tiny, fresh):
    for model, expected in ((tiny, False), (fresh, True)):
        assert is_reward_model(model) == is_reward_model(load_network(model)) == expected


@few
@given(rows=rows_of)
def test_a_score_is_that_of_the_row_alone(network, rows):
    """Right padding, and ids 0 and 2 (the padding here, the config's pad token) inside a row, change nothing."""
    assert scores(network, rows) == [pytest.approx(naive(network, *row), rel=0, abs=LIMIT) for row in rows]


def test_a_last_token_that_is_the_pad_token_is_read_all_the_same(network):
    """transformers would step back over it: a response that ends in EOS would lose it where EOS is the pad token."""
    assert network.config.pad_token_id == PAD
    with_pad, without = scores(network, [([5, 6], [7, PAD])]), scores(network, [([5, 6], [7])])
    assert abs(with_pad[0] - without[0]) > 1e-2


def test_transformers_reads_the_same_scores_from_a_padded_batch(tiny, tmp_path):
    """A policy without pad token, or with EOS for it: its reward model has another, in config and tokenizer."""
    for name, pad in (("none", None), ("eos", "<|eos|>")):
        folder = Path(shutil.copytree(tiny.folder, tmp_path / name))
        for file, value in (
            ("config.json", {"pad_token_id": pad and 1}),
            ("tokenizer_config.json", {"pad_token": pad}),
        ):
            (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | value))
        model = headed(Model(folder, name), tmp_path / f"{name} head")
        network, tokenizer = load_network(model), Tokenizer(model).inner
        assert network.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        network.score.weight.data.normal_()
        rows = [([5, 6], [7, 1]), ([5, 6, 8, 9], [10, 1])]
        padded = torch.full((2, 6), tokenizer.pad_token_id)
        for n, (prompt, response) in enumerate(rows):
            padded[n, : len(prompt + response)] = torch.tensor(prompt + response)
        with torch.inference_mode():
            by_transformers = network(input_ids=padded, attention_mask=padded != tokenizer.pad_token_id).logits[:, 0]
        assert by_transformers.tolist() == pytest.approx(scores(network, rows), abs=LIMIT)


@pytest.mark.parametrize("pad", [None, "<|eos|>"])
def test_a_reward_model_of_a_users_own_gets_a_pad_token_where_it_is_saved(opinionated, tmp_path, pad):
    """One that came without pad token, or with EOS for it, has another in config and tokenizer once it is trained."""
    folder = Path(shutil.copytree(opinionated.folder, tmp_path / "own"))
    for file, value in (("config.json", {"pad_token_id": pad and 1}), ("tokenizer_config.json", {"pad_token": pad})):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | value))
    own = Model(folder, "own")
    saved = save_network(load_network(own, train=True), own, tmp_path / "saved" / "model")
    tokenizer = Tokenizer(saved).inner
    config = json.loads((saved.folder / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id is not None
    assert tokenizer.chat_template == Tokenizer(own).inner.chat_template


@few
@given(rows=rows_of, long=st.tuples(st.lists(st.integers(5, 300), min_size=30, max_size=60), ids), order=st.randoms())
def test_a_score_does_not_depend_on_its_batch(network, rows, long, order):
    """Alone, shuffled, beside a much longer row: the same to 1e-4."""
    single = [scores(network, [row])[0] for row in rows]
    indices = list(range(len(rows)))
    order.shuffle(indices)
    assert scores(network, [rows[n] for n in indices]) == pytest.approx([single[n] for n in indices], rel=0, abs=LIMIT)
    assert scores(network, [*rows, long])[:-1] == pytest.approx(single, rel=0, abs=LIMIT)


def test_bfloat16_keeps_the_head_in_fp32(network):
    """autocast moves the hidden state by parts in 2^8; the score itself is not rounded to bfloat16."""
    row = ([7, 40, 91], [13, 60, 4, 88])
    with torch.inference_mode():
        low = completion_scores(network, alone([row]), "bfloat16")
    assert low.dtype == torch.float32
    assert low.item() != naive(network, *row)
    assert low.item() == pytest.approx(naive(network, *row), rel=0.1, abs=0.3)
    assert low.item() != low.bfloat16().item()


def test_a_few_steps_of_bradley_terry_learn_a_preference(fresh):
    """-log s(s(chosen) - s(rejected)), AdamW: ln 2 at the zero head, near 0 after; it carries over to new prompts."""
    network = load_network(fresh, train=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    good, bad = [40, 41, 42, 1], [50, 51, 1]
    rows = [([n, n + 1], answer) for n in range(100, 116) for answer in (good, bad)]
    losses = []
    for _ in range(12):
        chosen, rejected = completion_scores(network, alone(rows), "float32").view(-1, 2).T
        loss = -logsigmoid(chosen - rejected).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.05
    better, worse = scores(network.eval(), [([150, 7], good), ([150, 7], bad)])
    assert better > worse + 1


def test_a_trained_reward_model_is_saved_and_read_again(opinionated, network, tmp_path):
    """Every weight of the head and the backbone, bit for bit."""
    saved = save_network(network, opinionated, tmp_path / "model")
    again = load_network(saved)
    weights = dict(network.named_parameters())
    assert weights.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(weights[name], weight) for name, weight in again.named_parameters())
    assert json.loads((saved.folder / "config.json").read_text())[SCORED_AT_END] is True
    assert again.score.weight.abs().max() > 1


def test_the_head_keeps_the_policys_dtype_on_disk(tiny, tmp_path):
    """A bfloat16 policy makes a bfloat16 reward model, read in fp32 as all are."""
    half = tmp_path / "half"
    shutil.copytree(tiny.folder, half)
    load_network(tiny).to(torch.bfloat16).save_pretrained(half)
    model = headed(Model(half, "half"), tmp_path)
    assert json.loads((model.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_network(model).parameters()} == {torch.float32}


def test_another_architecture_has_its_head_too(tiny, tmp_path):
    """GPT-2 calls its layers `transformer`: nothing here knows a family's names."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny.folder, folder)
    (folder / "config.json").unlink()
    size = len(Tokenizer(tiny).inner)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)
    network = load_network(headed(Model(folder, "gpt2"), tmp_path))
    with torch.no_grad():
        network.score.weight.normal_()
    rows = [([3, 4, 5], [6]), ([7], [8, 9])]
    assert scores(network, rows) == pytest.approx([naive(network, *row) for row in rows], abs=LIMIT)


def test_what_is_no_policy_has_no_head_put_on_it(fresh, tiny, tmp_path):
    """A reward model has one already; a classifier of three classes is none."""
    with pytest.raises(WinnowError, match="ends in a score already"):
        headed(fresh, tmp_path)
    classes = tmp_path / "classes"
    shutil.copytree(fresh.folder, classes)
    labels = {"id2label": {str(n): str(n) for n in range(3)}, "label2id": {str(n): n for n in range(3)}}
    config = json.loads((classes / "config.json").read_text()) | labels
    (classes / "config.json").write_text(json.dumps(config))
    AutoModelForSequenceClassification.from_pretrained(tiny.folder, num_labels=3).save_pretrained(classes)
    with pytest.raises(WinnowError, match="with 3 labels is no reward model"):
        load_network(Model(classes, "classes"))


# As a ranker


@pytest.fixture(scope="module")
def ranker(opinionated):
    return open_ranker(rankers.bind("pointwise"), opinionated)


pairs_of = st.lists(st.tuples(words, words), min_size=1, max_size=6)


def read_pairs(ranker, context, pairs):
    """Return what a ranker reads of pairs of texts."""
    return [tuple(ranker.read(context, Response(text)) for text in pair) for pair in pairs]


@few
@given(context=words, pairs=pairs_of, budget=st.sampled_from([1, 60, 16_384]))
def test_a_logit_is_the_difference_of_two_scores(ranker, network, context, pairs, budget):
    """s(prompt_ids, response_ids with EOS), each row alone; whatever the budget cuts into batches."""
    tokenizer = ranker.tokenizer
    prompt = tokenizer.prompt_ids(context)
    score = {text: naive(network, prompt, tokenizer.response_ids(context, text)) for pair in pairs for text in pair}
    with mock.patch.object(ranker, "budget", budget):
        logits = ranker.logits(context, read_pairs(ranker, context, pairs))
    assert logits.tolist() == pytest.approx([score[a] - score[b] for a, b in pairs], abs=2 * LIMIT)


@few
@given(context=words, pairs=pairs_of, order=st.randoms())
def test_swaps_and_order_change_no_bit(ranker, context, pairs, order):
    """g(a, b) = -g(b, a), g(a, a) = 0, g(a, b) + g(b, c) = g(a, c): a score, not an opinion on positions."""
    (a, b), c = pairs[0], GOOD
    triangle = read_pairs(ranker, context, [(a, b), (b, c), (a, c), (a, a)])
    pairs = read_pairs(ranker, context, pairs)
    logits = ranker.logits(context, pairs)
    assert ranker.logits(context, [(b, a) for a, b in pairs]).tolist() == (-logits).tolist()
    indices = list(range(len(pairs)))
    order.shuffle(indices)
    assert ranker.logits(context, [pairs[n] for n in indices]).tolist() == logits[indices].tolist()
    ab, bc, ac, aa = ranker.logits(context, triangle)
    assert ab + bc == pytest.approx(ac, abs=2 * LIMIT)
    assert aa == 0


def test_a_constant_added_to_all_scores_cancels(ranker):
    """The scale of a reward model has no zero: a bias of its head changes no logit (to rounding)."""
    pairs = read_pairs(ranker, CONTEXT, [(GOOD, BAD), (GOOD, LONG)])
    before = ranker.logits(CONTEXT, pairs)
    assert np.abs(before).min() > 1e-2
    with mock.patch.dict(ranker.network.score._parameters, bias=torch.nn.Parameter(torch.tensor([7.0]))):
        assert ranker.logits(CONTEXT, pairs).tolist() == pytest.approx(before.tolist(), abs=2 * LIMIT)


def test_a_reward_model_reads_what_fits_and_no_control_tokens(ranker):
    ((good, bad), (long, _)) = read_pairs(ranker, CONTEXT, [(GOOD, BAD), ("q " * 120, GOOD)])
    assert ranker.fits(CONTEXT, good, bad)
    assert not ranker.fits(CONTEXT, good, long)
    with pytest.raises(ValueError, match="special token"):
        ranker.read(CONTEXT, Response("Well <|pad|>"))
    assert ranker.symmetric
    assert ranker.logits(CONTEXT, []).shape == (0,)


def test_the_reward_is_the_models_own_score(opinionated, ranker):
    """s(y), each alone, equal texts once and none against a baseline; what does not fit is left out with reason."""
    table = candidates_with([GOOD, BAD, GOOD, "q " * 120])
    ctx = StageContext(Path("unused"), WarmCache(), lambda *progress: None)
    rows = reward(one_prompt(), table, ctx, opinionated, by=rankers.bind("pointwise")).to_pylist()
    tokenizer, context = ranker.tokenizer, one_prompt().column("text")[0].as_py()
    prompt = tokenizer.prompt_ids(context)
    good, bad = (naive(ranker.network, prompt, tokenizer.response_ids(context, text)) for text in (GOOD, BAD))
    assert abs(good - bad) > 1e-2
    assert [row["candidate_id"] for row in rows] == ["c0", "c1", "c2"]
    assert [row["reward"] for row in rows] == pytest.approx([good, bad, good], rel=0, abs=LIMIT)
    assert rows[0]["reward"] == rows[2]["reward"]
    assert {row["baseline_id"] for row in rows} == {None}
    assert ctx.counters["ranker_calls"] == 2
    (reject,) = ctx.rejects.to_pylist()
    assert (reject["candidate_id"], reject["reason"]) == ("c3", "does not fit the ranker")


# The ids that the policy read and drew


def rewards_of(
    ids, text, opinionated, tokenizer, *, prompt="Please book a boat.", chat=None, prompt_ids=None, finish="stop"
):
    """Return the reward of one drawn response to a prompt, by the stage."""
    prompt_ids = prompt_ids or tokenizer.prompt_ids(prompt)
    table = pa.Table.from_pylist(
        [one_prompt().to_pylist()[0] | dict(text=prompt, chat=chat, token_ids=prompt_ids)], PROMPTS
    )
    (row,) = candidates_with([text]).to_pylist()
    candidates = pa.Table.from_pylist([row | dict(token_ids=ids, finish_reason=finish)], CANDIDATES)
    ctx = StageContext(Path("unused"), WarmCache(), lambda *progress: None)
    return reward(table, candidates, ctx, opinionated, by=rankers.bind("pointwise"))["reward"].to_pylist()


@pytest.mark.filterwarnings("ignore:reward. more than 10 %")
def test_a_response_cut_at_max_tokens_is_scored_without_an_eos(opinionated, ranker, network):
    """The policy wrote none: the score after an EOS is another one."""
    tokenizer = ranker.tokenizer
    prompt, ids = tokenizer.prompt_ids("Please book a boat."), tokenizer.encode("Gladly. I have booked a")
    (score,) = rewards_of(ids, "Gladly. I have booked a", opinionated, tokenizer, finish="length")
    assert score == pytest.approx(naive(network, prompt, ids), abs=LIMIT)
    assert abs(score - naive(network, prompt, [*ids, 1])) > 1e-2


@pytest.mark.parametrize("stage", [reward, compare, judge])
def test_many_cut_responses_are_counted_and_warned_of(opinionated, stage):
    """More than a tenth of a part's, by more than chance, with the cure; a fifth of ten is only counted."""
    rows = candidates_with([*"abcdefghij"]).to_pylist()
    for cut in (2, 3):
        endings = ["length"] * cut + ["stop"] * (10 - cut)
        ended = [row | {"finish_reason": ending} for row, ending in zip(rows, endings, strict=True)]
        table = pa.Table.from_pylist(ended, CANDIDATES)
        ctx = StageContext(Path("unused"), WarmCache(), lambda *progress: None)
        tables = (one_prompt(), table, table) if stage is judge else (one_prompt(), table)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", WinnowWarning)
            stage(*tables, ctx=ctx, ranker=opinionated, by=rankers.bind("pointwise"))
        texts = [str(note.message) for note in notes if "max_tokens" in str(note.message)]
        assert ctx.counters["cut_responses"] == cut * (2 if stage is judge else 1)
        assert len(texts) == (cut == 3)
    facts = (f"{stage.__name__}: ", "10 %", "last token", "`max_tokens`", "cut_responses")
    assert [fact for fact in facts if fact not in texts[0]] == []
    assert ("`finished: true`" in texts[0]) == (stage is not judge)  # which makes no pairs


def test_a_cut_response_that_does_not_fit_is_not_counted_as_scored(opinionated, ctx):
    rows = candidates_with([*"abcdefghij"]).to_pylist()
    long = {"finish_reason": "length", "text": "boat " * 200}
    table = pa.Table.from_pylist([rows[0] | long, rows[1] | long, *rows[2:]], CANDIDATES)
    rewards = reward(one_prompt(), table, ctx=ctx, ranker=opinionated, by=rankers.bind("pointwise"))
    assert (rewards.num_rows, ctx.rejects.num_rows, ctx.counters["cut_responses"]) == (8, 2, 0)


def test_drawn_ids_are_scored_and_not_the_ids_of_their_text(opinionated, ranker, network):
    """A policy may spell a word in letters, where the tokenizer has one id; equal texts then have two scores."""
    tokenizer = ranker.tokenizer
    prompt, usual = tokenizer.prompt_ids("Please book a boat."), tokenizer.encode("boat")
    spelled = [token for letter in "boat" for token in tokenizer.encode(letter)]
    assert usual != spelled
    assert tokenizer.decode(usual) == tokenizer.decode(spelled)
    for ids in (usual, spelled):
        (score,) = rewards_of([*ids, 1], "boat", opinionated, tokenizer)
        assert score == pytest.approx(naive(network, prompt, [*ids, 1]), abs=LIMIT)
    hi = tuple(tokenizer.prompt_ids("Hi"))
    first, second = (ranker.read("Hi", Response("boat", (*ids, 1), "stop", hi)) for ids in (usual, spelled))
    (scores,) = ranker.scores([("Hi", [first, second, first])])
    assert len(scores) == 2
    assert scores[first] != scores[second]


def test_a_special_token_inside_a_response_is_scored(opinionated, ranker, network):
    """The text does not show it; the ids do, with `special_tokens` and without."""
    tokenizer = ranker.tokenizer
    prompt, ids = tokenizer.prompt_ids("Please book a boat."), [*tokenizer.encode("No."), 3, *tokenizer.encode("Hi"), 1]
    assert ids[:-1] != tokenizer.encode(tokenizer.decode(ids))
    (score,) = rewards_of(ids, tokenizer.decode(ids), opinionated, tokenizer)
    assert score == pytest.approx(naive(network, prompt, ids), abs=LIMIT)
    raw_text = tokenizer.decode(ids[:-1], special_tokens=True)
    assert ranker.read("Hi", Response(raw_text, tuple(ids), "stop", tuple(tokenizer.prompt_ids("Hi"))))[1] == tuple(ids)


@pytest.mark.filterwarnings("ignore:reward. more than 10 %")
def test_a_response_of_another_tokenizer_is_read_as_text(opinionated, ranker, network):
    """Its ids say something else here, or nothing: the text is encoded, with EOS unless it was cut."""
    tokenizer = ranker.tokenizer
    prompt, ids = tokenizer.prompt_ids("Please book a boat."), tokenizer.encode(GOOD)
    for others in ([7, 8, 9], [100_000], []):
        (whole,) = rewards_of(others, GOOD, opinionated, tokenizer, prompt_ids=[7, 8])
        (cut,) = rewards_of(others, GOOD, opinionated, tokenizer, prompt_ids=[7, 8], finish="length")
        assert whole == pytest.approx(naive(network, prompt, [*ids, 1]), abs=LIMIT)
        assert cut == pytest.approx(naive(network, prompt, ids), abs=LIMIT)


def test_a_prompt_of_several_turns_is_read_by_the_models_own_template(opinionated, ranker, network):
    """Not as one turn of a user that quotes them, whether the policy read the same ids or others."""
    tokenizer = ranker.tokenizer
    turns = [("user", "Hi."), ("assistant", "Yes?\nGladly."), ("user", "A boat: for two.\n")]
    messages = [dict(role=role, content=content) for role, content in turns]
    ids = tokenizer.prompt_ids(messages)
    text = readable(messages)
    assert ids != tokenizer.prompt_ids(text)
    response = [*tokenizer.encode(GOOD), 1]
    chat = chat_json(messages, None)
    for policy_ids in (ids, [5, 6]):
        (score,) = rewards_of(response, GOOD, opinionated, tokenizer, prompt=text, chat=chat, prompt_ids=policy_ids)
        assert score == pytest.approx(naive(network, ids, response), abs=LIMIT)


def test_a_reward_model_answers_no_questions(fresh):
    for name in ("pairwise", "llm_judge"):
        with pytest.raises(WinnowError, match=f"outputs a score.*by: {name}.*set `by` to `pointwise`"):
            open_ranker(rankers.bind(name), fresh)


def test_a_reward_model_with_a_tokenizer_of_its_own_is_trained_on_what_it_will_read(unmarked, ctx, tmp_path):
    """Pairs in its own template, up to what that writes behind the last turn, which is where it is scored.

    So training begins with the loss of its own scores. The ids of the policy would be other tokens in it, and the
    labels of a pairwise ranker no responses.
    """
    policy = write_chat_model("qwen2", unmarked, tmp_path / "policy")
    model = write_chat_model("gemma", unmarked, tmp_path / "reward", score=True)
    asked: list[Any] = [[{"role": "user", "content": f"What is the time in hall {n}?"}] for n in range(24)]
    data: list[dict[str, Any]] = [
        {"prompt": chat, "chosen": f"It is {n}, dear.", "rejected": f"{n}!"} for n, chat in enumerate(asked)
    ]
    path = DataPath(str(write_jsonl(tmp_path / "pairs.jsonl", data)))
    prompts, candidates, pairs = preferences(policy, ctx, path=path, reader="columns", heldout=0.0)
    examples = ranker_examples(prompts, candidates, pairs, model, ctx)

    tokenizer = Tokenizer(model)
    assert tokenizer.after_end  # a line end
    expected = {
        tuple(tokenizer.conversation_ids(Conversation(row["prompt"]), row[side], after_end=True)): side
        for row in data
        for side in ("chosen", "rejected")
    }
    sides = []
    for group in examples.to_pylist():
        (pair,) = group["pairs"]
        assert (pair["chosen"], pair["rejected"]) == (0, 1)
        sides += [expected[(*group["prompt_ids"], *response["token_ids"])] for response in group["responses"]]
    assert sides == ["chosen", "rejected"] * len(data)

    def margins(scorer: Model) -> torch.Tensor:
        rewards = reward(prompts, candidates, ctx, scorer, by="pointwise").to_pylist()
        score = {row["candidate_id"]: row["reward"] for row in rewards}
        return torch.tensor([score[pair["chosen_id"]] - score[pair["rejected_id"]] for pair in pairs.to_pylist()])

    trained, _, metrics, *_ = optimize(
        model, conform(examples, EXAMPLES), ctx, objective="sigmoid", learning_rate=1e-2, epochs=12, batch_size=24,
        lr_scheduler_type="constant",
    )  # fmt: skip
    first = next(row["value"] for row in metrics.to_pylist() if (row["step"], row["metric"]) == (1, "loss"))
    assert first == pytest.approx(-logsigmoid(margins(model)).mean().item(), abs=1e-4)
    assert (margins(trained) > 0).float().mean() > 0.9
    assert SCORED_AT_END not in json.loads((trained.folder / "config.json").read_text()), "it is scored where it was"

"""The pairwise ranker: one shared prefix gives the numbers of plain forwards; orders, labels, training examples."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.content import DataPath
from pipeline.workspace import Warm, Workspace
from schemas import WinnowError, conform
from schemas.tables import EXAMPLES
from stages.preferences import preferences
from stages.ranker_examples import ranker_examples
from stages.rankers import LABELS, PairwiseRanker, RankerPrompt, _common_prefix, both_orders
from stages.text import Tokenizer

CONTEXT = "Please book a boat for two on Monday in Oslo."
GOOD, BAD, LONG = "Gladly. I have booked a boat.", "No.", "Um, a boat? Well, a car for two on Sunday in Cairo."
words = st.lists(st.sampled_from(["boat", "Oslo", "a", "Gladly.", "é", "two"]), min_size=1, max_size=6).map(" ".join)
pairs_of = st.lists(st.tuples(words, words), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def ranker(sharp):
    return PairwiseRanker(sharp, "float32", 16_384)


@torch.inference_mode()
def plain(ranker, context, first, second):
    """One whole sequence, no cache, no padding: logit[A] - logit[B] at its last position."""
    ids = ranker.prompt.ids(context, first, second)
    last = ranker.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    a, b = (ranker.prompt.tokenizer.encode(label)[0] for label in LABELS)
    return float(last[a] - last[b])


@pytest.mark.parametrize(
    "pairs",
    [
        [(GOOD, BAD)],
        [(GOOD, BAD), (GOOD, LONG), (GOOD, GOOD + LONG), (GOOD, "x")],
        [(GOOD, BAD)] * 3,
        [(GOOD, GOOD), (BAD, BAD)],
        [(GOOD, BAD), (BAD, GOOD), (LONG, "x"), ("1", LONG)],
        [(GOOD, BAD), (GOOD, BAD + " No.")],
    ],
    ids=["one pair", "ragged", "identical", "same on both sides", "nothing but the context", "one begins the other"],
)
def test_shared_prefix_logits_are_those_of_plain_forwards(ranker, pairs):
    """The context (and the first response, where it is one) goes through once; the number is the same to 1e-4 nats."""
    wanted = [plain(ranker, CONTEXT, *pair) for pair in pairs]
    assert ranker.logits(CONTEXT, pairs).tolist() == pytest.approx(wanted, rel=0, abs=1e-4)


def test_the_ranker_of_these_tests_can_tell_texts_apart(ranker):
    """Else agreement to 1e-4 would say nothing: ten texts lie 1e-2 nats or more apart, a hundred times that."""
    spread = ranker.logits(CONTEXT, [(GOOD, f"{n} boats") for n in range(10)])
    assert spread.std() > 1e-2


@settings(deadline=None, max_examples=25)
@given(context=words, pairs=pairs_of, budget=st.sampled_from([1, 40, 16_384]))
def test_a_logit_depends_on_its_pair_alone(sharp, ranker, context, pairs, budget):
    """Neither on the pairs beside it nor on how the budget cuts them into batches."""
    wanted = [plain(ranker, context, *pair) for pair in pairs]
    ranker.budget, before = budget, ranker.budget
    try:
        found = ranker.logits(context, pairs)
    finally:
        ranker.budget = before
    assert found.tolist() == pytest.approx(wanted, rel=0, abs=1e-4)


def test_no_pairs_have_no_logits(ranker):
    """An empty group is no error."""
    assert ranker.logits(CONTEXT, []).shape == (0,)
    assert [len(side) for side in both_orders(ranker, CONTEXT, [], "both")] == [0, 0]


class Biased(PairwiseRanker):
    """A ranker with a preference for the first position: logits = truth + bias. Eighths, so that sums are exact."""

    def __init__(self, strength, bias):
        self.strength, self.bias = strength, bias

    def logits(self, context, pairs):
        return np.array([self.strength[a] - self.strength[b] + self.bias for a, b in pairs])


@given(
    st.lists(st.integers(-800, 800).map(lambda n: n / 8), min_size=2, max_size=6),
    st.integers(-8000, 8000).map(lambda n: n / 8),
)
def test_both_orders_cancel_a_constant_position_bias_exactly(strengths, bias):
    """[g + b] and -[-g + b]: their mean is g, for every b; one order alone keeps b, and says that it is one."""
    strength = {str(n): value for n, value in enumerate(strengths)}
    pairs = [(a, b) for a in strength for b in strength]
    truth = [strength[a] - strength[b] for a, b in pairs]
    forward, backward = both_orders(Biased(strength, bias), "", pairs, "both")
    assert ((forward + backward) / 2).tolist() == truth
    alone, nothing = both_orders(Biased(strength, bias), "", pairs, "one")
    assert alone.tolist() == [gap + bias for gap in truth]
    assert np.isnan(nothing).all()


def test_both_orders_of_the_real_ranker_are_antisymmetric(ranker):
    """With both orders read, g(a, b) = -g(b, a): the two texts only change places."""
    there = np.mean(both_orders(ranker, CONTEXT, [(GOOD, LONG), (BAD, LONG)], "both"), axis=0)
    back = np.mean(both_orders(ranker, CONTEXT, [(LONG, GOOD), (LONG, BAD)], "both"), axis=0)
    assert there.tolist() == pytest.approx((-back).tolist(), rel=0, abs=1e-4)


@given(
    st.lists(st.integers(0, 3), max_size=6), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=5)
)
def test_the_common_prefix_is_the_longest_that_leaves_every_row_a_token(head, tails):
    """max n with row[:n] equal in all rows and n < len(row) for every row."""
    rows = [head + tail for tail in tails]
    fitting = [
        n
        for n in range(min(map(len, rows), default=1))
        if len({tuple(row[:n]) for row in rows}) <= 1 and all(n < len(row) for row in rows)
    ]
    assert _common_prefix(rows) == max(fitting)


def test_labels_are_single_tokens_and_a_tokenizer_without_them_is_refused(tiny):
    """The answer is one token, so that a logit is one forward pass."""
    prompt = RankerPrompt(tiny)
    assert [prompt.tokenizer.decode([label]) for label in prompt.labels] == list(LABELS)
    assert len(set(prompt.labels)) == 2
    with pytest.raises(WinnowError, match=r"'A B' is \d tokens.*needs one"):
        Tokenizer(tiny).label("A B")


def test_the_rankers_ids_are_the_marked_text_in_one_order(tiny):
    """BOS once, then the three pieces; equal beginnings are equal ids whatever follows."""
    prompt = RankerPrompt(tiny)
    ids = prompt.ids("x", "one", "two")
    shown = prompt.tokenizer.inner.decode(ids)
    assert shown.index("[CONTEXT]") < shown.index("[RESPONSE A]") < shown.index("one") < shown.index("[RESPONSE B]")
    assert ids.count(prompt.tokenizer.inner.bos_token_id) == 1
    other = prompt.ids("x", "one", "owt, two")
    mark = prompt.tokenizer.encode("[RESPONSE B]")[0]
    cut = ids.index(mark) + 1
    assert ids[:cut] == other[:cut]


def test_what_does_not_fit_is_known_beforehand(ranker):
    """128 tokens: a short comparison fits, one of a hundred words does not."""
    assert ranker.fits(CONTEXT, GOOD, BAD)
    assert not ranker.fits(CONTEXT, GOOD, "q " * 120)


@pytest.fixture(scope="module")
def labelled(tiny, world):
    space = Workspace(world, Warm(), lambda done, total, unit: None)
    return preferences(tiny, space, path=DataPath(str(world / "preferences.jsonl")), heldout=0.3)


def made(labelled, tiny, ws, **options):
    return conform(ranker_examples(*labelled, tiny, ws, **options), EXAMPLES).to_pylist()


def test_ranker_examples_flip_about_half_and_label_the_side_of_the_chosen(tiny, labelled, ws):
    """Each row reads (chosen, rejected) with label A, or (rejected, chosen) with label B; P(flip) = 1/2 by hash.

    Of n fair flips, more than 4 sd from n / 2 has probability below 1e-4; over 8 seeds there are some hundreds.
    """
    prompts, candidates, pairs = labelled
    text = {row["candidate_id"]: row["text"] for row in candidates.to_pylist()}
    context = {row["prompt_id"]: row["text"] for row in prompts.to_pylist()}
    rejected = {(row["prompt_id"], row["chosen_id"]): row["rejected_id"] for row in pairs.to_pylist()}
    reader = RankerPrompt(tiny)
    flips = []
    for seed in range(8):
        for row in made(labelled, tiny, ws, seed=seed):
            (answer,) = row["responses"]
            best, worst = text[answer["candidate_id"]], text[rejected[row["prompt_id"], answer["candidate_id"]]]
            flipped = answer["token_ids"] == [reader.labels[1]]
            order = (worst, best) if flipped else (best, worst)
            assert row["prompt_ids"] == reader.ids(context[row["prompt_id"]], *order)
            assert flipped or answer["token_ids"] == [reader.labels[0]]
            assert answer["weight"] == 1.0
            flips.append(flipped)
    assert abs(sum(flips) - len(flips) / 2) < 2 * len(flips) ** 0.5
    assert len(flips) > 200


def test_ranker_examples_are_the_same_every_time_and_in_any_order(tiny, labelled, ws):
    """The flip is a hash of (seed, prompt, chosen, rejected): shuffled pairs give the same rows."""
    prompts, candidates, pairs = labelled
    order = pa.array(np.random.default_rng(0).permutation(len(pairs)))
    shuffled = made((prompts, candidates, pairs.take(order)), tiny, ws)

    def key(row):
        return row["prompt_id"], row["prompt_ids"]

    assert sorted(shuffled, key=key) == sorted(made(labelled, tiny, ws), key=key)
    assert made(labelled, tiny, ws, seed=1) != made(labelled, tiny, ws)


def test_ranker_examples_split_by_prompt(tiny, labelled, ws):
    """train and heldout share no prompt, and together have every pair."""
    prompts, _, pairs = labelled
    sides = {split: made(labelled, tiny, ws, split=split) for split in ("train", "heldout")}
    split_of = {row["prompt_id"]: row["split"] for row in prompts.to_pylist()}
    for split, rows in sides.items():
        assert rows
        assert {split_of[row["prompt_id"]] for row in rows} == {split}
    assert sum(map(len, sides.values())) == len(pairs)


def test_a_comparison_that_the_model_cannot_read_is_left_out_with_reason(tiny, tmp_path, ws):
    """Longer than the context less the answer: counted, not cut."""
    path = tmp_path / "long.csv"
    path.write_text(f"prompt,chosen,rejected\nHi,{'q ' * 120},no\nHello,yes,no\n")
    tables = preferences(tiny, ws, path=DataPath(str(path)), heldout=0.0)
    assert len(made(tables, tiny, ws)) == 1
    assert [row["reason"] for row in ws.rejects.to_pylist()] == ["comparison too long"]

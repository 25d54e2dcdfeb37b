"""`winnow inspect`: near duplicates by brute force, and what it says of a small data set with known faults."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.inspection import near_duplicates
from schemas import split_of
from tests.conftest import write_jsonl

BAD_ROWS = pytest.mark.filterwarnings(
    "ignore:.*path. 1 of the first .* will be rejected. (empty prompt|identical responses)"
)  # by the plan
texts = st.lists(st.lists(st.sampled_from("abcd"), min_size=0, max_size=7).map(" ".join), max_size=6)


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    n = min(n, len(words))
    return {tuple(words[k : k + n]) for k in range(len(words) - n + 1)} if n else set()


@settings(deadline=None, max_examples=60)
@given(texts, texts, st.sampled_from([1, 2, 3]), st.sampled_from([0.3, 0.5, 0.75, 1.0]))
def test_near_duplicates_are_those_of_all_pairs(heldout, train, n, overlap):
    """The largest Jaccard of a held-out text with any training text, where it is at least `overlap`."""
    expected = {}
    for number, text in enumerate(heldout):
        a = grams(text, n)
        jaccards = [len(a & b) / len(a | b) for b in (grams(other, n) for other in train) if a and b]
        if jaccards and max(jaccards) >= overlap:
            expected[number] = max(jaccards)
    found = {held: jaccard for held, _, jaccard in near_duplicates(heldout, train, n, overlap)}
    assert found == pytest.approx(expected)


def test_scripts_without_spaces_are_read_by_characters():
    """One of twelve characters differs; as one word they would have nothing in common."""
    assert near_duplicates(["東京で二人の席を予約して"], ["東京で三人の席を予約して"], 2, 0.5)
    assert not near_duplicates(["東京で二人の席を予約して"], ["明日は雨が降るでしょうか"], 2, 0.5)


def test_prompts_of_chats_are_compared_by_what_users_say(tiny, winnow, tmp_path):
    """A question under another system prompt is the same; questions under one long system prompt are not."""
    system = {
        "role": "system",
        "content": "You are the patient clerk of a boat hire in Oslo. Be kind to all.",
    }
    questions = [f"Question {n} is about the colour of {n} boats." for n in range(60)]
    rows = [{"prompt": [system, {"role": "user", "content": text}]} for text in questions]
    held = next(text for text in questions if split_of(text, 0.5) == "heldout")
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "my.yaml").write_text(
        f"sft: {{with: {{path: {tiny.folder}}}}}\n"
        "prompts: {with: {path: ./prompts.jsonl, heldout: 0.5}}\n"
        "preferences: {with: {path: ./pairs.jsonl, heldout: 0.0}}\n"
        "sample: {with: {max_tokens: 24}}\nranker: {use: brevity, with: {words: 3}}\n"
    )
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": held, "chosen": "Yes.", "rejected": "No."}])
    code, text = winnow("inspect", "dpo", "--config", tmp_path / "my.yaml", "--out", "found.jsonl")
    assert code == 0, text
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    like = {
        (trained, row["item"]): row["value"]
        for row in found
        for trained in ("prompts", "preferences")
        if (row["step"], row["check"]) == ("prompts", f"held-out prompts like train of {trained}")
    }
    near = "at least 0.5 of 3-grams of words"
    expected = {("preferences", "the same words"): 1, ("preferences", near): 0}
    assert like == expected | {("prompts", "the same words"): 0, ("prompts", near): 0}


@pytest.fixture
def config(tiny, tmp_path):
    """A config whose preferences hold two of the prompts of the evaluation, and whose files have faulty rows."""
    sentences = [f"Please book a boat for {n} people on Monday in Oslo at noon." for n in range(40)]
    held = [text for text in sentences if split_of(text, 0.5) == "heldout"]
    rows = [{"prompt": text} for text in [*sentences, sentences[0]]] + [{"prompt": ""}, {"prompt": "Привет"}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    copied = [held[0].upper().replace(".", "!"), held[1].replace("Please", "Kindly")]
    pairs = [{"prompt": text, "chosen": "Gladly, I have.", "rejected": "No."} for text in copied]
    write_jsonl(tmp_path / "pairs.jsonl", [*pairs, pairs[0] | {"rejected": "Gladly, I have."}])
    lines = [
        f"sft: {{with: {{path: {tiny.folder}}}}}",
        "prompts: {with: {path: ./prompts.jsonl, heldout: 0.5}}",
        "preferences: {with: {path: ./pairs.jsonl, heldout: 0.0}}",
        "sample: {with: {max_tokens: 24}}",
        "ranker: {use: brevity, with: {words: 3}}",
    ]
    (tmp_path / "my.yaml").write_text("\n".join(lines))
    return tmp_path / "my.yaml"


@BAD_ROWS
def test_inspect_says_what_is_wrong_with_the_data_and_stores_nothing(config, winnow, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    code, text = winnow("inspect", "dpo", "--config", config, "--overlap", "0.7", "--out", "found.jsonl")
    assert code == 0, text
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    values = {(row["step"], row["check"], row["item"]): row for row in rows}
    assert values["prompts", "rejected", "duplicate prompt"]["value"] == 1
    assert values["prompts", "rejected", "empty prompt"]["example"] == "prompts.jsonl:42"
    assert values["preferences", "rejected", "identical responses"]["value"] == 1
    assert values["preferences", "rows", "pairs"]["value"] == 2
    assert values["prompts", "letters", "cyrillic"] | {"share": 0} == {
        "step": "prompts", "check": "letters", "item": "cyrillic", "value": 6, "share": 0, "example": "Привет"
    }  # fmt: skip
    like = "held-out prompts like train of preferences"
    assert values["prompts", like, "the same words"]["value"] == 1
    near = values["prompts", like, "at least 0.7 of 3-grams of words"]
    assert near["value"] >= 1
    assert "Kindly" in near["example"]
    assert values["preferences", "pairs", "the chosen one is longer (half of the equal ones)"]["share"] == 1
    assert {row["item"] for row in rows if row["check"] == "tokens of prompt"} == {"median", "90 %", "99 %", "longest"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "found.jsonl"])


@BAD_ROWS
def test_inspect_reads_the_data_of_several_recipes_once_each(config, winnow, tmp_path):
    """A step that they share has its rows once; one that differs is named after its recipe too."""
    (tmp_path / "other.yaml").write_text("extends: dpo\npreferences: {with: {heldout: 0.5}}\n")
    words = ("--config", config, "--out", "found.jsonl")
    code, text = winnow("inspect", "rso", "dpo", "other.yaml", *words)
    assert code == 0, text
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["item"] in ("duplicate prompt", "pairs")]
    assert sorted(steps) == ["preferences", "preferences of other", "prompts"]


@BAD_ROWS
def test_inspect_prints_a_table_and_reports_the_plans_mistakes(config, winnow):
    code, text = winnow("inspect", "dpo", "--config", config)
    assert code == 0
    assert "duplicate prompt" in text
    code, text = winnow("inspect", "dpo", "--config", config, "--set", "prompts.path=absent.jsonl")
    assert code == 2
    assert "absent.jsonl" in text

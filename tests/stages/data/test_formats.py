"""Formats of preference data: the pairs of each, and the trap that each is known for. The rows are our own."""

import gzip
import json
import re
import shutil
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.context import StageContext, WarmCache
from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import Model, WinnowError, WinnowWarning, conform, prompt_id
from schemas.tables import CANDIDATES, PAIRS, PROMPTS
from stages.data.files import DataSource
from stages.data.formats import PreferencePair, couple_neighbours, preference_reader
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.tokenizer import Tokenizer
from tests.conftest import write_jsonl
from tests.stages.data.test_files import jsonl, reasons


@pytest.fixture(scope="module")
def bare(tiny, tmp_path_factory) -> Model:
    """The tiny model without a chat template, as base models come."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny.folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    inner = AutoTokenizer.from_pretrained(folder)
    inner.chat_template = None
    inner.save_pretrained(folder)
    return Model(folder, "bare")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(reader, *rows):
    return preference_reader.bind(reader)(*rows)


def reason_of(reader, *rows):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is what the test looks at
        read(reader, *rows)
    return str(error.value)


def new_context(folder):
    return StageContext(folder, WarmCache(), lambda *progress: None)


def write_rows(folder, kind, rows, name="in"):
    """Write rows as JSONL or Parquet; return the file."""
    file = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    return write_jsonl(file, rows)


def pairs_in(tables):
    """Counter of (prompt, chosen, rejected) texts; the tables hold to their schemas."""
    prompt_table, answers, pairs = (conform(t, s) for t, s in zip(tables, (PROMPTS, CANDIDATES, PAIRS), strict=True))
    prompt = {row["prompt_id"]: row["text"] for row in prompt_table.to_pylist()}
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    rows = pairs.to_pylist()
    return Counter((prompt[row["prompt_id"]], text[row["chosen_id"]], text[row["rejected_id"]]) for row in rows)


# Anthropic/hh-rlhf


def transcript(*turns):
    return "".join(f"\n\n{'Human' if n % 2 == 0 else 'Assistant'}: {turn}" for n, turn in enumerate(turns))


HH = {
    "chosen": transcript("Hi", "Yes?", "A boat", "I can."),
    "rejected": transcript("Hi", "Yes?", "A boat", "I can't."),
}


def test_hh_ends_the_prompt_at_the_last_shared_turn_and_not_where_the_responses_part():
    """Both responses begin with `I can`: the longest shared prefix of characters would take it into the prompt."""
    assert read("hh", HH) == PreferencePair(
        [user("Hi"), assistant("Yes?"), user("A boat")],
        "I can.",
        "I can't.",
        plain="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A boat\n\nAssistant:",
    )


WORDS = st.text(st.sampled_from("ab \n:"), min_size=1, max_size=6).map(lambda text: f"x{text}y")


@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2), WORDS, WORDS, WORDS)
def test_hh_gives_back_the_turns_of_a_transcript(turns, shared, first, second):
    """For any turns and any beginning that the responses share: split(write(turns, response)) = turns, response."""
    row = {"chosen": transcript(*turns, shared + first), "rejected": transcript(*turns, shared + second)}
    pair = read("hh", row)
    assert (pair.chosen, pair.rejected) == (shared + first, shared + second)
    assert pair.plain + " " + pair.chosen == row["chosen"]
    messages = [(user if n % 2 == 0 else assistant)(turn) for n, turn in enumerate(turns)]
    assert pair.prompt == (turns[0] if len(turns) == 1 else messages)


def test_hh_is_chat_for_a_chat_tokenizer_and_the_transcript_itself_for_another(tiny, bare, tmp_path):
    """One id, one text and one split either way; the ids of the tokens are those of the form that was read."""
    path = jsonl(tmp_path, [HH])
    chat, plain = (preferences(model, new_context(tmp_path), path=path, reader="hh") for model in (tiny, bare))
    assert pairs_in(chat) == pairs_in(plain) == {("user: Hi\nassistant: Yes?\nuser: A boat", "I can.", "I can't."): 1}
    assert chat[0].column("prompt_id").equals(plain[0].column("prompt_id"))
    tokenizer, other = Tokenizer(tiny), Tokenizer(bare)
    assert chat[0]["token_ids"][0].as_py() == tokenizer.prompt_ids(read("hh", HH).prompt)
    ids = plain[0]["token_ids"][0].as_py() + plain[1]["token_ids"][0].as_py()
    assert other.inner.decode(ids) in [side + other.inner.eos_token for side in HH.values()]
    texts = {tokenizer.inner.decode(ids) for ids in chat[1]["token_ids"].to_pylist()}
    assert texts == {f"{text}{tokenizer.inner.eos_token}" for text in ("I can.", "I can't.")}


def test_the_file_of_hh_itself_is_read_compressed_as_it_is(tiny, ctx, tmp_path):
    """train.jsonl.gz, as the data set ships it; locations count its lines."""
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(HH) + "\n" + json.dumps(HH | {"rejected": HH["chosen"]}) + "\n")
    tables = preferences(tiny, ctx, path=DataPath(str(tmp_path / "train.jsonl.gz")), reader="hh")
    assert sum(pairs_in(tables).values()) == 1
    assert reasons(ctx) == [("train.jsonl.gz:2", "identical responses")]


# openai/summarize_from_feedback


def compared(info, choice=1, texts=(" Short.", " Shorter.")):
    every = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"))
    summaries = [{"text": text, "policy": "sup", "note": None} for text in texts]
    return {"info": every | info, "summaries": summaries, "choice": choice, "worker": "w", "split": "train"}


REDDIT = {"post": "I lost it.", "title": "My boat", "subreddit": "sea"}
NEWS = {"article": "(CNN) Boats.", "title": "Boats", "site": "cnn"}


def test_summaries_of_posts_and_of_articles_have_their_own_prompts(bare, tiny, tmp_path):
    """CNN/DM batches stand in the same file. The space before a summary is the tokenizer's, and no template's."""
    reader = "summarize_from_feedback"
    reddit = "SUBREDDIT: r/sea\n\nTITLE: My boat\n\nPOST: I lost it.\n\nTL;DR:"
    assert read(reader, compared(REDDIT)) == PreferencePair(reddit, "Shorter.", "Short.", plain=reddit)
    news = "TITLE: Boats\n\n(CNN) Boats.\n\nTL;DR:"
    assert read(reader, compared(NEWS, 0)) == PreferencePair(news, "Short.", "Shorter.", plain=news)
    for model, space in ((bare, " "), (tiny, "")):
        _, answers, _ = preferences(
            model, new_context(tmp_path), path=jsonl(tmp_path, [compared(REDDIT)]), reader=reader
        )
        inner = Tokenizer(model).inner
        texts = {inner.decode(ids[:-1]) for ids in answers["token_ids"].to_pylist()}
        assert texts == {f"{space}Short.", f"{space}Shorter."}
        assert set(answers["text"].to_pylist()) == {"Short.", "Shorter."}


# UltraFeedback, and TRL's formats

FULL = {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]}
LONG = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Yes?"), user("A boat")]


def test_lists_that_repeat_the_prompt_give_it_once():
    """The same pair by all readers that fit; a single user's turn is its text, as in column `prompt`."""
    for reader in ("ultrafeedback_binarized", "implicit_prompt", "columns"):
        assert read(reader, FULL) == PreferencePair("Hi", "Yes.", "No.")
    conversation = {"chosen": [*LONG, assistant("Yes.")], "rejected": [*LONG, assistant("No.")]}
    assert read("implicit_prompt", conversation) == PreferencePair(LONG, "Yes.", "No.")
    assert read("columns", conversation | {"prompt": LONG}) == PreferencePair(LONG, "Yes.", "No.")


def test_equal_lists_are_no_pair(tiny, ctx, tmp_path):
    """The shared prefix is all of it: the last turn is still the response, and the two are the same."""
    path = jsonl(tmp_path, [FULL | {"rejected": FULL["chosen"]}, FULL])
    tables = preferences(tiny, ctx, path=path, reader="ultrafeedback_binarized")
    assert pairs_in(tables) == {("Hi", "Yes.", "No."): 1}
    assert reasons(ctx) == [("in.jsonl:1", "identical responses")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_default_reads_each_explicit_form_of_trl(tiny, ctx, tmp_path, kind):
    """Text or messages on every side; the prompt and the response mean the same in each."""
    forms: list[dict[str, Any]] = [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {"prompt": "Hi", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        FULL,
    ]
    for n, row in enumerate(forms):
        path = write_rows(tmp_path, kind, [row], str(n))
        tables = preferences(tiny, ctx, path=DataPath(str(path)))
        assert pairs_in(tables) == {("Hi", "Yes.", "No."): 1}
        assert tables[0]["prompt_id"].to_pylist() == [prompt_id("Hi")]
    assert reasons(ctx) == []


def test_columns_of_other_names_are_the_readers_options(tiny, ctx, tmp_path):
    path = jsonl(tmp_path, [{"q": "Hi", "good": "Yes.", "bad": "No."}])
    reader = preference_reader.bind({"name": "columns", "prompt": "q", "chosen": "good", "rejected": "bad"})
    assert pairs_in(preferences(tiny, ctx, path=path, reader=reader)) == {("Hi", "Yes.", "No."): 1}


def test_an_implicit_prompt_in_text_ends_before_the_word_in_which_the_sides_part():
    """Characters alone would leave `ue.` and `ack.`; a side that ends where the other goes on loses no word."""
    for chosen, rejected, pair in [
        ("The sky is blue.", "The sky is black.", PreferencePair("The sky is", " blue.", " black.")),
        ("The sky is", "The sky is blue.", PreferencePair("The sky", " is", " is blue.")),
    ]:
        assert read("implicit_prompt", {"chosen": chosen, "rejected": rejected}) == pair


@pytest.mark.parametrize("name", ["messages", "conversations", "question"])
def test_a_prompt_in_another_column_is_not_taken_for_what_two_answers_share(name):
    """The answers begin with the same words."""
    prompt = {
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "conversations": [{"from": "human", "value": "What is 3 + 4?"}],
        "question": "What is 3 + 4?",
    }[name]
    row = {name: prompt, "chosen": "The sum is 7.", "rejected": "The sum is 8."}
    with pytest.raises(ValueError, match=f"do not begin with the prompt in {name}"):
        read("implicit_prompt", row)
    assert read("implicit_prompt", row | {"chosen": "What is 3 + 4? 7", "rejected": "What is 3 + 4? 8"})


@given(st.text("ab \n", min_size=1, max_size=30), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_an_implicit_prompt_and_its_responses_are_the_two_texts(shared, first, second):
    """prompt + response = the side of the row, and the prompt is shared; or the row is rejected."""
    row = {"chosen": shared + first, "rejected": shared + second}
    try:
        pair = read("implicit_prompt", row)
    except ValueError:
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert pair.chosen[0].isspace()


# PKU-SafeRLHF

PKU = {"prompt": "How?", "response_0": "So.", "response_1": "Do not.", "better_response_id": 0, "safer_response_id": 1,
       "is_response_0_safe": False, "is_response_1_safe": True}  # fmt: skip


def test_helpful_or_safer_is_required_and_has_no_default():
    """The two labels disagree in many rows: which one is meant is the user's to say."""
    assert read({"name": "pku_saferlhf", "prefer": "helpful"}, PKU) == PreferencePair("How?", "So.", "Do not.")
    assert read({"name": "pku_saferlhf", "prefer": "safer"}, PKU) == PreferencePair("How?", "Do not.", "So.")
    with pytest.raises(WinnowError, match="prefer: required"):
        preference_reader.bind("pku_saferlhf")


# HelpSteer


def rated(prompt, response, helpfulness, verbosity=2):
    rest = dict.fromkeys(("correctness", "coherence", "complexity"), 3)
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity, **rest}


def test_ratings_are_paired_within_neighbours_of_one_prompt(tiny, ctx, tmp_path):
    """Ties are rejected, and so is a row alone; what follows is not shifted by it. One prompt may come twice."""
    rows = [
        rated("a", "Best.", 4), rated("a", "Worst.", 0),
        rated("b", "Same.", 2), rated("b", "Equal.", 2),
        rated("c", "Alone.", 2),
        rated("d", "Low.", 1, verbosity=4), rated("d", "High.", 3),
        rated("d", "Lower.", 0), rated("d", "Higher.", 4),
        rated("e", "No rating.", None), rated("e", "Rated.", 4),
        rated("f", "", 0), rated("f", "Filled.", 4),
        rated("g", "Last.", 2),
    ]  # fmt: skip
    path = jsonl(tmp_path, rows)
    tables = preferences(tiny, ctx, path=path, reader="helpsteer2")
    assert pairs_in(tables) == {("a", "Best.", "Worst."): 1, ("d", "High.", "Low."): 1, ("d", "Higher.", "Lower."): 1}
    assert reasons(ctx) == [
        ("in.jsonl:3", "tie in helpfulness"),
        ("in.jsonl:5", "no second response to this prompt beside it"),
        ("in.jsonl:10", "helpfulness is not a number"),
        ("in.jsonl:12", "empty response"),
        ("in.jsonl:14", "no second response to this prompt beside it"),
    ]
    verbose = preference_reader.bind({"name": "helpsteer2", "by": "verbosity"})
    assert pairs_in(preferences(tiny, new_context(tmp_path), path=path, reader=verbose)) == {("d", "Low.", "High."): 1}


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_every_rating_is_in_one_pair_or_in_one_reject(names):
    """Couples partition the rows in their order, and never join two prompts."""
    rows = [(str(n), {"prompt": prompt, "n": n}) for n, prompt in enumerate(names)]
    groups = [group for _, group in couple_neighbours(iter(rows), "prompt")]
    assert [row["n"] for group in groups for row in group] == list(range(len(rows)))
    assert all(len({row["prompt"] for row in group}) == 1 and len(group) <= 2 for group in groups)
    alone = [group[0] for group in groups if len(group) == 1]
    assert not any(a["n"] + 1 == b["n"] and a["prompt"] == b["prompt"] for a in alone for b in alone)


HELPSTEER_TURNS = "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nA boat\nfor two"


def test_a_strength_below_zero_prefers_the_first_and_zero_is_no_pair():
    """Both later forms of HelpSteer; the turns of a long prompt, and a context that is a list of them or text."""
    turns: Any = [user("Hi"), assistant("Yes?"), user("A boat\nfor two")]
    two = {"prompt": HELPSTEER_TURNS, "response_1": "One.", "response_2": "Two."}
    three = {"response1": "One.", "response2": "Two."}
    for reader, row, prompt, name in [
        ("helpsteer2_preference", two, turns, "preference_strength"),
        ("helpsteer3", three | {"context": turns}, turns, "overall_preference"),
        ("helpsteer3", three | {"context": turns[:1]}, "Hi", "overall_preference"),
        ("helpsteer3", three | {"context": "Hi"}, "Hi", "overall_preference"),
    ]:
        assert reason_of(reader, row | {name: None}) == f"{name} is not a number"
        assert reason_of(reader, row | {name: 0}) == f"tie in {name}"
        for strength in (-3, -1):
            assert read(reader, row | {name: strength}) == PreferencePair(prompt, "One.", "Two.")
            assert read(reader, row | {name: -strength}) == PreferencePair(prompt, "Two.", "One.")


# Rows that are no pair


def sides(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


NO_PAIRS: dict[Any, list[tuple[dict, str]]] = {
    "hh": [
        (sides(transcript("Hi", " "), transcript("Hi", "No.")), "empty chosen"),
        (sides(transcript("Hi", "Yes.", "And?", "No."), transcript("Hi", "No.")), "chosen is not one assistant turn"),
        (sides(transcript("Hi", "Yes."), transcript("Ho", "No.")), "chosen and rejected share no Assistant turn"),
        (sides("Hi", "Hello"), "chosen and rejected share no Assistant turn"),
        (sides("Once.\n\nAssistant: Yes.", "Once.\n\nAssistant: No."), "the transcript does not begin with a turn"),
        (sides(transcript("Hi", "", "So?", "Yes."), transcript("Hi", "", "So?", "No.")), "empty turn in the prompt"),
        (sides(None, transcript("Hi", "No.")), "no chosen"),
    ],
    "summarize_from_feedback": [
        (compared(REDDIT, 2), "choice is neither 0 nor 1"),
        (compared(REDDIT, None), "choice is not a number"),
        (compared(REDDIT, 0, (" ", "Short.")), "empty text"),
        (compared(REDDIT, 0, ("One.",)), "summaries are not two"),
        (compared(REDDIT) | {"summaries": ["One.", "Two."]}, "summaries are not two"),
        (compared(REDDIT | {"post": None}), "no post"),
        (compared(REDDIT) | {"info": None}, "no info"),
    ],
    "ultrafeedback_binarized": [  # the first turn must be the same, and the response begin and end with the assistant
        (sides(FULL["chosen"], [user("Ho"), assistant("No.")]), "chosen and rejected share no prompt"),
        (sides([user("Hi"), assistant("")], FULL["rejected"]), "empty content"),
        (sides([*FULL["chosen"], user("B")], FULL["rejected"]), "chosen does not begin and end with an assistant turn"),
        (sides([user("Hi"), user("Yes.")], FULL["rejected"]), "chosen does not begin and end with an assistant turn"),
        (sides(FULL["chosen"], [user("Hi")]), "chosen and rejected share no prompt"),
        (sides([], FULL["rejected"]), "empty chosen"),
        (sides("Yes.", FULL["rejected"]), "chosen is not text"),
    ],
    "implicit_prompt": [
        (sides("Yes.", "No."), "chosen and rejected share no prompt"),
        (HH, "a transcript, which reader hh reads"),
    ],
}


@pytest.mark.parametrize("reader", NO_PAIRS)
def test_each_row_that_is_no_pair_has_its_reason(reader):
    assert [reason_of(reader, row) for row, _ in NO_PAIRS[reader]] == [reason for _, reason in NO_PAIRS[reader]]
    safer = {"name": "pku_saferlhf", "prefer": "safer"}
    assert reason_of(safer, PKU | {"safer_response_id": -1}) == "safer_response_id is neither 0 nor 1"


# The prompts of such files


def test_prompts_of_pairs_have_the_ids_that_the_pairs_have(tiny, ctx, tmp_path):
    """A prompt of several pairs is one row; the chosen response is a demonstration if the option says so."""
    path = jsonl(tmp_path, [HH, HH | {"rejected": HH["rejected"] + " No."}])
    table, answers, _ = preferences(tiny, ctx, path=path, reader="hh")
    plain, imitated = (prompts(tiny, ctx, path=path, reader="hh", demonstration=d) for d in (None, "chosen"))
    assert plain.equals(table)
    (row,) = imitated.to_pylist()
    assert row["demonstration"] == "I can."
    assert row["demonstration_ids"] in answers["token_ids"].to_pylist()
    assert reasons(ctx) == [("in.jsonl:2", "duplicate prompt")] * 2


def problems(stage, path, reader="columns", **options):
    """What the check at plan time says."""
    fields = entry_of(stage).options.model_fields.items()
    options = {name: field.default for name, field in fields} | options
    options |= dict(path=DataPath(str(path)), reader=preference_reader.bind(reader))
    return entry_of(stage).metadata["signature"].check(options, {})


def test_with_a_reader_the_demonstration_is_the_chosen_response(tmp_path):
    """At plan time; another column is not read."""
    path = write_jsonl(tmp_path / "in.jsonl", [HH])
    for demonstration in ("chosen", None):
        assert problems(prompts, path, "hh", demonstration=demonstration) == []
    assert "set chosen or null (got 'answer')" in problems(prompts, path, "hh", demonstration="answer")[0]


# Files that are something else

RED_TEAM = {"transcript": "\n\nHuman: x", "min_harmlessness_score_transcript": -1.0, "num_params": "52B", "rating": 4.0,
            "task_description": "x", "tags": None}  # fmt: skip
UNPAIRED = {"prompt": "Hi", "completion": "Yes.", "label": True}
# What a plan says with the option, and the stage, which reads other files too, without.
NO_PROMPT = r"no column 'prompt'( \(option `prompt`\))?"
NO_SIDES = r"no column 'chosen'( \(option `chosen`\))?, 'rejected'( \(option `rejected`\))?"
AXIS = {"info": REDDIT, "summary": {"text": "Short.", "axes": {"overall": 4}}, "worker": "w"}
GOOD = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_file_of_another_format_is_refused_with_the_next_step(tiny, ctx, tmp_path, kind):
    """At plan time, before any model is trained, and where it is read."""
    for n, (rows, words) in enumerate([
        ([RED_TEAM], "red-team-attempts, which has no preferences; use another folder"),
        ([UNPAIRED], "responses with a label and no pairs: in stage own_candidates, set `reader` to unpaired$"),
        ([AXIS], "axis, ratings of single summaries; set `subset: comparisons`"),
        ([HH], NO_PROMPT + "; it has 'chosen', 'rejected'; .*set `reader` to hh for these$"),
        ([PKU], NO_SIDES + "; .* {name: pku_saferlhf, prefer: helpful} or {name: pku_saferlhf"),
        ([rated("a", "Yes.", 3), rated("a", "No.", 1)], "set `reader` to helpsteer2 for these"),
        ([{"prompt": "Hi", "other": 1}], NO_SIDES + "; it has 'prompt', 'other'$"),
    ]):  # fmt: skip
        folder = tmp_path / str(n)
        folder.mkdir()
        file = write_rows(folder, "parquet" if kind == "parquet" else "jsonl", rows)
        path = folder if kind == "folder" else file
        with pytest.raises(WinnowError, match=words):
            preferences(tiny, ctx, path=DataPath(str(path)))
        assert re.search(words, problems(preferences, path)[0])


def test_unpaired_labels_enter_as_candidates_with_rewards(tiny, ctx, tmp_path):
    """The next step that the refusal names is one that works."""
    path = jsonl(tmp_path, [UNPAIRED, UNPAIRED | {"completion": "No.", "label": False}])
    _, answers, rewards = own_candidates(tiny, ctx, path=path, response="completion", reward="label")
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    assert {text[row["candidate_id"]]: row["reward"] for row in rewards.to_pylist()} == {"Yes.": 1.0, "No.": 0.0}


def test_a_column_that_the_first_rows_lack_is_still_a_column(tmp_path):
    """In JSONL a column exists where some row has it; bad lines on the way are no rows, and are counted."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Hi"}\noops\n' + json.dumps(GOOD) + "\n")
    with pytest.warns(WinnowWarning, match="1 of the first 2 .*") as caught:
        assert problems(preferences, path) == []
    not_json, no_pair = (str(item.message) for item in caught)
    assert "not JSON (in.jsonl:2)" in not_json
    assert "no chosen (in.jsonl:1)" in no_pair


def test_a_file_that_is_not_what_its_name_says_is_refused_at_plan_time(tmp_path):
    """Each with its name, the cause, and the next step."""
    for name, content, words in [
        ("in.jsonl", gzip.compress(b'{"prompt": "Hi"}\n'), "in.jsonl: this is gzip; end its name in .gz"),
        ("in.jsonl", b"PAR1 and more", "this is Parquet; end its name in .parquet"),
        ("in.csv", b"PK\x03\x04 and more", "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV"),
        ("in.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("in.jsonl", b"\n<!DOCTYPE html><html>", "a web page; download the file itself"),
        ("in.csv", "prompt".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("in.jsonl.gz", b'{"prompt": "Hi"}\n', "not a complete JSONL file .*fetch or write it again"),
        ("in.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 99)[:-9], "not a complete JSONL file"),
        ("in.parquet", b"PAR1 and no more", "not a complete Parquet file .*fetch or write it again"),
        ("in.parquet", b"", "not a complete Parquet file"),
        ("in.jsonl", b'[\n{"prompt": "Hi"},\n{"prompt": "Ho"}\n]\n', "one JSON list; end its name in .json"),
        ("in.jsonl", b"Hi\nHo\n", "no rows; in JSONL, each row is one JSON object on its own line"),
        (
            "in.jsonl",
            '{"prompt": "Où ?"}\n'.encode("latin-1"),
            r"no row of it is UTF-8 \(in.jsonl:1: .*save it as UTF-8",
        ),
        ("in.json", '[{"prompt": "Où ?"}]'.encode("latin-1"), r"no row of it is UTF-8 \(in.json:0: .*save it as UTF-8"),
        ("in.jsonl", b"", "no rows"),
        ("in.csv", b"", "no rows"),
    ]:
        (tmp_path / name).write_bytes(content)
        (problem,) = problems(preferences, tmp_path / name)
        assert problem.startswith(f"{name}: ")
        assert re.search(words, problem)


def test_damage_behind_a_good_head_ends_the_reading_with_its_location(ctx, tmp_path):
    """Planning sees a good file: the footer of the Parquet file is intact, and the gzip file is cut near its middle."""
    path = tmp_path / "in.parquet"
    table = pa.Table.from_pylist([{"prompt": f"{n} " * 20} for n in range(9000)])
    pq.write_table(table, path, row_group_size=4096, compression="zstd")
    data = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(data[: start - 40] + bytes(4000) + data[start + 3960 :])
    rows = list[Any]()
    with pytest.raises(WinnowError, match=r"cannot be read after in.parquet:4095 .*fetch or write it again"):
        rows.extend(DataSource(DataPath(str(path))).rows(ctx, ["prompt"]))
    assert len(rows) == 4096

    path = tmp_path / "in.jsonl.gz"
    lines = "".join(json.dumps({"prompt": f"{n} {n * 7919 % 10007}"}) + "\n" for n in range(20_000))
    compressed = gzip.compress(lines.encode())
    path.write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(WinnowError, match=r"cannot be read after in\.jsonl\.gz:\d{4,} .*cut short"):
        list(DataSource(DataPath(str(path))).rows(ctx, ["prompt"]))


# Data sets


def test_a_subset_is_a_configuration_or_a_folder(tiny, ctx, tmp_path):
    """hh-rlhf and HelpSteer2 have folders, summarize_from_feedback and HelpSteer3 configurations."""
    for name, row in (("comparisons", GOOD), ("axis", AXIS), ("helpful-base", GOOD | {"prompt": "Ho"})):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [row])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("comparisons", "axis"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for subset, prompt in (("comparisons", "Hi"), ("helpful-base", "Ho")):
        tables = preferences(tiny, ctx, path=DataPath(str(tmp_path)), subset=subset)
        assert pairs_in(tables) == {(prompt, "Yes.", "No."): 1}
    with pytest.raises(WinnowError, match=r"no split 'test': it has 'train'; set `dataset_split`"):
        preferences(tiny, ctx, path=DataPath(str(tmp_path)), subset="comparisons", dataset_split="test")


def test_a_data_set_that_is_a_script_is_refused_with_the_revision_of_its_parquet(tiny, ctx, tmp_path):
    """summarize_from_feedback is one; `datasets` runs no scripts."""
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("import datasets\n")
    write_jsonl(folder / "in.jsonl", [GOOD])
    with pytest.raises(WinnowError, match=r"scripts are no longer supported.*revision: refs/convert/parquet"):
        preferences(tiny, ctx, path=DataPath(str(folder)))


def test_every_reader_says_where_its_format_comes_from_and_what_it_reads():
    """README's table is made of these; a reader without columns would read a file of anything."""
    for entry in preference_reader.entries.values():
        assert entry.metadata["columns"]
        assert entry.fn.__doc__.startswith("Read ")


@pytest.mark.parametrize("reader", ["columns", "implicit_prompt", "ultrafeedback_binarized"])
def test_a_response_of_several_turns_is_read_as_its_messages(reader):
    """What follows the turns that both sides share, which may be of one turn on the other side."""
    several = [assistant("Yes."), user("B"), assistant("C")]
    row = sides([*FULL["chosen"][:1], *several], FULL["rejected"]) | {"prompt": FULL["chosen"][:1]}
    assert read(reader, row) == PreferencePair("Hi", several, "No.")

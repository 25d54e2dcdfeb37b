"""Formats of preference data: what each becomes, and the trap that each is known for. The rows are our own."""

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.context import StageContext, WarmCache
from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import Model, WinnowError, conform, prompt_id
from schemas.tables import CANDIDATES, PAIRS, PROMPTS
from stages.data.files import Source
from stages.data.formats import Comparison, _couples, preference_reader
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.tokenizer import Tokenizer
from tests.conftest import write_jsonl


@pytest.fixture(autouse=True)
def no_home(tmp_path, monkeypatch):
    """`datasets` keeps its cache in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


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


def refused(reader, *rows):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is what the test looks at
        read(reader, *rows)
    return str(error.value)


def space(folder):
    return StageContext(folder, WarmCache(), lambda done, total, unit: None)


def pairs_in(tables):
    """Counter of (prompt, chosen, rejected) texts; the tables hold to their schemas."""
    asked, answers, pairs = (conform(t, s) for t, s in zip(tables, (PROMPTS, CANDIDATES, PAIRS), strict=True))
    prompt = {row["prompt_id"]: row["text"] for row in asked.to_pylist()}
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    rows = pairs.to_pylist()
    return Counter((prompt[row["prompt_id"]], text[row["chosen_id"]], text[row["rejected_id"]]) for row in rows)


def reasons(ctx):
    return [(row["place"], row["reason"]) for row in ctx.rejects.to_pylist()]


# Anthropic/hh-rlhf


def transcript(*turns):
    return "".join(f"\n\n{'Human' if n % 2 == 0 else 'Assistant'}: {turn}" for n, turn in enumerate(turns))


HH = {
    "chosen": transcript("Hi", "Yes?", "A boat", "I can."),
    "rejected": transcript("Hi", "Yes?", "A boat", "I can't."),
}


def test_hh_ends_the_prompt_at_the_last_shared_mark_and_not_where_the_replies_part():
    """Both replies begin with `I can`: the longest shared prefix of characters would take it into the prompt."""
    made = read("hh", HH)
    assert made == Comparison(
        [user("Hi"), assistant("Yes?"), user("A boat")],
        "I can.",
        "I can't.",
        plain="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A boat\n\nAssistant:",
    )


WORDS = st.text(st.sampled_from("ab \n:"), min_size=1, max_size=6).map(lambda text: f"x{text}y")


@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2), WORDS, WORDS, WORDS)
def test_hh_gives_back_what_the_transcript_was_made_from(turns, shared, one, other):
    """For any turns and any beginning that the replies share: split(write(turns, reply)) = turns, reply."""
    made = read("hh", {f: transcript(*turns, shared + end) for f, end in (("chosen", one), ("rejected", other))})
    assert (made.chosen, made.rejected) == (shared + one, shared + other)
    assert made.plain + " " + made.chosen == transcript(*turns, shared + one)
    messages = [(user if n % 2 == 0 else assistant)(turn) for n, turn in enumerate(turns)]
    assert made.prompt == (turns[0] if len(turns) == 1 else messages)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (transcript("Hi", " "), transcript("Hi", "No."), "empty chosen"),
        (transcript("Hi", "Yes.", "And?", "No."), transcript("Hi", "No."), "chosen is not one assistant turn"),
        (transcript("Hi", "Yes."), transcript("Hello", "No."), "chosen and rejected share no Assistant turn"),
        ("Hi", "Hello", "chosen and rejected share no Assistant turn"),
        ("Once.\n\nAssistant: Yes.", "Once.\n\nAssistant: No.", "the transcript does not begin with a turn"),
        (transcript("Hi", "", "So?", "Yes."), transcript("Hi", "", "So?", "No."), "empty turn in the prompt"),
        (None, transcript("Hi", "No."), "no chosen"),
    ],
)
def test_hh_transcripts_that_are_no_pair_say_why(chosen, rejected, reason):
    assert refused("hh", {"chosen": chosen, "rejected": rejected}) == reason


def test_hh_is_chat_for_a_chat_tokenizer_and_the_transcript_itself_for_another(tiny, bare, tmp_path):
    """One id, one text and one split either way; the ids of the tokens are those of the form that was read."""
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", [HH])))
    chat, plain = (preferences(model, space(tmp_path), path=path, reader="hh") for model in (tiny, bare))
    assert pairs_in(chat) == pairs_in(plain) == {("user: Hi\nassistant: Yes?\nuser: A boat", "I can.", "I can't."): 1}
    assert chat[0].column("prompt_id").equals(plain[0].column("prompt_id"))
    one, other = Tokenizer(tiny), Tokenizer(bare)
    assert chat[0]["token_ids"][0].as_py() == one.prompt_ids(read("hh", HH).prompt)
    whole = HH["chosen"] + other.inner.eos_token
    ids = plain[0]["token_ids"][0].as_py() + plain[1]["token_ids"][0].as_py()
    assert other.inner.decode(ids) in (whole, HH["rejected"] + other.inner.eos_token)
    texts = {one.inner.decode(ids) for ids in chat[1]["token_ids"].to_pylist()}
    assert texts == {f"{text}{one.inner.eos_token}" for text in ("I can.", "I can't.")}


def test_the_file_of_hh_itself_is_read_packed_as_it_is(tiny, ctx, tmp_path):
    """train.jsonl.gz, as the data set ships it; places count its lines."""
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(HH) + "\n" + json.dumps(HH | {"rejected": HH["chosen"]}) + "\n")
    found = preferences(tiny, ctx, path=DataPath(str(tmp_path / "train.jsonl.gz")), reader="hh")
    assert sum(pairs_in(found).values()) == 1
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
    reddit = "SUBREDDIT: r/sea\n\nTITLE: My boat\n\nPOST: I lost it.\n\nTL;DR:"
    assert read("summarize_from_feedback", compared(REDDIT)) == Comparison(reddit, "Shorter.", "Short.", plain=reddit)
    news = "TITLE: Boats\n\n(CNN) Boats.\n\nTL;DR:"
    assert read("summarize_from_feedback", compared(NEWS, 0)) == Comparison(news, "Short.", "Shorter.", plain=news)
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", [compared(REDDIT)])))
    for model, lead in ((bare, " "), (tiny, "")):
        _, answers, _ = preferences(model, space(tmp_path), path=path, reader="summarize_from_feedback")
        inner = Tokenizer(model).inner
        assert {inner.decode(ids[:-1]) for ids in answers["token_ids"].to_pylist()} == {
            f"{lead}{w}." for w in ("Short", "Shorter")
        }
        assert set(answers["text"].to_pylist()) == {"Short.", "Shorter."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (compared(REDDIT, 2), "choice is neither 0 nor 1"),
        (compared(REDDIT, None), "choice is not a number"),
        (compared(REDDIT, 0, (" ", "Short.")), "empty text"),
        (compared(REDDIT, 0, ("One.",)), "summaries are not two"),
        (compared(REDDIT | {"post": None}), "no post"),
        (compared(REDDIT) | {"info": None}, "no info"),
    ],
)
def test_summaries_that_are_no_pair_say_why(row, reason):
    assert refused("summarize_from_feedback", row) == reason


# UltraFeedback, and TRL's formats

FULL = {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]}
LONG = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Yes?"), user("A boat")]


@pytest.mark.parametrize("reader", ["ultrafeedback_binarized", "implicit_prompt", "columns"])
def test_lists_that_repeat_the_prompt_give_it_once(reader):
    """The same comparison by all that can read it; a single user's turn is its text, as in column `prompt`."""
    assert read(reader, FULL) == Comparison("Hi", "Yes.", "No.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("Hi"), assistant("Yes.")], [user("Hello"), assistant("No.")], "chosen and rejected share no prompt"),
        ([user("Hi"), assistant("")], [user("Hi"), assistant("No.")], "empty content"),
        ([*FULL["chosen"], user("B"), assistant("C")], FULL["rejected"], "chosen is not one assistant turn"),
        ([user("Hi"), user("Yes.")], [user("Hi"), assistant("No.")], "chosen is not one assistant turn"),
        ([user("Hi"), assistant("Yes.")], [user("Hi")], "chosen and rejected share no prompt"),
        ([], [user("Hi"), assistant("No.")], "empty chosen"),
        ("Yes.", [user("Hi"), assistant("No.")], "chosen is not text"),
    ],
)  # fmt: skip
def test_lists_of_turns_that_are_no_pair_say_why(chosen, rejected, reason):
    """The first turn must be the same in both; a reply is one turn of the assistant's, and not empty."""
    assert refused("ultrafeedback_binarized", {"chosen": chosen, "rejected": rejected}) == reason


def test_equal_lists_are_no_pair(tiny, ctx, tmp_path):
    """The shared prefix is the whole: the last turn is still the reply, and the two are the same."""
    path = write_jsonl(tmp_path / "in.jsonl", [FULL | {"rejected": FULL["chosen"]}, FULL])
    assert pairs_in(preferences(tiny, ctx, path=DataPath(str(path)), reader="ultrafeedback_binarized")) == {
        ("Hi", "Yes.", "No."): 1
    }
    assert reasons(ctx) == [("in.jsonl:1", "identical responses")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_default_reads_each_explicit_form_of_trl(tiny, ctx, tmp_path, kind):
    """Text or messages on every side; the prompt and the reply mean the same in each."""
    forms: list[dict[str, Any]] = [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {"prompt": "Hi", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        FULL,
    ]
    for n, row in enumerate(forms):
        path = tmp_path / f"{n}.{kind}"
        pq.write_table(pa.Table.from_pylist([row]), path) if kind == "parquet" else write_jsonl(path, [row])
        found = preferences(tiny, ctx, path=DataPath(str(path)))
        assert pairs_in(found) == {("Hi", "Yes.", "No."): 1}
        assert found[0]["prompt_id"].to_pylist() == [prompt_id("Hi")]
    assert reasons(ctx) == []


def test_columns_of_other_names_are_the_readers_options(tiny, ctx, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"q": "Hi", "good": "Yes.", "bad": "No."}])
    reader = preference_reader.bind({"name": "columns", "prompt": "q", "chosen": "good", "rejected": "bad"})
    assert pairs_in(preferences(tiny, ctx, path=DataPath(str(path)), reader=reader)) == {("Hi", "Yes.", "No."): 1}


def test_a_shared_conversation_is_the_prompt_whatever_stands_in_it():
    """A system turn and earlier turns stay messages."""
    row = {"chosen": [*LONG, assistant("Yes.")], "rejected": [*LONG, assistant("No.")]}
    assert read("implicit_prompt", row) == Comparison(LONG, "Yes.", "No.")
    assert read("columns", row | {"prompt": LONG}) == Comparison(LONG, "Yes.", "No.")


def test_an_implicit_prompt_in_text_ends_before_the_word_in_which_the_sides_part():
    """Characters alone would leave `ue.` and `ack.`; a side that ends where the other goes on loses no word."""
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert read("implicit_prompt", row) == Comparison("The sky is", " blue.", " black.")
    row = {"chosen": "The sky is", "rejected": "The sky is blue."}
    assert read("implicit_prompt", row) == Comparison("The sky", " is", " is blue.")
    assert refused("implicit_prompt", {"chosen": "Yes.", "rejected": "No."}) == "chosen and rejected share no prompt"
    assert refused("implicit_prompt", HH) == "a transcript, which reader hh reads"


@given(st.text("ab \n", min_size=1, max_size=30), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_an_implicit_prompt_and_its_replies_are_the_two_texts(shared, one, other):
    """prompt + reply = the side that was given, and the prompt is shared; or the row is left out."""
    row = {"chosen": shared + one, "rejected": shared + other}
    try:
        made = read("implicit_prompt", row)
    except ValueError:
        return
    assert (made.prompt + made.chosen, made.prompt + made.rejected) == (row["chosen"], row["rejected"])
    assert made.chosen[0].isspace()


# PKU-SafeRLHF

PKU = {"prompt": "How?", "response_0": "So.", "response_1": "Do not.", "better_response_id": 0, "safer_response_id": 1,
       "is_response_0_safe": False, "is_response_1_safe": True}  # fmt: skip


def test_helpful_or_safer_is_said_and_has_no_default():
    """The two labels disagree in many rows: which one is meant is the user's to say."""
    assert read({"name": "pku_saferlhf", "prefer": "helpful"}, PKU) == Comparison("How?", "So.", "Do not.")
    assert read({"name": "pku_saferlhf", "prefer": "safer"}, PKU) == Comparison("How?", "Do not.", "So.")
    with pytest.raises(WinnowError, match="prefer: required"):
        preference_reader.bind("pku_saferlhf")
    unlabelled = PKU | {"safer_response_id": -1}
    assert refused({"name": "pku_saferlhf", "prefer": "safer"}, unlabelled) == "safer_response_id is neither 0 nor 1"


# HelpSteer


def rated(prompt, response, helpfulness, verbosity=2):
    rest = dict.fromkeys(("correctness", "coherence", "complexity"), 3)
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity, **rest}


def test_ratings_are_paired_within_neighbours_of_one_prompt(tiny, ctx, tmp_path):
    """Ties are dropped, and so is a row alone; what follows is not shifted by it. One prompt may come twice."""
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
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", rows)))
    found = preferences(tiny, ctx, path=path, reader="helpsteer2")
    assert pairs_in(found) == {("a", "Best.", "Worst."): 1, ("d", "High.", "Low."): 1, ("d", "Higher.", "Lower."): 1}
    assert reasons(ctx) == [
        ("in.jsonl:3", "tie in helpfulness"),
        ("in.jsonl:5", "no second response to this prompt beside it"),
        ("in.jsonl:10", "helpfulness is not a number"),
        ("in.jsonl:12", "empty response"),
        ("in.jsonl:14", "no second response to this prompt beside it"),
    ]
    verbose = preference_reader.bind({"name": "helpsteer2", "by": "verbosity"})
    assert pairs_in(preferences(tiny, space(tmp_path), path=path, reader=verbose)) == {("d", "Low.", "High."): 1}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), max_size=12))
def test_every_rating_is_in_one_pair_or_in_one_reject(rows):
    """Couples partition the rows in their order, and never join two prompts."""
    given_rows = [(str(n), {"prompt": prompt, "n": n}) for n, (prompt, _) in enumerate(rows)]
    groups = list(_couples(iter(given_rows), "prompt"))
    assert [row["n"] for _, group in groups for row in group] == list(range(len(rows)))
    assert all(len({row["prompt"] for row in group}) == 1 and len(group) <= 2 for _, group in groups)
    alone = [group[0] for _, group in groups if len(group) == 1]
    assert not any(one["n"] + 1 == two["n"] and one["prompt"] == two["prompt"] for one in alone for two in alone)


STEERED = "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nA boat\nfor two"


@pytest.mark.parametrize("strength", [-3, -1, 0, 1, 3, None])
def test_a_strength_below_zero_prefers_the_first_and_zero_is_no_pair(strength):
    """Both later forms of HelpSteer; the turns of a long prompt, and a context that is a list of them or text."""
    two = {"prompt": STEERED, "response_1": "One.", "response_2": "Two.", "preference_strength": strength}
    three = {"response1": "One.", "response2": "Two.", "overall_preference": strength}
    turns: Any = [user("Hi"), assistant("Yes?"), user("A boat\nfor two")]
    cases = [
        ("helpsteer2_preference", two, turns, "preference_strength"),
        ("helpsteer3", three | {"context": turns}, turns, "overall_preference"),
        ("helpsteer3", three | {"context": turns[:1]}, "Hi", "overall_preference"),
        ("helpsteer3", three | {"context": "Hi"}, "Hi", "overall_preference"),
    ]
    for reader, row, prompt, name in cases:
        if strength is None:
            assert refused(reader, row) == f"{name} is not a number"
        elif strength == 0:
            assert refused(reader, row) == f"tie in {name}"
        else:
            sides = ("One.", "Two.") if strength < 0 else ("Two.", "One.")
            assert read(reader, row) == Comparison(prompt, *sides)


# The prompts of such files


def test_prompts_of_pairs_have_the_ids_that_the_pairs_have(tiny, ctx, tmp_path):
    """A prompt of several pairs stands once; the chosen reply is a demonstration if that is asked for."""
    other = HH | {"rejected": HH["rejected"] + " No."}
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", [HH, other])))
    asked, answers, _ = preferences(tiny, ctx, path=path, reader="hh")
    plain, shown = (prompts(tiny, ctx, path=path, reader="hh", demonstration=d) for d in (None, "chosen"))
    assert plain.equals(asked)
    (row,) = shown.to_pylist()
    assert row["demonstration"] == "I can."
    assert row["demonstration_ids"] in answers["token_ids"].to_pylist()
    assert reasons(ctx) == [("in.jsonl:2", "duplicate prompt")] * 2


def test_with_a_reader_the_demonstration_is_the_chosen_reply(tmp_path):
    """At plan time; another column is not read."""
    check = entry_of(prompts).metadata["signature"].check
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", [HH])))
    options: dict[str, Any] = dict(path=path, dataset=None, revision=None, subset=None, part="train", prompt="prompt")
    options["reader"] = preference_reader.bind("hh")
    assert check(options | {"demonstration": "chosen"}, {}) == check(options | {"demonstration": None}, {}) == []
    assert "set it to chosen, or to null (got 'answer')" in check(options | {"demonstration": "answer"}, {})[0]


# Files that are something else


def problems(path, reader="columns"):
    check = entry_of(preferences).metadata["signature"].check
    given_options = dict(path=DataPath(str(path)), dataset=None, revision=None, subset=None, part="train")
    return check(given_options | {"reader": preference_reader.bind(reader)}, {})


RED_TEAM = {"transcript": "\n\nHuman: x", "min_harmlessness_score_transcript": -1.0, "num_params": "52B", "rating": 4.0,
            "task_description": "x", "tags": None}  # fmt: skip
UNPAIRED = {"prompt": "Hi", "completion": "Yes.", "label": True}
AXIS = {"info": REDDIT, "summary": {"text": "Short.", "axes": {"overall": 4}}, "worker": "w"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (RED_TEAM, "red-team-attempts, which are no preferences; take another folder"),
        (UNPAIRED, "TRL's unpaired format, which has no pairs; it is read by stage own_candidates"),
        (AXIS, "axis, ratings of single summaries; take `subset: comparisons`"),
        (HH, "no column 'prompt'; it has 'chosen', 'rejected'; `reader` can be implicit_prompt or ultra.* or hh"),
        (PKU, "no column 'chosen', 'rejected'; it has .*; `reader` can be pku_saferlhf for these"),
        (rated("a", "Yes.", 3), "`reader` can be helpsteer2 for these"),
        ({"prompt": "Hi", "other": 1}, "no column 'chosen', 'rejected'; it has 'prompt', 'other'$"),
    ],
)
def test_a_file_of_another_format_is_refused_by_its_name(tiny, ctx, tmp_path, kind, row, words):
    """A file at plan time, before any model is trained; a folder where it is read. The next move is in the message."""
    path = tmp_path / "data"
    path.mkdir()
    file = path / f"in.{'parquet' if kind == 'parquet' else 'jsonl'}"
    pq.write_table(pa.Table.from_pylist([row]), file) if kind == "parquet" else write_jsonl(file, [row])
    with pytest.raises(WinnowError, match=words):
        preferences(tiny, ctx, path=DataPath(str(path if kind == "folder" else file)))
    if kind == "folder":
        assert problems(path) == []
    else:
        assert re.search(words, problems(file)[0])


def test_unpaired_labels_enter_as_candidates_with_rewards(tiny, ctx, tmp_path):
    """The next move that the refusal names is one that works."""
    path = DataPath(
        str(write_jsonl(tmp_path / "in.jsonl", [UNPAIRED, UNPAIRED | {"completion": "No.", "label": False}]))
    )
    _, answers, rewards = own_candidates(tiny, ctx, path=path, response="completion", reward="label")
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    assert {text[row["candidate_id"]]: row["reward"] for row in rewards.to_pylist()} == {"Yes.": 1.0, "No.": 0.0}


GOOD = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}


def test_a_column_that_the_first_rows_lack_is_still_a_column(tmp_path):
    """In JSONL it is where a row has it; bad lines on the way are no rows."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Hi"}\noops\n' + json.dumps(GOOD) + "\n")
    assert problems(path) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.jsonl", gzip.compress(b'{"prompt": "Hi"}\n'), "in.jsonl: this is gzip; end its name in .gz"),
        ("in.jsonl", b"PAR1 and more", "this is Parquet; end its name in .parquet"),
        ("in.csv", b"PK\x03\x04 and more", "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV"),
        ("in.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("in.jsonl", b"\n<!DOCTYPE html><html>", "a web page; download the file itself"),
        ("in.csv", "prompt".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("in.jsonl.gz", b'{"prompt": "Hi"}\n', "in.jsonl.gz: not a whole JSONL file .*fetch or write it again"),
        ("in.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 99)[:-9], "in.jsonl.gz: not a whole JSONL file"),
        ("in.parquet", b"PAR1 and no more", "in.parquet: not a whole Parquet file .*fetch or write it again"),
        ("in.parquet", b"", "in.parquet: not a whole Parquet file"),
        ("in.jsonl", b'[\n{"prompt": "Hi"},\n{"prompt": "Ho"}\n]\n', "one JSON list; write one object a line"),
        ("in.jsonl", b"Hi\nHo\n", "no row in it, and a row of JSONL is one JSON object on a line"),
        ("in.jsonl", b"", "no row in it"),
        ("in.csv", b"", "no row in it"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_refused_at_plan_time(tmp_path, name, content, words):
    """Each with its name, the cause, and the next move."""
    path = tmp_path / name
    path.write_bytes(content)
    (said,) = problems(path)
    assert said.startswith(f"{name}: ")
    assert re.search(words, said)


def test_damage_in_the_middle_of_a_parquet_file_ends_the_reading_with_its_place(ctx, tmp_path):
    """The footer is whole, so that planning sees a good file; the second row group's pages are not."""
    path = tmp_path / "in.parquet"
    rows = [{"prompt": f"{n} " * 20} for n in range(9000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4096, compression="zstd")
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[: start - 40] + bytes(4000) + whole[start + 3960 :])
    source, found = Source(DataPath(str(path))), list[Any]()
    with pytest.raises(
        WinnowError, match=r"in.parquet: cannot be read on after in.parquet:4095 .*fetch or write it again"
    ):
        found.extend(source.rows(ctx, ["prompt"]))
    assert len(found) == 4096


def test_a_packed_file_that_is_cut_short_ends_the_reading_with_its_place(ctx, tmp_path):
    """Beyond the head that planning looks at."""
    path = tmp_path / "in.jsonl.gz"
    lines = "".join(json.dumps({"prompt": f"{n} {n * 7919 % 10007}"}) + "\n" for n in range(20_000))
    packed = gzip.compress(lines.encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(WinnowError, match=r"cannot be read on after in\.jsonl\.gz:\d{4,} .*cut short"):
        list(Source(DataPath(str(path))).rows(ctx, ["prompt"]))


def folder_of(tmp_path: Path) -> Path:
    """A data set with two configurations, one of them without pairs, and a folder beside them."""
    folder = tmp_path / "set"
    for name, row in (("comparisons", GOOD), ("axis", AXIS), ("helpful-base", GOOD | {"prompt": "Ho"})):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "train.jsonl", [row])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("comparisons", "axis"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.mark.parametrize(("subset", "prompt"), [("comparisons", "Hi"), ("helpful-base", "Ho")])
def test_a_subset_is_a_configuration_or_a_folder(tiny, ctx, tmp_path, subset, prompt):
    """hh-rlhf and HelpSteer2 have folders, summarize_from_feedback and HelpSteer3 configurations."""
    found = preferences(tiny, ctx, path=DataPath(str(folder_of(tmp_path))), subset=subset)
    assert pairs_in(found) == {(prompt, "Yes.", "No."): 1}


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tiny, ctx, tmp_path):
    with pytest.raises(WinnowError, match=r"no split 'test'; it has 'train': set `part`"):
        preferences(tiny, ctx, path=DataPath(str(folder_of(tmp_path))), subset="comparisons", part="test")


def test_a_data_set_that_is_a_script_says_where_its_parquet_is(tiny, ctx, tmp_path):
    """summarize_from_feedback is one; `datasets` runs no scripts."""
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("import datasets\n")
    write_jsonl(folder / "in.jsonl", [GOOD])
    with pytest.raises(WinnowError, match=r"scripts are no longer supported.*revision: refs/convert/parquet"):
        preferences(tiny, ctx, path=DataPath(str(folder)))


@pytest.mark.parametrize("name", sorted(preference_reader.entries))
def test_every_reader_says_where_its_format_comes_from_and_what_it_reads(name):
    """README's table is made of these; a reader without columns would read a file of anything."""
    entry = preference_reader.entries[name]
    assert entry.metadata["columns"]
    assert entry.fn.__doc__

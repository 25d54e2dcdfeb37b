"""Where data enters: formats, rows that are left out one by one with reason and place, BOS and EOS exactly once."""

import json
import math
import random
import shutil
from collections import Counter
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pipeline.context import StageContext, WarmCache
from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import Model, WinnowError, conform
from schemas.tables import CANDIDATES, PAIRS, PROMPTS, REWARDS
from stages.data.files import one_source, text_of
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.tokenizer import Tokenizer, readable
from tests.conftest import write_jsonl

ROWS = [{"prompt": f"Ask {n}, é “{n}”\nplease.", "extra": n} for n in range(6)]
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def reasons(ctx):
    return [(row["place"], row["reason"]) for row in ctx.rejects.to_pylist()]


def texts(table):
    return sorted(conform(table, PROMPTS).column("text").to_pylist())


@pytest.fixture(autouse=True)
def no_home(tmp_path, monkeypatch):
    """`datasets` keeps its cache in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write_csv(path, rows):
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def sources_of(folder, rows):
    """The same rows as JSONL, CSV, Parquet, a folder of JSONL, and what `save_to_disk` writes."""
    folder.mkdir(exist_ok=True)
    inside = folder / "files"
    inside.mkdir()
    write_jsonl(inside / "part.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {
        "jsonl": write_jsonl(folder / "rows.jsonl", rows),
        "csv": write_csv(folder / "rows.csv", rows),
        "parquet": folder / "rows.parquet",
        "folder": inside,
        "saved": folder / "saved",
    }


KINDS = ["jsonl", "csv", "parquet", "folder", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_prompts(tiny, ctx, tmp_path, kind):
    """Ids, tokens and split come from the content of the row alone, not from the file around it."""
    paths = sources_of(tmp_path / "data", ROWS)
    found = conform(prompts(tiny, ctx, path=DataPath(str(paths[kind]))), PROMPTS)
    assert found.equals(conform(prompts(tiny, ctx, path=DataPath(str(paths["jsonl"]))), PROMPTS))
    assert texts(found) == sorted(str(row["prompt"]) for row in ROWS)
    assert len(ctx.rejects) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_the_column_is_refused_naming_what_it_has(tiny, ctx, tmp_path, kind):
    """The next move is a name from the list."""
    path = sources_of(tmp_path / "data", ROWS)[kind]
    with pytest.raises(WinnowError, match=r"no column 'question'; it has .*'extra'|no column 'question'.*'prompt'"):
        prompts(tiny, ctx, path=DataPath(str(path)), prompt="question")


def test_a_file_that_is_not_what_its_name_says_is_refused(tiny, ctx, tmp_path):
    """A torn Parquet file has no rows to save: an error with its name; a missing split names the split."""
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and no more")
    with pytest.raises(WinnowError, match=r"torn\.parquet: not a whole Parquet file .*fetch or write it again"):
        prompts(tiny, ctx, path=DataPath(str(torn)))
    folder = sources_of(tmp_path / "data", ROWS)["folder"]
    with pytest.raises(WinnowError, match="split 'nowhere'"):
        prompts(tiny, ctx, path=DataPath(str(folder)), part="nowhere")


BAD_LINES = [
    (b'{"prompt": "good 1"}', None),
    (b'{"prompt": "bad \xff\xfe"}', "bad UTF-8"),
    (b'{"prompt": "torn', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["prompt"]', "not a JSON object"),
    (b"", None),
    (b'{"other": 1}', "no prompt"),
    (b'{"prompt": null}', "no prompt"),
    (b'{"prompt": "  \\n"}', "empty prompt"),
    (b'{"prompt": 7}', "prompt is not text"),
    (b'{"prompt": {"role": "user"}}', "prompt is not text"),
    (b'{"prompt": []}', "empty prompt"),
    (b'{"prompt": ["a"]}', "prompt is not text"),
    (b'{"prompt": [{"role": "user"}]}', "no content"),
    (b'{"prompt": "half \\ud83d a pair"}', "prompt is not valid Unicode"),
    (b'{"prompt": "good 1"}', "duplicate prompt"),
    (b'{"prompt": "' + b"long " * 300 + b'"}', "prompt too long"),
    (b'{"prompt": "good 2"}', None),
]


def test_each_bad_line_is_left_out_with_reason_and_place_and_the_rest_goes_on(tiny, ctx, tmp_path):
    """Line n of the file is place `name:n`, blank lines counted; the good rows before and after are there."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD_LINES) + b"\n")
    made = prompts(tiny, ctx, path=DataPath(str(path)), max_tokens=200)
    assert texts(made) == ["good 1", "good 2"]
    assert reasons(ctx) == [(f"in.jsonl:{n}", reason) for n, (_, reason) in enumerate(BAD_LINES, 1) if reason]
    assert all(row["detail"] for row in ctx.rejects.to_pylist())


def test_bad_rows_of_csv_and_parquet_are_left_out_one_by_one(tiny, ctx, tmp_path):
    """Bad UTF-8, an empty cell, a row that is too short; nulls. The rest goes on."""
    path = tmp_path / "in.csv"
    path.write_bytes(b'extra,prompt\n1,good 1\n2,bad \xff\n3,\n4\n5,"good 2"\n6,good 1\n')
    assert texts(prompts(tiny, ctx, path=DataPath(str(path)))) == ["good 1", "good 2"]
    assert reasons(ctx) == [
        ("in.csv:3", "bad UTF-8"),
        ("in.csv:4", "empty prompt"),
        ("in.csv:5", "no prompt"),
        ("in.csv:7", "duplicate prompt"),
    ]
    other = StageContext(tmp_path, WarmCache(), lambda done, total, unit: None)
    pq.write_table(pa.table({"prompt": ["good 1", None, "", "good 2"]}), tmp_path / "in.parquet")
    assert texts(prompts(tiny, other, path=DataPath(str(tmp_path / "in.parquet")))) == ["good 1", "good 2"]
    assert reasons(other) == [("in.parquet:1", "no prompt"), ("in.parquet:2", "empty prompt")]


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(tiny, ctx, tmp_path, name):
    """Spreadsheets write one at the start of a file; the first column and the first row are as good as any."""
    body = "prompt\nhello\n" if name.endswith("csv") else '{"prompt": "hello"}\n'
    (tmp_path / name).write_text("\ufeff" + body, encoding="utf-8")
    assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / name)))) == ["hello"]
    assert reasons(ctx) == []


def test_a_huge_cell_is_a_long_prompt_and_not_the_end_of_the_file(tiny, ctx, tmp_path):
    """More than Python's default of 131072 characters in a field of a CSV file."""
    write_csv(tmp_path / "in.csv", [{"prompt": "a " * 70_000}, {"prompt": "good"}])
    assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / "in.csv")))) == ["good"]
    assert reasons(ctx) == [("in.csv:2", "prompt too long")]


@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers())))
def test_text_of_is_the_text_itself_or_a_reason(value):
    """Nothing is stripped, repaired or turned into text."""
    if isinstance(value, str) and value.strip():
        assert text_of({"a": value}, "a") == value
    else:
        with pytest.raises(ValueError, match=r"^(no a|empty a|a is not text)$"):
            text_of({"a": value}, "a")


def test_one_source_at_plan_time(tmp_path):
    """A path or a hub name with its revision; not both, not neither, not a file of another kind."""
    (tmp_path / "in.xlsx").write_text("")
    excel = DataPath(str(tmp_path / "in.xlsx"))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "README.md").write_text("Nothing yet.")
    folder = DataPath(str(tmp_path))
    for path, dataset, revision, word in [
        (None, None, None, "either"),
        (folder, "a/b", "main", "either"),
        (None, "a/b", None, "needs `revision`"),
        (excel, None, None, "reads .jsonl"),
        (DataPath(str(tmp_path / "empty")), None, None, "empty: a folder without data files (.arrow, "),
    ]:
        assert word in one_source(dict(path=path, dataset=dataset, revision=revision, subset=None), {})[0]
    write_jsonl(tmp_path / "empty" / "deep" / "in.jsonl", ROWS)
    file = DataPath(str(tmp_path / "empty" / "deep" / "in.jsonl"))
    for subset, fine in ((None, True), ("deep", False)):
        assert (one_source(dict(path=file, dataset=None, revision=None, subset=subset), {}) == []) == fine
        assert one_source(dict(path=folder, dataset=None, revision=None, subset=subset), {}) == []
        assert one_source(dict(path=None, dataset="a/b", revision="abc", subset=subset), {}) == []


# Tokens


@pytest.fixture(scope="module")
def tokenizers(tiny, tmp_path_factory):
    """(template, adds BOS itself) -> model folder: the template has BOS, has none, or there is no template."""
    made = {}
    for template in ("with BOS", "without BOS", "none"):
        for adds in (False, True):
            folder = tmp_path_factory.mktemp("tokenizer") / "model"
            shutil.copytree(tiny.folder, folder)
            inner = AutoTokenizer.from_pretrained(folder)
            bos = inner.bos_token
            if adds:
                inner.backend_tokenizer.post_processor = TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, inner.bos_token_id)]
                )
            inner.chat_template = {"with BOS": inner.chat_template, "without BOS": PLAIN_TEMPLATE}.get(template)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            inner.save_pretrained(folder)
            made[template, adds] = Model(folder, f"{template}, {adds}")
    return made


MESSAGES: Any = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "A boat."},
]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("template", ["with BOS", "without BOS", "none"])
def test_bos_stands_once_at_the_start_if_anything_puts_it_there(tokenizers, template, adds):
    """Template with BOS, tokenizer that adds it, or both: once. Neither: never. Nowhere else in the prompt."""
    tokenizer = Tokenizer(tokenizers[template, adds])
    assert (tokenizer.inner("x")["input_ids"][0] == tokenizer.inner.bos_token_id) == adds
    bos, wanted = tokenizer.inner.bos_token_id, template == "with BOS" or adds
    for prompt in ["Hello.", *([MESSAGES] if template != "none" else [])]:
        ids = tokenizer.prompt_ids(prompt)
        assert ids.count(bos) == wanted
        assert (ids[0] == bos) == wanted
    if template == "none" and adds:
        assert tokenizer.prompt_ids("<|bos|>Hello.") == tokenizer.prompt_ids("Hello.")


def test_a_template_is_applied_to_strings_as_one_user_message(tokenizers):
    """`Hello.` is [{user: Hello.}]: turn marks around it, and the assistant's turn open at the end."""
    tokenizer = Tokenizer(tokenizers["with BOS", False])
    ids = tokenizer.prompt_ids("Hello.")
    assert ids == tokenizer.prompt_ids([{"role": "user", "content": "Hello."}])
    assert tokenizer.inner.decode(ids) == "<|bos|><|user|>Hello.<|assistant|>"


def test_without_a_template_strings_are_read_as_they_are_and_messages_are_left_out(tokenizers, ctx, tmp_path):
    """There is no template to guess; the row says so, and the others go on."""
    model = tokenizers["none", False]
    tokenizer = Tokenizer(model)
    assert tokenizer.inner.decode(tokenizer.prompt_ids("Hello.")) == "Hello."
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": MESSAGES}, {"prompt": "Hello."}])
    assert texts(prompts(model, ctx, path=DataPath(str(path)))) == ["Hello."]
    assert reasons(ctx) == [("in.jsonl:1", "chat messages, and the tokenizer has no chat template")]


def test_chat_messages_are_the_same_from_jsonl_and_parquet(tiny, ctx, tmp_path):
    """Lists of structs; the prompt for people has the roles."""
    rows = [{"prompt": MESSAGES}, {"prompt": MESSAGES[:1]}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    one, two = (prompts(tiny, ctx, path=DataPath(str(tmp_path / f"in.{kind}"))) for kind in ("jsonl", "parquet"))
    assert one.equals(two)
    assert texts(one) == sorted(["Hello.", "user: Hello.\nassistant: Yes?\nuser: A boat."])
    assert readable(MESSAGES[:1]) == "Hello."


@pytest.mark.parametrize("text", ["Gladly.", "Gladly.<|eos|>", "Gladly.<|eos|><|eos|>"])
def test_a_response_ends_with_eos_once_and_a_cut_one_without(tokenizers, text):
    """ids + EOS if they fit (`stop`), also where the data writes it out; else the first `most`, no EOS (`length`)."""
    tokenizer = Tokenizer(tokenizers["with BOS", True])
    eos, plain = tokenizer.inner.eos_token_id, tokenizer.encode("Gladly.")
    whole = [*plain, eos]
    assert tokenizer.response_ids(text, 99) == (whole, "stop")
    assert tokenizer.response_ids(text, len(whole)) == (whole, "stop")
    assert tokenizer.response_ids(text, len(plain)) == (plain, "length")
    assert tokenizer.response_ids(text, 1) == (plain[:1], "length")
    assert tokenizer.inner.bos_token_id not in whole


def test_demonstrations_have_their_ids_and_a_row_without_one_is_left_out(tiny, ctx, tmp_path):
    """EOS last. One that does not fit is left out, not cut, for its missing end would be learnt; its prompt stays."""
    long = {"prompt": "c", "d": "Yes " * 60}
    rows = [{"prompt": "a", "d": "Yes."}, {"prompt": "b", "d": ""}, long, long]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    made = prompts(tiny, ctx, path=DataPath(str(path)), demonstration="d", max_tokens=30).to_pylist()
    eos = Tokenizer(tiny).inner.eos_token_id
    found = {row["text"]: row["demonstration_ids"] for row in made}
    assert found["a"].count(eos) == 1
    assert found["a"][-1] == eos
    assert found["c"] is None
    assert {row["text"]: row["demonstration"] for row in made} == {"a": "Yes.", "c": None}
    places = [("in.jsonl:2", "empty d"), ("in.jsonl:3", "demonstration too long"), ("in.jsonl:4", "duplicate prompt")]
    assert reasons(ctx) == places


@given(st.integers(9, 40))
def test_a_demonstration_is_whole_or_not_there(tiny, tmp_path_factory, words):
    """n tokens, EOS among them: there with max_tokens = n, and not with n - 1."""
    folder = tmp_path_factory.mktemp("shown")
    space = StageContext(folder, WarmCache(), lambda done, total, unit: None)
    text = "Yes" + " boat" * words
    whole = Tokenizer(tiny).response_ids(text, 999)[0]
    path = write_jsonl(folder / "in.jsonl", [{"prompt": "a", "d": text}])
    for most, expected in [(len(whole), whole), (len(whole) - 1, None)]:
        (row,) = prompts(tiny, space, path=DataPath(str(path)), demonstration="d", max_tokens=most).to_pylist()
        assert row["demonstration_ids"] == expected


# Preferences and own candidates


def test_preferences_leave_out_what_has_no_better_side(tiny, ctx, tmp_path):
    """Identical responses, a missing side, an empty one; the others are pairs of ids in the tables."""
    rows = [
        {"prompt": "a", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "a", "chosen": "Yes.", "rejected": "Perhaps."},
        {"prompt": "a", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "b", "chosen": "Yes."},
        {"prompt": "b", "chosen": "", "rejected": "No."},
        {"prompt": "b", "chosen": "Yes.", "rejected": "No."},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    asked, answers, pairs = preferences(tiny, ctx, path=DataPath(str(path)))
    assert texts(asked) == ["a", "b"]
    text = {row["candidate_id"]: row["text"] for row in conform(answers, CANDIDATES).to_pylist()}
    found = Counter((text[row["chosen_id"]], text[row["rejected_id"]]) for row in conform(pairs, PAIRS).to_pylist())
    assert found == {("Yes.", "No."): 2, ("Yes.", "Perhaps."): 1}
    assert Counter(row["text"] for row in answers.to_pylist())["Yes."] == 2
    assert reasons(ctx) == [
        ("in.jsonl:3", "identical responses"),
        ("in.jsonl:4", "no rejected"),
        ("in.jsonl:5", "empty chosen"),
    ]


SCORES: Any = [
    (0.5, None, None),
    ("0.25", None, None),
    (math.nan, "reward is not finite", "reward is not finite"),
    (math.inf, "reward is not finite", "reward is not finite"),
    (-math.inf, "reward is not finite", "reward is not finite"),
    (10**400, "reward is not a number", "reward is not a number"),
    (0, None, "probability is exactly 0"),
    (1, None, "probability is exactly 1"),
    (1.5, None, "probability is not in (0, 1)"),
    (-0.1, None, "probability is not in (0, 1)"),
    ("high", "reward is not a number", "reward is not a number"),
    (None, "reward is not a number", "reward is not a number"),
    (0.75, None, None),
]


@pytest.mark.parametrize("kind", ["reward", "probability"])
def test_each_bad_score_is_left_out_with_reason_and_place(tiny, ctx, tmp_path, kind):
    """A probability p is the reward ln p - ln(1 - p), infinite at 0 and 1: left out, not clamped."""
    rows = [{"prompt": "a", "response": f"Answer {n}.", "score": value} for n, (value, *_) in enumerate(SCORES)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    _, answers, rewards = own_candidates(tiny, ctx, path=DataPath(str(path)), **{kind: "score"})
    wrong = [reason for _, *reasons_of in SCORES for reason in [reasons_of[kind == "probability"]]]
    assert reasons(ctx) == [(f"in.jsonl:{n}", reason) for n, reason in enumerate(wrong, 1) if reason]
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    found = {text[row["candidate_id"]]: row["reward"] for row in conform(rewards, REWARDS).to_pylist()}
    good = {f"Answer {n}.": float(value) for n, (value, *_) in enumerate(SCORES) if not wrong[n]}
    if kind == "probability":
        good = {name: math.log(p / (1 - p)) for name, p in good.items()}
    assert found == pytest.approx(good)


def test_candidate_ids_do_not_depend_on_the_order_of_rows(tiny, ctx, tmp_path):
    """Hash of prompt, tokens and copy: shuffled rows give the same ids for the same texts; equal ones stay two."""
    rows = [{"prompt": f"p{n % 3}", "response": f"Answer {n % 4}.", "score": float(n % 4)} for n in range(24)]
    shuffled = random.Random(1).sample(rows, len(rows))
    found = []
    for name, content in (("a", rows), ("b", shuffled)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        asked, answers, rewards = own_candidates(tiny, ctx, path=DataPath(str(path)), reward="score")
        text = {row["candidate_id"]: (row["prompt_id"], row["text"]) for row in answers.to_pylist()}
        scores = {row["candidate_id"]: row["reward"] for row in rewards.to_pylist()}
        found.append((asked.to_pylist(), text, scores))
    assert found[0] == found[1]
    assert len(found[0][1]) == 24
    assert Counter(found[0][1].values()) == Counter(dict.fromkeys(found[0][1].values(), 2))


def test_prompt_ids_are_the_contents_under_every_tokenizer(tokenizers, ctx, tmp_path):
    """Another template moves the tokens and not the id or the split: files join across models."""
    path = DataPath(str(write_jsonl(tmp_path / "in.jsonl", ROWS)))
    one, two = (prompts(tokenizers[key, False], ctx, path=path) for key in ("with BOS", "none"))
    for name in ("prompt_id", "split", "text"):
        assert one.column(name).equals(two.column(name))
    assert not one.column("token_ids").equals(two.column("token_ids"))


def test_a_reward_or_a_probability_is_named_and_not_both():
    """At plan time."""
    check = entry_of(own_candidates).metadata["signature"].check
    given_path = dict.fromkeys(("path", "subset")) | dict(dataset="a/b", revision="abc", part="train")
    given_path |= dict(prompt="prompt", response="response")
    assert check(given_path | dict(reward="r", probability=None), {}) == []
    assert "either the `reward`" in check(given_path | dict(reward=None, probability=None), {})[0]
    (both,) = check(given_path | dict(reward="r", probability="p"), {})
    assert [word for word in ("'r'", "'p'", "--set own_candidates.probability=null") if word not in both] == []


@pytest.mark.parametrize("kind", ["reward", "probability"])
def test_a_row_without_its_score_is_left_out_and_a_column_that_no_row_has_is_named(tiny, ctx, tmp_path, kind):
    """In JSONL a column is where a row has it; in Parquet and CSV a header says so."""
    whole = [{"prompt": "a", "response": f"Answer {n}.", "score": 0.25 + n / 8} for n in range(3)]
    path = write_jsonl(tmp_path / "in.jsonl", [*whole, {"prompt": "a", "response": "No score."}])
    _, answers, rewards = own_candidates(tiny, ctx, path=DataPath(str(path)), **{kind: "score"})
    assert (answers.num_rows, rewards.num_rows) == (3, 3)
    assert reasons(ctx) == [("in.jsonl:4", "reward is not a number")]
    table = pa.Table.from_pylist([*whole, {"prompt": "a", "response": "No score.", "score": None}])
    pq.write_table(table, tmp_path / "in.parquet")
    pa.csv.write_csv(table, tmp_path / "in.csv")
    for file in (path, tmp_path / "in.parquet", tmp_path / "in.csv"):
        assert own_candidates(tiny, ctx, path=DataPath(str(file)), **{kind: "score"})[2].num_rows == 3
        with pytest.raises(WinnowError, match=rf"{file.name}: no column 'p'; it has .*'score'"):
            own_candidates(tiny, ctx, path=DataPath(str(file)), **{kind: "p"})


def test_places_are_lines_that_json_agrees_with(tmp_path, tiny, ctx):
    """The line a reject names is the one to look at in the file."""
    lines = [json.dumps({"prompt": f"p{n}"}) for n in range(8)]
    lines[5] = "oops"
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    prompts(tiny, ctx, path=DataPath(str(path)))
    ((place, reason),) = reasons(ctx)
    assert reason == "not JSON"
    assert path.read_text().splitlines()[int(place.split(":")[1]) - 1] == "oops"

"""Files of users: formats, rows that are rejected one by one with reason and location, BOS and EOS exactly once."""

import gzip
import math
import random
import shutil
import unicodedata
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
from schemas import Model, WinnowError, WinnowWarning, conform
from schemas.tables import CANDIDATES, PAIRS, PROMPTS, REWARDS
from stages.data.file_rows import file_rows
from stages.data.files import DataSource, check_source
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.texts import readable, text_of
from stages.data.tokenizer import Tokenizer
from tests.conftest import write_jsonl
from tests.hub import add_snapshot
from tests.runs import plan_of

ROWS = [{"prompt": f"Ask {n}, é “{n}”\nplease.", "extra": n} for n in range(6)]
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def reasons(ctx):
    return [(row["place"], row["reason"]) for row in ctx.rejects.to_pylist()]


def texts(table):
    return sorted(conform(table, PROMPTS).column("text").to_pylist())


def jsonl(folder, rows, name="in.jsonl"):
    return DataPath(str(write_jsonl(folder / name, rows)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same rows as JSONL, CSV, Parquet, a folder of JSONL, and a folder written by `save_to_disk`."""
    folder = tmp_path_factory.mktemp("sources")
    table = pa.Table.from_pylist(ROWS)
    (folder / "files").mkdir()
    write_jsonl(folder / "files" / "part.jsonl", ROWS)
    write_jsonl(folder / "rows.jsonl", ROWS)
    pa.csv.write_csv(table, folder / "rows.csv")
    pq.write_table(table, folder / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return [DataPath(str(folder / name)) for name in ("rows.jsonl", "rows.csv", "rows.parquet", "files", "saved")]


def test_every_format_gives_the_same_prompts(tiny, ctx, sources):
    """Ids, tokens and split come from the content of the row alone, not from the file around it."""
    tables = [conform(prompts(tiny, ctx, path=path), PROMPTS) for path in sources]
    assert all(table.equals(tables[0]) for table in tables)
    assert texts(tables[0]) == sorted(str(row["prompt"]) for row in ROWS)
    assert len(ctx.rejects) == 0


def test_a_missing_column_or_split_is_refused_with_those_that_exist(tiny, ctx, sources):
    for path in sources:
        with pytest.raises(WinnowError, match=r"no column 'question'; it has .*'(prompt|extra)'"):
            prompts(tiny, ctx, path=path, prompt="question")
    with pytest.raises(WinnowError, match=r"split 'test'.* it has 'train'; set `dataset_split`"):
        prompts(tiny, ctx, path=sources[3], dataset_split="test")


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
    (b'{"prompt": " \\u200b\\ufeff\\u00ad"}', "empty prompt"),
    (b'{"prompt": "one", "prompt": "two"}', "a key twice"),
    (b'{"prompt": [{"role": "user", "content": "one", "content": "two"}]}', "a key twice"),
    (b'{"a": {"b": 1, "b": 2}, ', "not JSON"),
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


def test_a_second_line_with_as_many_commas_as_a_row_is_text(tmp_path):
    text = "Dear all,\nred, green, blue, and more"
    (tmp_path / "in.csv").write_text(f'prompt,a,b,c\nHi,1,2,"{text}"\n')
    rejected = list[str]()
    with pytest.warns(WinnowWarning, match="if a quote is missing there"):
        rows = list(file_rows(tmp_path / "in.csv", [], lambda reason, **_: rejected.append(reason)))
    assert ([row["c"] for _, row in rows], rejected) == ([text], [])


def test_a_line_of_just_the_limit_takes_no_row_with_it(tmp_path, monkeypatch):
    path = jsonl(tmp_path, [{"prompt": "a" * 20}, {"prompt": "b"}, {"prompt": "c"}]).path
    monkeypatch.setattr("stages.data.file_rows.LONGEST_ROW", path.read_bytes().index(b"\n") + 1)
    rows = file_rows(path, [], reject=lambda *args, **kwargs: None)
    assert [row["prompt"] for _, row in rows] == ["a" * 20, "b", "c"]


def test_a_file_of_one_line_that_is_too_long_is_refused_when_the_plan_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.data.file_rows.LONGEST_ROW", 100)
    (problem,) = DataSource(path=jsonl(tmp_path, [{"prompt": "a" * 500}])).check(["prompt"])
    assert problem.startswith("in.jsonl: no rows")


def test_each_bad_line_is_rejected_with_reason_and_location_and_the_rest_goes_on(tiny, ctx, tmp_path):
    """Line n of the file is location `name:n`, blank lines counted; the good rows before and after are there."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD_LINES) + b"\n")
    table = prompts(tiny, ctx, path=DataPath(str(path)), max_tokens=200)
    assert texts(table) == ["good 1", "good 2"]
    assert reasons(ctx) == [(f"in.jsonl:{n}", reason) for n, (_, reason) in enumerate(BAD_LINES, 1) if reason]
    assert all(row["detail"] for row in ctx.rejects.to_pylist())


def test_bad_rows_of_csv_and_parquet_are_rejected_one_by_one(tiny, ctx, tmp_path):
    """Bad UTF-8, an empty cell, a short row, a cell beyond Python's default of 131072 characters; nulls."""
    path = tmp_path / "in.csv"
    huge = b"a " * 70_000
    path.write_bytes(b'extra,prompt\n1,good 1\n2,bad \xff\n3,\n4\n5,"good 2"\n6,good 1\n7,' + huge + b"\n8,good 3\n")
    assert texts(prompts(tiny, ctx, path=DataPath(str(path)))) == ["good 1", "good 2", "good 3"]
    assert reasons(ctx) == [
        ("in.csv:3", "bad UTF-8"),
        ("in.csv:4", "empty prompt"),
        ("in.csv:5", "no prompt"),
        ("in.csv:7", "duplicate prompt"),
        ("in.csv:8", "prompt too long"),
    ]
    ctx = StageContext(tmp_path, WarmCache(), lambda *progress: None)
    pq.write_table(pa.table({"prompt": ["good 1", None, "", "good 2"]}), tmp_path / "in.parquet")
    assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / "in.parquet")))) == ["good 1", "good 2"]
    assert reasons(ctx) == [("in.parquet:1", "no prompt"), ("in.parquet:2", "empty prompt")]


def test_a_byte_order_mark_is_no_part_of_the_data(tiny, ctx, tmp_path):
    """Spreadsheets write one at the start of a file; the first column and the first row are as good as any."""
    for name, body in (("in.csv", "prompt\nhello\n"), ("in.jsonl", '{"prompt": "hello"}\n')):
        (tmp_path / name).write_text("\ufeff" + body, encoding="utf-8")
        assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / name)))) == ["hello"]
    assert reasons(ctx) == []


@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers())))
def test_text_of_is_the_text_itself_or_a_reason(value):
    """Nothing is stripped, repaired or turned into text."""
    if isinstance(value, str) and any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in value):
        assert text_of({"a": value}, "a") == value
    else:
        with pytest.raises(ValueError, match=r"^(no a|empty a|a is not text)$"):
            text_of({"a": value}, "a")


def test_one_source_is_required_at_plan_time(tmp_path):
    """A path or a hub name with its revision; not both, not neither, not a file of another kind."""
    (tmp_path / "in.xlsx").write_text("")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "README.md").write_text("Nothing yet.")
    excel, folder, empty = (DataPath(str(tmp_path / name)) for name in ("in.xlsx", ".", "empty"))
    for source, words in [
        (DataSource(), "either"),
        (DataSource(folder, "a/b", "main"), "either"),
        (DataSource(dataset="a/b"), "needs `revision`"),
        (DataSource(excel), "reads .jsonl"),
        (DataSource(empty), "empty: a folder without data files (.arrow, "),
    ]:
        assert words in source.check([])[0]
    file = jsonl(tmp_path / "empty" / "deep", ROWS)
    assert DataSource(file).check(["prompt"]) == []
    assert "only folders and data sets have subsets" in DataSource(file, subset="deep").check(["prompt"])[0]
    for subset in (None, "empty/deep"):
        assert DataSource(folder, subset=subset).check([]) == []
        assert DataSource(dataset="a/b", revision="abc", subset=subset).check([]) == []


# Tokens


@pytest.fixture(scope="module")
def tokenizers(tiny, tmp_path_factory):
    """(template, adds BOS itself) -> model folder: the template has BOS, has none, or there is no template."""
    models = {}
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
            models[template, adds] = Model(folder, f"{template}, {adds}")
    return models


MESSAGES: Any = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "A boat."},
]


def test_bos_is_what_the_template_writes_or_without_one_what_the_tokenizer_adds(tokenizers):
    """A tokenizer adds BOS to plain text; `apply_chat_template` (and vLLM's chat, and TRL) adds nothing to a chat."""
    for (template, adds), model in tokenizers.items():
        tokenizer = Tokenizer(model)
        bos, expected = tokenizer.inner.bos_token_id, template == "with BOS" or (template == "none" and adds)
        assert (tokenizer.inner("x")["input_ids"][0] == bos) == adds
        for prompt in ["Hello.", *([MESSAGES] if template != "none" else [])]:
            ids = tokenizer.prompt_ids(prompt)
            assert ids.count(bos) == (ids[0] == bos) == expected
            if template != "none":
                chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                assert ids == tokenizer.inner.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if template == "none" and adds:
            assert tokenizer.prompt_ids("<|bos|>Hello.") == tokenizer.prompt_ids("Hello.")


def test_a_template_is_applied_to_strings_as_one_user_message(tokenizers):
    """`Hello.` is [{user: Hello.}]: role tokens around it, and the assistant's turn open at the end."""
    tokenizer = Tokenizer(tokenizers["with BOS", False])
    ids = tokenizer.prompt_ids("Hello.")
    assert ids == tokenizer.prompt_ids([{"role": "user", "content": "Hello."}])
    assert tokenizer.inner.decode(ids) == "<|bos|><|user|>Hello.<|assistant|>"


def test_without_a_template_strings_are_read_as_they_are_and_messages_are_rejected(tokenizers, ctx, tmp_path):
    """There is no template to guess; the row's reason says so, and the others go on."""
    model = tokenizers["none", False]
    tokenizer = Tokenizer(model)
    assert tokenizer.inner.decode(tokenizer.prompt_ids("Hello.")) == "Hello."
    assert texts(prompts(model, ctx, path=jsonl(tmp_path, [{"prompt": MESSAGES}, {"prompt": "Hello."}]))) == ["Hello."]
    assert reasons(ctx) == [("in.jsonl:1", "chat messages, and the tokenizer has no chat template")]


def test_chat_messages_are_the_same_from_jsonl_and_parquet(tiny, ctx, tmp_path):
    """Lists of structs; the prompt for people has the roles."""
    rows = [{"prompt": MESSAGES}, {"prompt": MESSAGES[:1]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    table = prompts(tiny, ctx, path=jsonl(tmp_path, rows))
    assert table.equals(prompts(tiny, ctx, path=DataPath(str(tmp_path / "in.parquet"))))
    assert texts(table) == sorted(["Hello.", "user: Hello.\nassistant: Yes?\nuser: A boat."])
    assert readable(MESSAGES[:1]) == "Hello."


def test_a_response_ends_with_eos_once(tokenizers):
    """Ids and one EOS, also where the data has EOS as text."""
    tokenizer = Tokenizer(tokenizers["with BOS", True])
    plain = tokenizer.encode("Gladly.")
    complete = [*plain, tokenizer.inner.eos_token_id]
    assert tokenizer.inner.bos_token_id not in complete
    for text in ("Gladly.", "Gladly.<|eos|>", "Gladly.<|eos|><|eos|>"):
        assert tokenizer.response_ids("Hello.", text) == complete


def test_a_demonstration_is_complete_with_its_eos_or_rejected(tiny, ctx, tmp_path):
    """n tokens, with EOS, fit max_tokens = n and not n - 1; cut, its missing end would be learnt.

    The prompt stays, with the demonstration of a later row if there is one that can be kept.
    """
    text = "Yes" + " boat" * 20
    rows = [
        {"prompt": "a", "d": "Yes."},
        {"prompt": "b", "d": ""},
        {"prompt": "c", "d": text},
        {"prompt": "c", "d": text},
        {"prompt": "e", "d": ""},
        {"prompt": "e", "d": "Yes."},
    ]
    path, ids = jsonl(tmp_path, rows), Tokenizer(tiny).response_ids("c", text)
    assert ids.count(ids[-1]) == 1
    assert ids[-1] == Tokenizer(tiny).inner.eos_token_id
    for limit, expected in ((len(ids), ids), (len(ids) - 1, None)):
        table = prompts(tiny, ctx, path=path, demonstration="d", max_tokens=limit).to_pylist()
        found = {row["text"]: row["demonstration"] for row in table}
        assert found == {"a": "Yes.", "b": None, "c": expected and text, "e": "Yes."}
        assert [row["demonstration_ids"] for row in table if row["text"] == "c"] == [expected]
    empty, also_empty = ("in.jsonl:2", "empty d"), ("in.jsonl:5", "empty d")
    too_long = [(f"in.jsonl:{n}", "demonstration too long") for n in (3, 4)]
    assert reasons(ctx) == [empty, ("in.jsonl:4", "duplicate prompt"), also_empty, empty, *too_long, also_empty]


# Preferences and own candidates


def test_preferences_reject_rows_without_a_better_side(tiny, ctx, tmp_path):
    """Identical responses, a missing side, an empty one; the others are pairs of ids in the tables."""
    rows = [
        {"prompt": "a", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "a", "chosen": "Yes.", "rejected": "Perhaps."},
        {"prompt": "a", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "b", "chosen": "Yes."},
        {"prompt": "b", "chosen": "", "rejected": "No."},
        {"prompt": "b", "chosen": "Yes.", "rejected": "No."},
    ]
    table, answers, pairs = preferences(tiny, ctx, path=jsonl(tmp_path, rows))
    assert texts(table) == ["a", "b"]
    text = {row["candidate_id"]: row["text"] for row in conform(answers, CANDIDATES).to_pylist()}
    sides = Counter((text[row["chosen_id"]], text[row["rejected_id"]]) for row in conform(pairs, PAIRS).to_pylist())
    assert sides == {("Yes.", "No."): 2, ("Yes.", "Perhaps."): 1}
    assert Counter(text.values())["Yes."] == 2
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
    ("1_0", "reward is not a number", "reward is not a number"),
    ("٣", "reward is not a number", "reward is not a number"),
    ("nan", "reward is not a number", "reward is not a number"),
    (" 2.5e-1 ", None, None),
    (True, None, "reward is not a number"),
    (None, "reward is not a number", "reward is not a number"),
    (0.75, None, None),
]


@pytest.mark.parametrize("column", ["reward", "probability"])
def test_each_bad_score_is_rejected_with_reason_and_location(tiny, ctx, tmp_path, column):
    """A probability p is the reward ln p - ln(1 - p), infinite at 0 and 1: rejected, not clamped."""
    rows = [{"prompt": "a", "response": f"Answer {n}.", "score": value} for n, (value, *_) in enumerate(SCORES)]
    _, answers, rewards = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows), **{column: "score"})
    expected = [row[1 if column == "reward" else 2] for row in SCORES]
    assert reasons(ctx) == [(f"in.jsonl:{n}", reason) for n, reason in enumerate(expected, 1) if reason]
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    reward_by_text = {text[row["candidate_id"]]: row["reward"] for row in conform(rewards, REWARDS).to_pylist()}
    good = {f"Answer {n}.": float(value) for n, (value, *_) in enumerate(SCORES) if not expected[n]}
    if column == "probability":
        good = {name: math.log(p / (1 - p)) for name, p in good.items()}
    assert reward_by_text == pytest.approx(good)


def test_a_list_of_responses_with_a_list_of_scores_is_a_row_for_each(tiny, ctx, tmp_path):
    """Lists of other lengths are rejected, with the row; a list of messages is one response."""
    chat = [{"role": "assistant", "content": "Noon."}]
    lists = [
        {"prompt": "Hi", "response": ["Yes.", "No.", "Yes."], "score": [1.5, -2, 0]},
        {"prompt": "Time?", "response": [chat], "score": [3]},
        {"prompt": "Ho", "response": ["Yes.", "No."], "score": [1]},
        {"prompt": "Ha", "response": ["Yes.", ""], "score": [1, 2]},
    ]
    rows = [
        {"prompt": row["prompt"], "response": text, "score": score}
        for row in (*lists[:2], lists[3])
        for text, score in zip(row["response"], row["score"], strict=True)
        if text
    ]
    of_lists = own_candidates(tiny, ctx, path=jsonl(tmp_path, lists), reward="score")
    expected = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows, "rows.jsonl"), reward="score")
    assert [table.to_pylist() for table in of_lists] == [table.to_pylist() for table in expected]
    assert reasons(ctx) == [
        ("in.jsonl:3", "score is not a list of as many values as response has responses"),
        ("in.jsonl:4[1]", "empty response"),
    ]


def test_candidate_ids_do_not_depend_on_the_order_of_rows(tiny, ctx, tmp_path):
    """Hash of prompt, tokens and copy: shuffled rows give the same ids for the same texts; equal ones stay two."""
    rows = [{"prompt": f"p{n % 3}", "response": f"Answer {n % 4}.", "score": float(n % 4)} for n in range(24)]
    results = []
    for content in (rows, random.Random(1).sample(rows, len(rows))):
        table, answers, rewards = own_candidates(tiny, ctx, path=jsonl(tmp_path, content), reward="score")
        text = {row["candidate_id"]: (row["prompt_id"], row["text"]) for row in answers.to_pylist()}
        scores = {row["candidate_id"]: row["reward"] for row in rewards.to_pylist()}
        results.append((table.to_pylist(), text, scores))
    assert results[0] == results[1]
    assert len(text) == 24
    assert set(Counter(text.values()).values()) == {2}


def test_prompt_ids_are_the_contents_under_every_tokenizer(tokenizers, ctx, tmp_path):
    """Another template moves the tokens and not the id or the split: files join across models."""
    path = jsonl(tmp_path, ROWS)
    one, two = (prompts(tokenizers[template, False], ctx, path=path) for template in ("with BOS", "none"))
    for name in ("prompt_id", "split", "text"):
        assert one.column(name).equals(two.column(name))
    assert not one.column("token_ids").equals(two.column("token_ids"))


def test_a_reward_and_a_probability_are_not_both_read():
    check = entry_of(own_candidates).metadata["signature"].check
    defaults = {name: field.default for name, field in entry_of(own_candidates).options.model_fields.items()}
    options = defaults | dict(dataset="a/b", revision="abc", reward="r")
    assert check(options, {}) == check(options | dict(reward=None), {}) == []
    (both,) = check(options | dict(probability="p"), {})
    assert [word for word in ("'r'", "'p'", "--set own_candidates.probability=null") if word not in both] == []


def test_candidates_without_scores_are_read_as_those_with_them(tiny, ctx, tmp_path):
    """Equal responses stay separate candidates, for a step `reward` to score; no reward is made up."""
    rows = [{"prompt": "a", "response": text, "score": n} for n, text in enumerate(("One.", "One.", "", "Two."))]
    path = jsonl(tmp_path, rows)
    scored, unscored = own_candidates(tiny, ctx, path=path, reward="score"), own_candidates(tiny, ctx, path=path)
    assert all(table.equals(other) for table, other in zip(scored[:2], unscored[:2], strict=True))
    assert (unscored[1].num_rows, scored[2].num_rows, unscored[2].num_rows) == (3, 3, 0)
    assert [reason for _, reason in reasons(ctx)] == ["empty response"] * 2


def test_a_row_without_its_score_is_rejected_and_a_column_that_no_row_has_is_named(tiny, ctx, tmp_path):
    """In JSONL a column exists where a row has it; in Parquet and CSV a header says so."""
    rows: list[dict] = [{"prompt": "a", "response": f"Answer {n}.", "score": 0.25 + n / 8} for n in range(3)]
    rows.append({"prompt": "a", "response": "No score.", "score": None})
    table = pa.Table.from_pylist(rows)
    del rows[-1]["score"]
    write_jsonl(tmp_path / "in.jsonl", rows)
    pq.write_table(table, tmp_path / "in.parquet")
    pa.csv.write_csv(table, tmp_path / "in.csv")
    for column in ("reward", "probability"):
        for file in ("in.jsonl", "in.parquet", "in.csv"):
            path = DataPath(str(tmp_path / file))
            _, answers, rewards = own_candidates(tiny, ctx, path=path, **{column: "score"})
            assert (answers.num_rows, rewards.num_rows) == (3, 3)
            assert ctx.rejects.to_pylist()[-1]["reason"] == "reward is not a number"
            with pytest.raises(WinnowError, match=rf"{file}: no column 'p'; it has .*'score'"):
                own_candidates(tiny, ctx, path=path, **{column: "p"})
    assert len(ctx.rejects) == 6


# Data sets of the hub, by name


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache with the data set org/data: two splits, and a card that names the files of a configuration."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "download"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train.jsonl", ROWS)
    write_jsonl(folder / "data" / "test.jsonl", ROWS[:1])
    card = "---\nconfigs:\n- config_name: few\n  data_files:\n  - {split: train, path: data/test.jsonl}\n---\n"
    (folder / "README.md").write_text(card)
    return add_snapshot(tmp_path / "cache", "org/data", folder, kind="datasets")


def test_a_data_set_that_was_downloaded_is_read_from_the_hubs_cache(tiny, ctx, sources, hub_cache):
    """`hf download --repo-type dataset org/data` is enough: `datasets` itself would need to have read it online."""
    few = prompts(tiny, ctx, dataset="org/data", revision=hub_cache, subset="few")
    assert texts(few) == [str(ROWS[0]["prompt"])]
    folder = prompts(tiny, ctx, dataset="org/data", revision="main", subset="data")
    assert conform(folder, PROMPTS).equals(conform(prompts(tiny, ctx, path=sources[0]), PROMPTS))


def test_a_data_set_that_is_not_there_is_refused_with_the_command_that_fetches_it(tiny, ctx, hub_cache, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(WinnowError, match="`hf download org/none --repo-type dataset --revision v1`"):
        prompts(tiny, ctx, dataset="org/none", revision="v1")


def test_a_folder_of_a_data_sets_name_is_not_taken_for_it(hub_cache, tmp_path):
    (tmp_path / "org" / "data").mkdir(parents=True)
    (problem,) = DataSource(dataset="org/data", revision="main").check([])
    assert "path: ./org/data" in problem


@pytest.mark.parametrize("options", [{"reader": {"name": "unpaired"}}, {"response": "completion", "reward": "label"}])
def test_labels_are_known_as_labels_from_a_reader_and_from_a_column(tiny, ctx, tmp_path, options):
    """A rule that is for the right ones must not take the best of a prompt whose responses are all wrong."""
    rows = [{"prompt": "a", "completion": f"Answer {n}.", "label": n == 0} for n in range(3)]
    _, _, rewards = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows), **options)
    assert set(rewards.column("label_threshold").to_pylist()) == {0.5}


def test_a_label_is_true_or_false_or_0_or_1(tiny, ctx, tmp_path):
    """Anything else is a rating, and no label: a gap of 8 between two of them would decide a pair."""
    labels = [True, False, 1, 0.0, "true", "False", "1", 3, -5, 0.7, "1_0", "yes", None, [1]]
    rows = [{"prompt": "a", "completion": f"Answer {n}.", "label": label} for n, label in enumerate(labels)]
    _, answers, rewards = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows), reader={"name": "unpaired"})
    text = {row["candidate_id"]: row["text"] for row in answers.to_pylist()}
    reward_by_text = {text[row["candidate_id"]]: row["reward"] for row in rewards.to_pylist()}
    assert [reward_by_text.get(f"Answer {n}.") for n in range(7)] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert [place for place, _ in reasons(ctx)] == [f"in.jsonl:{n}" for n in range(8, 15)]


def test_a_reader_beside_columns_names_the_line_that_lets_it_read(tmp_path):
    """Recipes set columns too, as kto_direct does: only their defaults, written out, outrank these."""
    check = entry_of(own_candidates).metadata["signature"].check
    options = {name: field.default for name, field in entry_of(own_candidates).options.model_fields.items()}
    options |= dict(dataset="a/b", revision="abc", reader="unpaired", response="completion", reward="label")
    (problem,) = check(options, {})
    assert "`response: response, reward: null`" in problem


# Folders


def test_a_file_is_read_alike_by_itself_and_in_a_folder(tiny, ctx, tmp_path):
    """Responses such as "None", "NA" and "007" are text; a cell without one is rejected; files are one table."""
    rows = [("a", "None", "NA"), ("b", "007", "1.50"), ("c", "null", "true"), ("d", "", "x")]
    lines = ["prompt,chosen,rejected", *map(",".join, rows)]
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    for file, some in (("in.csv", lines), ("parts/a.csv", lines[:3]), ("parts/deep/b.csv", [lines[0], *lines[3:]])):
        (tmp_path / file).write_text("\n".join(some) + "\n")
    by_file, by_folder = (preferences(tiny, ctx, path=DataPath(str(tmp_path / name))) for name in ("in.csv", "parts"))
    assert all(one.equals(other) for one, other in zip(by_file, by_folder, strict=True))
    assert by_file[2].num_rows == 3
    assert reasons(ctx) == [("in.csv:5", "empty chosen"), ("deep/b.csv:3", "empty chosen")]


def test_json_and_parquet_in_a_folder_keep_their_types(tiny, ctx, tmp_path):
    """`datasets` gives a column one type in all rows: keys that a message lacks, and texts that look like dates."""
    rows = [{"prompt": "a", "day": "2026-01-31"}, {"prompt": MESSAGES, "day": None}]
    for n, row in enumerate(rows):
        jsonl(tmp_path, [row], f"{n}.jsonl")
    table = prompts(tiny, ctx, path=DataPath(str(tmp_path)))
    assert texts(table) == sorted(["a", "user: Hello.\nassistant: Yes?\nuser: A boat."])


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["a.jsonl", "c.jsonl", "b.csv"], ["b.csv"]),
        (["a.jsonl", "c.jsonl", "b.parquet", "d.tsv"], ["b.parquet", "d.tsv"]),
        (["train_a.jsonl", "more.jsonl"], ["more.jsonl"]),
        (["train/a.jsonl", "more.jsonl"], ["more.jsonl"]),
        (["train.jsonl", "test.jsonl"], []),
        (["a.jsonl", "b.json", "c.jsonl.gz", "LICENSE.txt", ".hidden.jsonl", "config.json"], []),
    ],
)
def test_a_file_of_a_folder_that_no_split_reads_is_named_when_the_plan_is_made(tmp_path, names, unread):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
        else:
            (tmp_path / name).write_text('{"prompt": "a"}\n' if ".json" in name else "prompt\na\n")
    listed = check_source(options_of_source(tmp_path), ["prompt"])
    assert not listed if not unread else f"{', '.join(unread)} would not be read" in listed[0]


def test_a_split_that_a_folder_lacks_is_refused_when_the_plan_is_made(tmp_path):
    """A name with `test` in it makes the folder one of that split alone."""
    for name in ("a.jsonl", "my_test_set.jsonl"):
        jsonl(tmp_path, [{"prompt": "a"}], name)
    assert "no split 'train': it has 'test'" in check_source(options_of_source(tmp_path), ["prompt"])[0]


def test_columns_of_a_folder_are_checked_when_the_plan_is_made(tmp_path):
    """A column exists where a file of the split has it."""
    jsonl(tmp_path, [{"prompt": "a"}], "a.jsonl")
    jsonl(tmp_path, [{"prompt": "a", "extra": "b"}], "b.jsonl")
    assert check_source(options_of_source(tmp_path), ["prompt", "extra"]) == []
    assert "no column 'question'" in check_source(options_of_source(tmp_path), ["question"])[0]


def options_of_source(path):
    return dict(path=DataPath(str(path)), dataset=None, revision=None, subset=None, dataset_split="train")


def test_a_validation_share_leaves_the_held_out_prompts_as_they_are(tiny, ctx, tmp_path):
    """The same rows in every split but train, which it is taken from."""
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Book {n} boats."} for n in range(60)])
    splits = [
        {row["text"]: row["split"] for row in prompts(tiny, ctx, path=DataPath(str(path)), **options).to_pylist()}
        for options in ({"heldout": 0.3}, {"heldout": 0.3, "validation": 0.3})
    ]
    moved = {text for text in splits[0] if splits[0][text] != splits[1][text]}
    assert {splits[1][text] for text in moved} == {"validation"}
    assert {splits[0][text] for text in moved} == {"train"}
    assert set(splits[1].values()) == {"train", "heldout", "validation"}


def test_a_validation_share_that_leaves_nothing_to_train_on_is_refused_by_the_plan(data_dir):
    for sets, facts in [
        (["prompts.heldout=0.6", "prompts.validation=0.4"], r"prompts: validation: 0\.4 .*heldout: 0\.6"),
        (["eval_sample.split=validation"], r"split: validation.*`validation: 0\.0`.*such as 0\.1"),
    ]:
        with pytest.raises(WinnowError, match=facts):
            plan_of(data_dir, *sets)


def test_a_column_that_a_step_need_not_have_is_unset(tmp_path):
    """A held-out file is read as the prompts are, and may have no demonstrations."""
    path = DataPath(str(jsonl(tmp_path, [{"prompt": "Hi"}])))
    options = {"path": path, "dataset": None, "revision": None, "subset": None, "dataset_split": "train"}
    options |= {"prompt": "prompt", "demonstration": "answer"}
    (problem,) = check_source(options, ["prompt", "answer"])
    assert (
        "no column 'answer' (option `demonstration`); it has 'prompt'; set `demonstration: null` for a file" in problem
    )
    (problem,) = check_source(options | {"prompt": "question"}, ["question"])
    assert "null" not in problem

"""Formats that people hold: a few rows of each as its real files have them, the texts our own, and the pairs they give.

Every row of `PAIRS` goes through the stage `preferences`, and every row of `LABELS` through `own_candidates`.
"""

import gzip
import json
import re
import warnings
from io import StringIO
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import WinnowError, WinnowWarning
from stages.data import file_rows
from stages.data.formats import PreferencePair, pairs_of, preference_reader
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.trainer_formats import LabelledResponse, candidate_reader
from tests.conftest import write_jsonl
from tests.stages.data.test_files import reasons, texts
from tests.stages.data.test_formats import FULL, assistant, new_context, pairs_in, problems, user, write_rows

SYSTEM = {"role": "system", "content": "Be kind."}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def battle(winner, a="Yes.", b="No.", turn=1, **others):
    sides = {
        f"conversation_{n}": [user("Hi"), assistant(text), user("So?"), assistant("!")]
        for n, text in zip("ab", (a, b), strict=True)
    }
    return {"model_a": "m", "model_b": "n", "winner": winner, "turn": turn, **sides, **others}


def kaggle(prompt, a, b, winner):
    turns = {"prompt": prompt, "response_a": a, "response_b": b}
    wins = {f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")}
    return {"id": 1, "model_a": "m", "model_b": "n"} | {name: json.dumps(texts) for name, texts in turns.items()} | wins


def scored(text, overall, fine, ratings):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {name: {"Rating": rating, "Rationale": "."} for name, rating in zip(aspects, ratings, strict=True)}
    return {"model": "m", "response": text, "overall_score": overall, "fine-grained_score": fine,
            "annotations": annotations, "custom_system_prompt": "Be kind.", "principle": "helpfulness"}  # fmt: skip


def answer(text, rank):
    return {"answer": text, "model": "m", "rank": float(rank)}


def message(name, parent, role, text, rank=None, tree="t"):
    return {"message_id": name, "parent_id": parent, "message_tree_id": tree, "role": role, "text": text, "rank": rank,
            "deleted": False, "lang": "en"}  # fmt: skip


TREE = [
    message("t", None, "prompter", "Hi"),
    message("a", "t", "assistant", "No.", 1),
    message("b", "t", "assistant", "Yes.", 0),
    message("c", "b", "prompter", "So?", 0),
    message("d", "b", "prompter", "What?", 1),
    message("e", "c", "assistant", "Worst.", 2),
    message("f", "c", "assistant", "Best.", 0),
    message("g", "c", "assistant", "Fair.", 1),
    message("h", "d", "assistant", "Alone."),
]


def nested(rows, parent=None):
    return [row | {"replies": nested(rows, row["message_id"])} for row in rows if row["parent_id"] == parent]


UF = {
    "source": "s", "instruction": "Hi", "models": ["m"] * 4, "correct_answers": ["None"],
    "completions": [
        scored("Good.", 8.5, 4.0, "5544"), scored("Best.", 9, 4.5, "5555"), scored("Fair.", 5, 5.0, "3333"),
        scored("Bad.", 2, 1.0, "1111"),
    ],
}  # fmt: skip
NECTAR = {"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: So? \n\nAssistant: ", "turns": 2, "answers": [
    answer("Fair.", 2), answer("Best.", 1), answer("Poor.", 3)]}  # fmt: skip
WEBGPT = {"question": {"dataset": "eli5", "id": "1", "full_text": "Why?"}, "answer_0": "So [1].", "answer_1": "Thus.",
          "quotes_0": {"title": ["t"], "extract": ["e"]}, "score_0": -0.5, "score_1": 0.5}  # fmt: skip
SHP = {"post_id": "1", "history": "Why?", "human_ref_A": "A.", "human_ref_B": "B.", "labels": 1, "score_A": 9}
ANSWERS = [("Fair.", 2), ("Best.", 1), ("Poor.", 3), ("", 4), ("Fairer.", 2)]
ORCA = {"system": "Be kind.", "question": "Hi", "chosen": "Yes.", "rejected": "No."}
OPENAI = {"input": {"messages": [SYSTEM, user("Hi")], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [assistant("Yes.")], "non_preferred_output": [assistant("No.")]}  # fmt: skip
SHAREGPT = {"conversations": [human("Hi"), gpt("Yes?"), human("So?")], "chosen": gpt("Yes."), "rejected": gpt("No.")}
ALPACA = {"instruction": "Translate.", "input": "Hallo", "chosen": "Hello", "rejected": "Hi"}
V1 = {f"{side}_messages": [{"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 0.0}
                           for role, text in (("user", "Hi"), ("assistant", reply))]
      for side, reply in (("chosen", "Yes."), ("rejected", "No."))}  # fmt: skip
KIND = "system: Be kind.\nuser: Hi"
TURNS = "user: Hi\nassistant: Yes?\nuser: So?"
COLUMNS: dict[str, Any] = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}
MULTITURN = {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes?"), user("So?"), assistant("Yes.")],
             "rejected": [user("Hi"), assistant("Yes?"), user("So?"), assistant("No.")],
             "score_chosen": 8.0, "score_rejected": 6.5}  # fmt: skip

# Name of the case -> reader, rows, pairs, reasons of rejected rows.
PAIRS: dict[str, tuple[Any, list[dict], list[tuple[str, str, str]], list[str]]] = {
    "LLaMA-Factory, sharegpt": (
        "llama_factory_sharegpt",
        [
            SHAREGPT,
            SHAREGPT | {"conversations": [{"from": "system", "value": "Be kind."}, human("Hi")], "system": "Not read."},
            SHAREGPT | {"conversations": [human("Hi")], "system": "Be kind.", "chosen": gpt("Sure.")},
            SHAREGPT | {"tools": '[{"name": "search"}]'},
        ],
        [(TURNS, "Yes.", "No."), (KIND, "Yes.", "No."), (KIND, "Sure.", "No.")],
        ["the chat template does not render tools"],
    ),
    "LLaMA-Factory, alpaca": (
        "llama_factory_alpaca",
        [
            ALPACA,
            ALPACA | {"input": "", "system": "Be kind.", "history": [["Hi", "Yes?"]]},
            ALPACA | {"images": ["cat.png"]},
        ],
        [
            ("Translate.\nHallo", "Hello", "Hi"),
            ("system: Be kind.\nuser: Hi\nassistant: Yes?\nuser: Translate.", "Hello", "Hi"),
        ],
        ["images in the prompt, which this reader does not read"],
    ),
    "LLaMA-Factory v1": ("llama_factory_v1", [V1], [("Hi", "Yes.", "No.")], []),
    "OpenAI": ("openai", [OPENAI], [(KIND, "Yes.", "No.")], []),
    "orca_dpo_pairs": (
        "orca_dpo_pairs",
        [ORCA, ORCA | {"system": ""}],
        [(KIND, "Yes.", "No."), ("Hi", "Yes.", "No.")],
        [],
    ),
    "orca_dpo_pairs of HuggingFaceH4": (
        "columns",
        [COLUMNS | {"chosen": [SYSTEM, user("Hi"), assistant("A")], "rejected": [SYSTEM, user("Hi"), assistant("B")]}],
        [(KIND, "A", "B")],
        [],
    ),
    "SHP": ("shp", [SHP, SHP | {"labels": 0}], [("Why?", "A.", "B."), ("Why?", "B.", "A.")], []),
    "WebGPT": (
        "webgpt_comparisons",
        [WEBGPT, WEBGPT | {"score_0": 0.0, "score_1": 0.0}],
        [("Why?", "Thus.", "So [1].")],
        ["tie in score_0 and score_1"],
    ),
    "MT-bench and Chatbot Arena": (
        "arena",
        [
            battle("model_a", judge="expert_1", question_id=81),
            battle("model_b", "B.", "C."),
            battle("tie"),
            battle("tie (bothbad)"),
            battle("both_bad"),
            battle("model_a", turn=2),
            battle("model_b", "Same.", "Same.", turn=2)
            | {"conversation_b": [user("Hi"), assistant("Same."), user("So?"), assistant("?")]},
            battle("model_a", evaluation_order=2),
            battle("?"),
        ],
        [("Hi", "Yes.", "No."), ("Hi", "C.", "B."), ("user: Hi\nassistant: Same.\nuser: So?", "?", "!")],
        [
            *["tie in winner"] * 3,
            "the conversations differ before the last response",
            "evaluation_order is above 1, and the conversation before it was with other models",
            "winner is neither model_a nor model_b",
        ],
    ),
    "Chatbot Arena, 55k": (
        "arena_55k",
        [
            kaggle(["Hi"], ["Yes."], ["No."], "model_b"),
            kaggle(["Hi", "So?"], ["Same.", "A."], ["Same.", "B."], "model_a"),
            kaggle(["Hi", "So?"], ["A.", "."], ["B.", "."], "model_a"),
            kaggle(["Hi"], [None], ["B."], "model_a"),
            kaggle(["Hi"], ["A."], ["B."], "tie"),
        ],
        [("Hi", "No.", "Yes."), ("user: Hi\nassistant: Same.\nuser: So?", "A.", "B.")],
        ["the conversations differ before the last response", "no response_a", "tie in winner"],
    ),
    "Nectar": ("nectar", [NECTAR], [(TURNS, "Best.", "Poor.")], []),
    "Nectar, neighbours": (
        {"name": "nectar", "pairs": "neighbours"},
        [NECTAR, NECTAR | {"answers": [answer(*item) for item in ANSWERS]}],
        [(TURNS, "Best.", "Fair."), (TURNS, "Fair.", "Poor."), (TURNS, "Best.", "Fair."), (TURNS, "Fairer.", "Poor.")],
        ["empty answer", "tie in rank"],
    ),
    "UltraFeedback": ("ultrafeedback", [UF], [("Hi", "Best.", "Bad.")], []),
    "UltraFeedback, fine-grained": (
        {"name": "ultrafeedback", "by": "fine-grained_score"}, [UF], [("Hi", "Fair.", "Bad.")], [],
    ),
    "UltraFeedback, ratings of all pairs": (
        {"name": "ultrafeedback", "by": "ratings", "pairs": "all_pairs"},
        [UF | {"completions": [*UF["completions"][:2], scored("Unrated.", 5, 5, ["N/A"] * 4)]}],
        [("Hi", "Best.", "Good.")],
        ["Rating is not a number"],
    ),
    "OASST": (
        "oasst",
        [*TREE, message("u", None, "prompter", "Alone", tree="u"), message("x", "y", "assistant", "A", 0, "v"),
         message("z", "y", "assistant", "B", 1, "v")],
        [("Hi", "Yes.", "No."), ("user: Hi\nassistant: Yes.\nuser: So?", "Best.", "Worst.")],
        ["no message with two replies to compare",
         "a message's parent is not beside it: those of one message_tree_id must follow each other"],
    ),
    "OASST, trees": (
        {"name": "oasst_trees", "pairs": "neighbours"},
        [{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": nested(TREE)[0]}],
        [("Hi", "Yes.", "No.")]
        + [("user: Hi\nassistant: Yes.\nuser: So?", *pair) for pair in (("Best.", "Fair."), ("Fair.", "Worst."))],
        [],
    ),
    "a dialogue of two models": (
        "dialogue_of_models",
        [
            {"dialogue": ["Hi", "Yes.", "So?", "No.", "Yes."]},
            {"dialogue": [SYSTEM, user("Hi"), assistant("A."), user("B?")]},
            {"dialogue": ["Hi", "Yes."]},
            {"dialogue": ["Hi", " ", "So?"]},
            {"dialogue": [user("Hi"), assistant("A."), assistant("B.")]},
            {"dialogue": [user("Hi"), assistant("A.") | {"tool_calls": [{"name": "f"}]}, user("B?")]},
        ],
        [("Hi", "Yes.", "So?"), ("Hi", "Yes.", "No."), (KIND, "A.", "B?")],
        [
            "identical responses",
            "dialogue has fewer than three turns",
            "empty dialogue",
            "the roles in dialogue do not alternate",
            "a turn in dialogue is more than a text",
        ],
    ),
    "UltraFeedback binarized, several turns, under the default reader": (
        "columns",
        [
            MULTITURN,
            MULTITURN | {"prompt": "So?"},
            {"prompt": [user("Hi")], "chosen": MULTITURN["chosen"][1:], "rejected": MULTITURN["rejected"][1:]},
            MULTITURN | {"prompt": "Hello"},
            MULTITURN | {"score_rejected": 8.0},
        ],
        [(TURNS, "Yes.", "No.")] * 3,
        ["prompt is not among the turns that chosen and rejected share", "score_chosen is not above score_rejected"],
    ),
    "UltraFeedback binarized, all scores": (
        {"name": "ultrafeedback_binarized", "check_scores": False},
        [MULTITURN | {"score_rejected": 8.5}],
        [(TURNS, "Yes.", "No.")],
        [],
    ),
    "columns with system and input": (
        {"name": "columns", "system": "system_prompt", "input": "context"},
        [COLUMNS | {"system_prompt": "Be kind.", "context": None},
         COLUMNS | {"system_prompt": "", "context": "A boat."},
         COLUMNS | {"prompt": [SYSTEM, user("Hi")], "system_prompt": "Be mean."}],
        [(KIND, "Yes.", "No."), ("Hi\nA boat.", "Yes.", "No.")],
        ["a system message in prompt and one in system_prompt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", PAIRS)
def test_rows_of_the_format_become_its_pairs_and_the_others_have_their_reason(tiny, tmp_path, name, kind):
    """A plan says of which rows they are; the same from lines and from one list."""
    reader, rows, expected, rejected = PAIRS[name]
    path = tmp_path / f"in.{kind}"
    path.write_text(json.dumps(rows, indent=1)) if kind == "json" else write_jsonl(path, rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert problems(preferences, path, reader) == []
    planned = [re.search("will be rejected: (.*) \\(", str(item.message)) for item in caught]
    assert {match[1] for match in planned if match} == {*rejected} - {"the chat template does not render tools"}
    ctx = new_context(tmp_path)
    pairs = pairs_in(preferences(tiny, ctx, path=DataPath(str(path)), reader=reader))
    assert sorted(pairs.elements()) == sorted(expected)
    assert [reason for _, reason in reasons(ctx)] == rejected


def candidates_in(tables):
    """Sorted (prompt, response, reward) of the tables."""
    prompt_table, answers, rewards = (table.to_pylist() for table in tables)
    prompt = {row["prompt_id"]: row["text"] for row in prompt_table}
    text = {row["candidate_id"]: row["text"] for row in answers}
    return sorted((prompt[row["prompt_id"]], text[row["candidate_id"]], row["reward"]) for row in rewards)


LABELS: dict[str, tuple[Any, list[dict], list[tuple[str, str, float]], list[str]]] = {
    "TRL's unpaired": (
        "unpaired",
        [{"prompt": "Hi", "completion": "Yes.", "label": True},
         {"prompt": [user("Hi")], "completion": [assistant("No.")], "label": False},
         {"prompt": "Hi", "completion": "?", "label": None}],
        [("Hi", "No.", 0.0), ("Hi", "Yes.", 1.0)],
        ["label is not a number"],
    ),
    "LLaMA-Factory's KTO, alpaca": (
        "llama_factory_kto_alpaca",
        [{"instruction": "Translate.", "input": "Hallo", "output": "Hello", "kto_tag": True},
         {"instruction": "Hi", "input": "", "output": "No.", "system": "Be kind.", "kto_tag": False}],
        [("Translate.\nHallo", "Hello", 1.0), (KIND, "No.", 0.0)],
        [],
    ),
    "LLaMA-Factory's KTO, sharegpt": (
        "llama_factory_kto_sharegpt",
        [{"conversations": [human("Hi"), gpt("Yes.")], "kto_tag": True},
         {"conversations": [human("Hi"), gpt("Yes?"), human("So?"), gpt("No.")], "kto_tag": False},
         {"conversations": [human("Hi"), gpt("Yes?"), human("So?")], "kto_tag": False}],
        [("Hi", "Yes.", 1.0), (TURNS, "No.", 0.0)],
        ["conversations does not begin and end with an assistant turn"],
    ),
    "LLaMA-Factory's kto_en_demo": (
        {"name": "llama_factory_kto_sharegpt", "messages": "messages", "label": "label"},
        [{"messages": [user("Hi"), assistant("Yes.")], "label": True}],
        [("Hi", "Yes.", 1.0)],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_rows_with_a_label_become_candidates_with_a_reward(tiny, ctx, tmp_path, name):
    reader, rows, expected, rejected = LABELS[name]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    assert candidates_in(own_candidates(tiny, ctx, path=DataPath(str(path)), reader=reader)) == sorted(expected)
    assert [reason for _, reason in reasons(ctx)] == rejected


values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def damaged(value):
    """Strategy: the value with one part of it, at any depth, replaced by something else, or left out."""
    if isinstance(value, dict) and value:
        inner = [damaged(item).map(lambda new, key=key: value | {key: new}) for key, item in value.items()]
        missing = st.sampled_from(sorted(value)).map(lambda key: {name: value[name] for name in value if name != key})
        return st.one_of(values, missing, *inner)
    if isinstance(value, list) and value:
        items = range(len(value))
        inner = [damaged(value[n]).map(lambda new, n=n: [*value[:n], new, *value[n + 1 :]]) for n in items]
        return st.one_of(values, st.sampled_from(items).map(lambda n: value[:n]), *inner)
    return values


@pytest.mark.filterwarnings("ignore:.*a message has the role")
@pytest.mark.parametrize("name", [*PAIRS, *LABELS])
@settings(max_examples=20)
@given(data=st.data())
def test_whatever_is_in_a_row_it_gives_pairs_or_a_reason(name, data):
    """No value ends the run, nor the plan, which tries readers on the first rows."""
    reader, rows, *_ = (PAIRS | LABELS)[name]
    bound = (preference_reader if name in PAIRS else candidate_reader).bind(reader)
    several = "together" in bound.metadata
    row = data.draw(st.sampled_from([rows[:9]] if several else [[row] for row in rows]).flatmap(damaged))
    if isinstance(row, list) and (several or len(row) == 1) and all(isinstance(item, dict) for item in row):
        for result in pairs_of(bound, row):
            assert isinstance(result, PreferencePair | LabelledResponse | ValueError)


# Advice

ADVISED = [
    name for name, case in (PAIRS | LABELS).items() if "columns" not in str(case[0]) and "all scores" not in name
]


@pytest.mark.parametrize("name", ADVISED)
def test_advice_for_a_file_without_the_columns_is_true(tiny, tmp_path, name):
    """The default reader names, among others, the one that is meant; each that it names reads the file."""
    reader, rows, *_ = (PAIRS | LABELS)[name]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    (problem,) = problems(preferences, path)
    advised = [
        yaml.safe_load(choice)
        for choice in re.split(r" or |, or ", problem.partition("set `reader` to ")[2].removesuffix(" for these"))
    ]
    given = reader if isinstance(reader, str) else reader["name"]
    assert given in [choice if isinstance(choice, str) else choice["name"] for choice in advised]
    stage = preferences if name in PAIRS else own_candidates
    assert ("stage own_candidates" in problem) == (stage is own_candidates)
    for choice in advised:
        assert stage(tiny, new_context(tmp_path), path=DataPath(str(path)), reader=choice)[2].num_rows > 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"question": "Hi", "chosen": "Yes.", "rejected": "No."},
            "set `reader` to {name: columns, prompt: question} for",
        ),
        (
            {"chosen": "Yes.", "rejected": "No."},
            r"no column 'prompt' \(option `prompt`\); it has 'chosen', 'rejected'$",
        ),
        (SHAREGPT | {"chosen": None}, "it has 'conversations', 'chosen', 'rejected'$"),
    ],
)
def test_only_readers_that_read_the_rows_are_advised(tmp_path, row, words):
    """All readers with these columns would be named by the columns alone, `implicit_prompt` and `hh` for all three."""
    assert re.search(words, problems(preferences, write_jsonl(tmp_path / "in.jsonl", [row]))[0])


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "Hi"}, "set `prompt: question`"),
        ({"instruction": "Add.", "input": "1 2"}, "set `prompt: instruction` and `input: input`"),
        ({"messages": FULL["chosen"]}, "set `prompt: messages` and `prefill: omit`"),
        ({"conversations": SHAREGPT["conversations"]}, "set `prompt: conversations`"),
        ({"text": "Hi"}, "it has 'text'"),
    ],
)
def test_the_column_that_may_hold_the_prompt_is_named(tmp_path, row, advice):
    entry = entry_of(prompts)
    options = {name: field.default for name, field in entry.options.model_fields.items()}
    options["path"] = DataPath(str(write_jsonl(tmp_path / "in.jsonl", [row])))
    (problem,) = entry.metadata["signature"].check(options, {})
    assert problem.endswith(advice)


def test_the_column_of_a_prompt_is_advised_and_not_what_two_answers_share(tmp_path):
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    row = {"messages": chat, "chosen": "The sum is 7.", "rejected": "The sum is 8."}
    path = write_jsonl(tmp_path / "in.jsonl", [row])
    for (problem,) in (problems(preferences, path), problems(preferences, path, "implicit_prompt")):
        assert problem.endswith("set `reader` to {name: columns, prompt: messages} for these")


def test_a_reader_that_reads_none_of_the_rows_is_refused_with_one_that_does(tmp_path):
    """At plan time, before all rows are rejected."""
    path = write_jsonl(tmp_path / "in.jsonl", [{"chosen": FULL["chosen"], "rejected": FULL["rejected"]}] * 3)
    (problem,) = problems(preferences, path, "hh")
    assert "reader hh reads none of its first 3 rows (chosen is not text)" in problem
    assert problem.endswith("set `reader` to implicit_prompt or ultrafeedback_binarized for these")
    assert problems(preferences, path, "implicit_prompt") == []


# Parts of a prompt in columns of their own


def planned(stage, **options):
    """What the check at plan time says."""
    options |= {"path": str(options["path"])}
    return entry_of(stage).metadata["signature"].check(entry_of(stage).validate(options, ""), {})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_may_be_part_of_the_prompt_are_read_by_option_or_named(tiny, ctx, tmp_path, kind):
    """Alpaca's columns: what the options read is in the prompt, what nobody reads is in the warning, empty ones not."""
    rows = [{"instruction": "Translate.", "input": "Hallo", "system": "Be kind.", "output": "Hello", "history": None},
            {"instruction": "Hi", "input": "", "system": "", "output": "Yes.", "history": None}]  # fmt: skip
    path = DataPath(str(write_rows(tmp_path, kind, rows)))
    options = dict(path=path, prompt="instruction", demonstration="output")
    with pytest.warns(WinnowWarning, match=f"in.{kind}: 'input', 'system' may be part of the prompt, and are not read"):
        assert planned(prompts, **options) == []
    with pytest.warns(WinnowWarning, match="'system' may be part of the prompt, and is not read"):
        assert planned(prompts, **options, input="input") == []
    assert planned(prompts, **options, input="input", system="system") == []
    table = prompts(tiny, ctx, **options, input="input", system="system")
    assert texts(table) == ["Hi", "system: Be kind.\nuser: Translate.\nHallo"]
    with pytest.warns(WinnowWarning, match="'input', 'system'"):
        planned(own_candidates, path=path, prompt="instruction", response="output", reward="instruction")
    _, answers, _ = own_candidates(
        tiny, ctx, path=DataPath(str(write_rows(tmp_path, kind, [row | {"r": 1.0} for row in rows], "with_rewards"))),
        prompt="instruction", response="output", reward="r", input="input", system="system",
    )  # fmt: skip
    assert set(answers["prompt_id"].to_pylist()) == set(table["prompt_id"].to_pylist())


def test_columns_of_a_folder_that_may_be_part_of_the_prompt_are_named(tiny, ctx, tmp_path):
    """When the plan is made, and where only the stage opens it: of a saved data set."""
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", [ORCA])
    datasets.Dataset.from_list([ORCA]).save_to_disk(tmp_path / "saved")
    reader = {"name": "columns", "prompt": "question"}
    with pytest.warns(WinnowWarning, match="'system' may be part of the prompt, and is not read"):
        assert problems(preferences, tmp_path / "files", reader) == []
    with pytest.warns(WinnowWarning, match="'system' may be part of the prompt, and is not read"):
        preferences(tiny, ctx, path=DataPath(str(tmp_path / "saved")), reader=reader)


def test_a_reader_names_its_own_columns(tmp_path):
    """An option that would be ignored is refused."""
    path = write_jsonl(tmp_path / "in.jsonl", [ORCA])
    (problem,) = problems(prompts, path, "orca_dpo_pairs", system="system")
    assert problem.startswith("`system: system`: with a `reader`, columns are named by its own options")


# Files


def test_a_list_in_json_and_a_table_in_tsv_are_read(tiny, tmp_path):
    """Also compressed, and with lines of JSON in a file that ends in .json, as SHP has them."""
    rows = [COLUMNS, COLUMNS | {"prompt": 'A\tboat, "two"'}]
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "in.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    (tmp_path / "in.json").write_text("\ufeff" + json.dumps(rows, indent=2))
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "in.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("in.tsv", "in.json", "lines.json", "in.json.gz"):
        assert problems(preferences, tmp_path / name) == []
        pairs = pairs_in(preferences(tiny, new_context(tmp_path), path=DataPath(str(tmp_path / name))))
        assert set(pairs) == {(row["prompt"], "Yes.", "No.") for row in rows}


def test_bad_items_of_a_json_list_and_bad_rows_of_a_table_are_rejected_one_by_one(tiny, ctx, tmp_path):
    """A list that is cut short ends with an error; a quote that is never closed would hide all rows behind it."""
    (tmp_path / "in.json").write_bytes(
        b'[{"prompt": "good"}, 7, {"prompt": "bad \xff"}, {"prompt": NaN}, {"prompt": "ok"},'
        b' {"prompt": 1, "prompt": "x"}]'
    )
    assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / "in.json")))) == ["good", "ok"]
    (tmp_path / "in.csv").write_text("prompt,other\nHi,1\nHello, world,2\nHo,3\n")
    assert texts(prompts(tiny, ctx, path=DataPath(str(tmp_path / "in.csv")))) == ["Hi", "Ho"]
    assert reasons(ctx) == [("in.json:1", "not a JSON object"), ("in.json:2", "bad UTF-8"),
                            ("in.json:3", "prompt is not text"), ("in.json:5", "a key twice"),
                            ("in.csv:3", "more cells than columns")]  # fmt: skip
    (tmp_path / "in.json").write_text('[{"prompt": "good"}, {"prompt":')
    (tmp_path / "in.csv").write_text('prompt\nHi\n"Hello\nHo\n')
    for name in ("in.json", "in.csv"):
        with pytest.raises(WinnowError, match=f"{name}.*(cut short)"):
            prompts(tiny, ctx, path=DataPath(str(tmp_path / name)))
    (tmp_path / "in.csv").write_text('prompt,chosen,rejected\nHi,a,b\n"Hello,a,b\n')
    assert "cannot be read after in.csv:2" in problems(preferences, tmp_path / "in.csv")[0]
    (tmp_path / "in.csv").write_text("prompt,prompt\nHi,Ho\n")
    assert "more than one column 'prompt'; rename one" in problems(preferences, tmp_path / "in.csv")[0]
    twice = pa.table([["Hi"], ["Ho"]], names=["prompt", "prompt"])
    parts = pa.array([[("Hi", "Ho")]], pa.list_(pa.struct([("text", pa.string()), ("text", pa.string())])))
    for table, name in ((twice, "prompt"), (pa.table({"prompt": parts}), "text")):
        pq.write_table(table, tmp_path / "in.parquet")
        assert f"more than one column '{name}'; rename one" in problems(preferences, tmp_path / "in.parquet")[0]


@given(st.lists(values, max_size=5), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_a_json_list_read_in_pieces_has_the_values_of_json_loads(items, piece, indent, ascii_only):
    """Wherever a piece ends, in the middle of a number or an escape; without its end it is an error."""
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_rows, "PIECE", piece)
        assert [item for _, item in file_rows.json_items(StringIO(text))] == items
        for damaged in (text[:-1], text + "]", text[1:]):
            with pytest.raises(json.JSONDecodeError):
                list(file_rows.json_items(StringIO(damaged)))


def test_a_dict_of_lists_is_a_list_of_messages(tiny, tmp_path):
    """As `datasets` and pandas write them; in every format of files that can hold one."""
    turns = {"role": ["system", "user"], "content": ["Be kind.", "Hi"]}
    sides = {
        name: {"role": ["assistant"], "content": [text]} for name, text in (("chosen", "Yes."), ("rejected", "No."))
    }
    for kind in ("jsonl", "parquet"):
        path = write_rows(tmp_path, kind, [{"prompt": turns} | sides])
        assert set(pairs_in(preferences(tiny, new_context(tmp_path), path=DataPath(str(path))))) == {
            (KIND, "Yes.", "No.")
        }


# Folders

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("saved", [False, True])
def test_a_pointer_of_git_lfs_in_a_folder_is_named_and_that_of_another_split_not_opened(tiny, ctx, tmp_path, saved):
    """When the plan is made, and by the stage: `datasets` would prepare all splits, and name none of the files."""
    splits = {name: datasets.Dataset.from_list([COLUMNS]) for name in ("train", "test")}
    if saved:
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
        file = next((tmp_path / "test").glob("*.arrow"))
    else:
        for name, rows in splits.items():
            rows.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
        file = tmp_path / "test-00000-of-00001.parquet"
    file.write_text(POINTER)
    path = DataPath(str(tmp_path))
    assert problems(preferences, tmp_path) == []
    assert preferences(tiny, ctx, path=path)[2].num_rows == 1
    words = f"{file.name} is a Git LFS pointer and not the data; fetch the data with `git lfs pull`"
    assert words in problems(preferences, tmp_path, dataset_split="test")[0]
    with pytest.raises(WinnowError, match="is a Git LFS pointer"):
        preferences(tiny, ctx, path=path, dataset_split="test")

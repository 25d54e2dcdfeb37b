"""Chats that a tokenizer without a chat template cannot hold are said when the plan is made."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import Bound, InputStep, ModelPath, Registry
from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import WinnowWarning
from stages.data.first_rows import prompt_problems
from stages.data.formats import preference_reader
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.trainer_formats import candidate_reader
from tests.conftest import write_jsonl
from tests.stages.ranking.test_planned_prompts import PLAIN, ROWS, SYSTEM_IN_LAST


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """The folder of a model without a chat template."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "policy"))
    (folder / "chat_template.jinja").unlink()
    return folder


def source(folder: Path, rows: list[dict], **keywords: Any) -> tuple[dict[str, Any], dict[str, InputStep]]:
    """Return options of a file, and the inputs, of a step that reads prompts."""
    options = dict(path=DataPath(str(write_jsonl(folder / "prompts.jsonl", rows))), prompt="prompt", system=None)
    options |= dict(input=None, reader=None, subset=None, dataset_split="train", system_prompt=None, prefill="reject")
    tokenizer = InputStep("model", {"path": ModelPath(str(folder)), "chat_template": None, "adapter": None} | keywords)
    return options, {"tokenizer": tokenizer}


def problems(
    folder: Path, rows: list[dict], reader: Bound | None = None, *, answered: bool = True, **options: Any
) -> list[str]:
    read, inputs = source(folder, rows)
    return prompt_problems(read | {"reader": reader} | options, inputs, answered=answered)


def checked(stage: Any, folder: Path, rows: list[dict], **options: Any) -> list[str]:
    """Return what a stage's own check says of a file of these rows."""
    read, inputs = source(folder, rows)
    entry = entry_of(stage)
    defaults = {name: field.default for name, field in entry.options.model_fields.items()}
    return entry.metadata["signature"].check(defaults | {"path": read["path"]} | options, inputs)


def test_chats_without_a_template_are_refused_or_some_of_them_counted(folder: Path):
    chats, text = [ROWS["a system turn"], ROWS["several turns"]], {"prompt": "Hello."}
    (problem,) = problems(folder, chats)
    assert all(fact in problem for fact in ("2 of the first 2", "prompts.jsonl", "no chat template", "`chat_template`"))
    with pytest.warns(WinnowWarning, match=r"2 of the first 3 .* will be rejected"):
        assert problems(folder, [*chats, text]) == []
    assert problems(folder, [text]) == []
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert problems(folder, chats) == []


def test_a_prompt_without_an_answer_yet_is_refused_only_where_a_file_has_the_answer(folder: Path):
    """The template leaves the system text out once an answer follows; what to change in it is said."""
    (folder / "chat_template.jinja").write_text(SYSTEM_IN_LAST)
    system, others = ROWS["a system turn"], [ROWS["plain"], ROWS["several turns"]]
    (problem,) = problems(folder, [system])
    assert all(fact in problem for fact in ("1 of the first 1", "once an answer follows", "user_messages[-1]"))
    with pytest.warns(WinnowWarning, match=r"1 of the first 3 .*once an answer follows.*`chat_template`"):
        assert problems(folder, [system, *others]) == []
    assert problems(folder, others) == []
    with pytest.warns(WinnowWarning, match=r"1 of the first 3 .* will be kept .*once an answer follows: .*ask for an"):
        assert problems(folder, [system, *others], answered=False) == []
    (problem,) = problems(folder, [ROWS["plain"]], system_prompt="Be brief.")
    assert "1 of the first 1" in problem
    (folder / "chat_template.jinja").write_text(SYSTEM_IN_LAST.replace("loop.last", "m == messages[1]"))
    assert problems(folder, [system]) == []


def test_a_template_is_rendered_with_the_variables_that_it_is_given(folder: Path):
    """A plan refuses no prompts that the step's `chat_template_kwargs` let the template render alike."""
    (folder / "chat_template.jinja").write_text(SYSTEM_IN_LAST.replace("loop.last", "(keep_system or loop.last)"))
    for keep, count in ((False, 1), (True, 0)):
        options, inputs = source(folder, [ROWS["a system turn"]], chat_template_kwargs={"keep_system": keep})
        assert len(prompt_problems(options, inputs)) == count


@pytest.mark.parametrize("reader", [None, "columns"])
def test_prompts_that_end_with_an_assistant_turn_name_the_option_that_continues_it(folder: Path, reader: str | None):
    (folder / "chat_template.jinja").write_text(PLAIN)
    turns = [*ROWS["plain"]["prompt"], {"role": "assistant", "content": "It is"}]
    rows: list[dict] = [{"prompt": turns}, {"prompt": turns}]
    by = None
    if reader:
        rows, by = [{"prompt": turns, "chosen": "noon.", "rejected": "late."}] * 2, preference_reader.bind(reader)
    (problem,) = problems(folder, rows, by)
    assert all(fact in problem for fact in ("2 of the first 2", "prompts.jsonl", "`prefill: continue`"))
    for prefill in ("continue", "omit"):
        assert problems(folder, rows, by, prefill=prefill) == []
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in problems(folder, rows, by, prefill="continue")[0]
    (folder / "chat_template.jinja").write_text(PLAIN)
    with pytest.warns(WinnowWarning, match=r"2 of the first 3 .*`prefill: continue`"):
        assert problems(folder, [*rows, {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}], by) == []


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"prompt": 3}, {}, "prompt is not text"),
        ({"prompt": [{"content": "Hi"}]}, {}, "no role"),
        ({"prompt": "Hi", "answer": None}, {"keep": ["answer"]}, "no answer"),
    ],
)
def test_a_file_without_a_readable_prompt_is_refused_or_its_unreadable_rows_counted(folder, row, options, reason):
    (problem,) = problems(folder, [row, row], **options)
    assert all(fact in problem for fact in ("2 of the first 2", "prompts.jsonl", reason))
    with pytest.warns(WinnowWarning, match=f"1 of the first 2 .*{reason}"):
        assert problems(folder, [row, {"prompt": [{"role": "user", "content": "Hi"}], "answer": "4"}], **options) == []


def test_lines_that_are_no_rows_are_counted_among_the_first_prompts(folder: Path):
    """With the line of the first, whatever reads the rows, also where a reader finds no pair in the others."""
    read, inputs = source(folder, [])
    (folder / "prompts.jsonl").write_text('{"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}\n{\n{\n')
    text = r"2 of the first {} .* rejected: not JSON \(the first is prompts.jsonl:2\)"
    for reader, count in ((None, 3), ("columns", 3), ("implicit_prompt", 2)):
        with pytest.warns(WinnowWarning, match=text.format(count)):
            assert prompt_problems(read | {"reader": reader and preference_reader.bind(reader)}, inputs) == []


WITHOUT_OTHERS = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSING = "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('who?') }}{% endfor %}"


@pytest.mark.parametrize(("template", "reason"), [(WITHOUT_OTHERS, "does not render"), (REFUSING, "refuses a message")])
def test_a_role_that_the_template_does_not_write_rejects_its_row(folder: Path, template: str, reason: str):
    """The plan says so with place and count; the role that was meant is named."""
    rows = [ROWS["plain"], {"prompt": [{"role": "human", "content": "Hi"}]}]
    (folder / "chat_template.jinja").write_text(template)
    expected = rf"1 of the first 2 .* will be rejected: .*{reason}.* role human \(prompts.jsonl:2\); write 'user'"
    with pytest.warns(WinnowWarning, match=expected) as caught:
        assert problems(folder, rows, answered=False) == []
    assert len(caught) == 1


def test_what_the_template_does_not_hold_of_known_turns_is_counted(folder: Path):
    """Tools, a system turn, turns in an order that it refuses; turns of tools, of which nobody can tell, are not."""
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('') }}"
    )
    (folder / "chat_template.jinja").write_text(alternating + "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    result = {"prompt": [*ROWS["plain"]["prompt"], call, {"role": "tool", "content": "12:00"}]}
    twice = {"prompt": [*ROWS["plain"]["prompt"] * 2]}
    with pytest.warns(WinnowWarning) as caught:
        assert problems(folder, [*ROWS.values(), twice, result], answered=False) == []
    texts = [str(item.message) for item in caught]
    facts = [("does not render tools", 2), ("refuses a system turn", 3), ("refuses turns of user, user", 5)]
    for text, (fact, line) in zip(texts, facts, strict=True):
        assert all(part in text for part in ("1 of the first 6", fact, f"prompts.jsonl:{line}", "`chat_template`"))
    (problem,) = problems(folder, [ROWS["tools"]], answered=False)
    assert "does not render tools" in problem


def test_what_reading_the_first_prompts_warns_of_is_said_once_for_all_of_them(folder: Path):
    """A role that the template writes as it stands, and keys that are not read: which rows, and that they are kept."""
    (folder / "chat_template.jinja").write_text(PLAIN)
    odd = {"prompt": [{"role": "usr", "content": "Hi", "id": "3"}]}
    with pytest.warns(WinnowWarning) as caught:
        assert problems(folder, [ROWS["plain"], odd, odd]) == []
    keys, role = (str(item.message) for item in caught)
    kept = "2 of the first 3 prompts of {} will be kept (the first is prompts.jsonl:2)".format(folder / "prompts.jsonl")
    assert kept in keys
    assert keys.endswith("keys of messages are not read: id")
    assert kept in role
    assert "has the role 'usr'" in role


def test_prompts_without_a_turn_of_the_user_are_kept_and_named(folder: Path):
    (folder / "chat_template.jinja").write_text(PLAIN)
    expected = r"1 of the first 2 .* will be kept \(prompts.jsonl:2\): a prompt has no turn of the user"
    with pytest.warns(WinnowWarning, match=expected):
        assert problems(folder, [ROWS["plain"], {"prompt": [{"role": "system", "content": "Be kind."}]}]) == []


def test_transcripts_that_are_read_as_text_need_no_template(folder: Path):
    turns = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A boat\n\nAssistant:"
    rows = [{"chosen": f"{turns} I can.", "rejected": f"{turns} I cannot."}]
    assert problems(folder, rows, preference_reader.bind("hh")) == []


@pytest.mark.parametrize("options", [{"reward": "label"}, {"reader": candidate_reader.bind("unpaired")}])
def test_chats_with_scored_responses_are_refused_too(folder: Path, options: dict):
    rows = [{**ROWS["several turns"], "completion": "Yes.", "label": 1}]
    response = {} if "reader" in options else {"response": "completion"}
    (problem,) = checked(own_candidates, folder, rows, **response, **options)
    assert "1 of the first 1" in problem


def test_a_reader_may_find_no_pair_in_a_row(folder: Path):
    """Such as a user's, of a dialogue without a second answer."""
    readers = Registry("reader", "row", columns=tuple[str, ...])

    @readers(columns=("prompt",))
    def none_of(row: dict) -> list:
        return []

    assert problems(folder, [{"prompt": "Hello."}], readers.bind("none_of")) == []


def test_responses_that_own_candidates_will_reject_are_counted(folder: Path):
    """By themselves where a row has a list of them; a row without a prompt is not counted again."""
    rows: list[dict] = [
        {"prompt": "Hi", "answers": ["Yes.", "No.", ""], "scores": [1.5, None, 0.5]},
        {"prompt": "Hi", "answers": ["Yes.", "No."], "scores": [1.0]},
        {"prompt": None, "answers": ["Yes."], "scores": [None]},
    ]
    with pytest.warns(WinnowWarning) as caught:
        assert checked(own_candidates, folder, rows, response="answers", reward="scores") == []
    facts = [
        ("1 of the first 3 prompts", "no prompt", "prompts.jsonl:3"),
        ("1 of the first 4 responses", "reward is not a number", "prompts.jsonl:1[1]"),
        ("1 of the first 4 responses", "empty answers", "prompts.jsonl:1[2]"),
        ("1 of the first 4 responses", "scores is not a list", "prompts.jsonl:2"),
    ]
    for text, expected in zip((str(item.message) for item in caught), facts, strict=True):
        assert all(fact in text for fact in expected)
    (problem,) = checked(own_candidates, folder, rows[1:2] * 2, response="answers", reward="scores")
    assert "2 of the first 2 responses" in problem


def test_labelled_responses_that_will_be_rejected_are_counted(folder: Path):
    rows = [{"prompt": "Hi", "completion": "Yes.", "label": label} for label in (True, 0.3)]
    with pytest.warns(WinnowWarning, match=r"1 of the first 2 responses .*label is .*\(prompts.jsonl:2\)"):
        assert checked(own_candidates, folder, rows, reader=candidate_reader.bind("unpaired")) == []


def test_demonstrations_that_will_be_rejected_are_counted(folder: Path):
    """In a column of their own, and at the end of the messages of a prompt."""
    rows: list[dict] = [{"prompt": "Hi", "answer": "Yes."}, {"prompt": "Hi", "answer": ""}, {"answer": ""}]
    with pytest.warns(WinnowWarning) as caught:
        assert checked(prompts, folder, rows, demonstration="answer") == []
    no_prompt, empty = (str(item.message) for item in caught)
    assert "1 of the first 3 prompts" in no_prompt
    assert "1 of the first 2 demonstrations" in empty
    assert "empty answer (prompts.jsonl:2)" in empty
    (folder / "chat_template.jinja").write_text(PLAIN)
    turns = ROWS["plain"]["prompt"]
    rows = [{"prompt": [*turns, {"role": "assistant", "content": "Noon."}]}, {"prompt": turns}]
    with pytest.warns(WinnowWarning, match="1 of the first 2 demonstrations .* does not end with an assistant turn"):
        assert checked(prompts, folder, rows, demonstration="prompt", prefill="omit") == []


def test_pairs_that_will_be_rejected_are_counted(folder: Path):
    """Equal responses are no pair to compare; their prompt is one all the same."""
    rows: list[dict] = [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "Hi", "chosen": "Yes.", "rejected": None},
    ]
    reader = preference_reader.bind("columns")
    with pytest.warns(WinnowWarning) as caught:
        assert checked(preferences, folder, rows, reader=reader) == []
    equal, missing = (str(item.message) for item in caught)
    assert "1 of the first 3 pairs" in equal
    assert "identical responses (prompts.jsonl:2)" in equal
    assert "no rejected (prompts.jsonl:3)" in missing
    (problem,) = checked(preferences, folder, rows[1:2], reader=reader)
    assert "1 of the first 1 pairs" in problem
    with pytest.warns(WinnowWarning, match="no rejected") as caught:
        assert checked(prompts, folder, rows, reader=reader) == []
    assert len(caught) == 1


def test_rows_that_a_reader_takes_together_are_counted_as_one_pair(folder: Path, monkeypatch):
    """The last of the first rows may go on behind them: nothing is said of it."""
    monkeypatch.setattr("stages.data.first_rows.ROWS", 5)
    rows = [{"prompt": f"Hi {n // 2}", "response": f"{n}", "helpfulness": n} for n in range(6)]
    reader = preference_reader.bind({"name": "helpsteer2", "by": "helpfulness"})
    assert checked(preferences, folder, rows, reader=reader) == []
    rows[1]["helpfulness"] = 0
    with pytest.warns(WinnowWarning, match=r"1 of the first 2 pairs .*\(prompts.jsonl:1\)"):
        assert checked(preferences, folder, rows, reader=reader) == []

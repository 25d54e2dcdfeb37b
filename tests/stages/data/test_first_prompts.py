"""Chats that a tokenizer without a chat template cannot hold are said when the plan is made."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import Bound, InputStep, ModelPath, Registry
from pipeline.registry import entry_of
from pipeline.store.fingerprints import DataPath
from schemas import WinnowWarning
from stages.data.first_prompts import chat_problems
from stages.data.formats import preference_reader
from stages.data.own_candidates import own_candidates
from stages.data.trainer_formats import candidate_reader
from tests.conftest import write_jsonl
from tests.stages.ranking.test_planned_prompts import PLAIN, ROWS


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """The folder of a model without a chat template."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "policy"))
    (folder / "chat_template.jinja").unlink()
    return folder


def source(folder: Path, rows: list[dict]) -> tuple[dict[str, Any], dict[str, InputStep]]:
    """Return options of a file, and the inputs, of a step that reads prompts."""
    options = dict(path=DataPath(str(write_jsonl(folder / "prompts.jsonl", rows))), prompt="prompt", system=None)
    options |= dict(input=None, reader=None, subset=None, dataset_split="train", system_prompt=None)
    tokenizer = InputStep("model", {"path": ModelPath(str(folder)), "chat_template": None, "adapter": None})
    return options, {"tokenizer": tokenizer}


def problems(folder: Path, rows: list[dict], reader: Bound | None = None) -> list[str]:
    options, inputs = source(folder, rows)
    return chat_problems(options | {"reader": reader}, inputs)


def test_chats_without_a_template_are_refused_or_some_of_them_counted(folder: Path):
    chats, text = [ROWS["a system turn"], ROWS["several turns"]], {"prompt": "Hello."}
    (problem,) = problems(folder, chats)
    assert all(fact in problem for fact in ("2 of the first 2", "prompts.jsonl", "no chat template", "`chat_template`"))
    with pytest.warns(WinnowWarning, match=r"2 of the first 3 .* will be rejected"):
        assert problems(folder, [*chats, text]) == []
    assert problems(folder, [text]) == []
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert problems(folder, chats) == []


def test_transcripts_that_are_read_as_text_need_no_template(folder: Path):
    turns = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A boat\n\nAssistant:"
    rows = [{"chosen": f"{turns} I can.", "rejected": f"{turns} I cannot."}]
    assert problems(folder, rows, preference_reader.bind("hh")) == []


@pytest.mark.parametrize("options", [{"reward": "label"}, {"reader": candidate_reader.bind("unpaired")}])
def test_chats_with_scored_responses_are_refused_too(folder: Path, options: dict):
    rows = [{**ROWS["several turns"], "completion": "Yes.", "label": 1}]
    read, inputs = source(folder, rows)
    defaults = {name: field.default for name, field in entry_of(own_candidates).options.model_fields.items()}
    response = {} if "reader" in options else {"response": "completion"}
    check = entry_of(own_candidates).metadata["signature"].check
    (problem,) = check(defaults | read | response | options, inputs)
    assert "1 of the first 1" in problem


def test_a_reader_may_find_no_pair_in_a_row(folder: Path):
    """Such as a user's, of a dialogue without a second answer."""
    readers = Registry("reader", "row", columns=tuple[str, ...])

    @readers(columns=("prompt",))
    def none_of(row: dict) -> list:
        return []

    assert problems(folder, [{"prompt": "Hello."}], readers.bind("none_of")) == []

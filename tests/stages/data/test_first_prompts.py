"""Chats that a tokenizer without a chat template cannot hold are said when the plan is made."""

import shutil
from pathlib import Path

import pytest

from pipeline import Bound, InputStep, ModelPath
from pipeline.store.fingerprints import DataPath
from schemas import WinnowWarning
from stages.data.first_prompts import chat_problems
from stages.data.formats import preference_reader
from tests.conftest import write_jsonl
from tests.stages.ranking.test_planned_prompts import PLAIN, ROWS


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """The folder of a model without a chat template."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "policy"))
    (folder / "chat_template.jinja").unlink()
    return folder


def problems(folder: Path, rows: list[dict], reader: Bound | None = None) -> list[str]:
    options = dict(path=DataPath(str(write_jsonl(folder / "prompts.jsonl", rows))), prompt="prompt", system=None)
    options |= dict(input=None, reader=reader, subset=None, dataset_split="train", system_prompt=None)
    tokenizer = InputStep("model", {"path": ModelPath(str(folder)), "chat_template": None, "adapter": None})
    return chat_problems(options, {"tokenizer": tokenizer})


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

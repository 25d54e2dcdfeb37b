"""Prompts that a ranker would reject one by one are warned of when the plan is made, from its template and the file."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest

from pipeline import InputStep, ModelPath
from pipeline.registry import Bound
from pipeline.store.fingerprints import DataPath
from schemas import Model, WinnowWarning
from stages.ranking.planned_prompts import warn_of_unread_prompts
from stages.ranking.rankers import ranker as rankers
from tests.conftest import TOOL_TEMPLATE, write_jsonl
from tests.material import bound

TURN = "{{ m['role'] }}: {{ m['content'] }}\n"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}"
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + PLAIN
WITHOUT_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"
# As Mistral-7B-Instruct-v0.3's: the system text is that of the last turn alone, and gone once an answer follows.
SYSTEM_IN_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "What time is it?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
ROWS: dict[str, dict] = {
    "plain": {"prompt": [USER]},
    "tools": {"prompt": [USER], "tools": json.dumps(TOOLS)},
    "a system turn": {"prompt": [SYSTEM, USER]},
    "several turns": {"prompt": [USER, {"role": "assistant", "content": "Noon."}, USER]},
}


@pytest.fixture
def folder(tiny: Model, tmp_path: Path) -> Path:
    """The folder of a model, of which only the files of its tokenizer are read."""
    return shutil.copytree(tiny.folder, tmp_path / "ranker")


def warned(folder: Path, template: str, rows: list[dict], by: Bound | None = None, **options: object) -> list[str]:
    """Return the warnings of a plan whose ranker, in this folder, has this template."""
    (folder / "chat_template.jinja").write_text(template)
    model = InputStep("model", {"path": ModelPath(str(folder)), "chat_template": None, "adapter": None})
    data = DataPath(str(write_jsonl(folder / "prompts.jsonl", rows)))
    reads = dict(path=data, prompt="prompt", system=None, input=None, reader=None, subset=None, dataset_split="train",
                 system_prompt=None)  # fmt: skip
    prompts = InputStep("prompts", reads | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unread_prompts(by or bound(rankers, "pointwise"), {"ranker": model, "prompts": prompts})
    assert all(item.category is WinnowWarning for item in caught)
    return [str(item.message) for item in caught]


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (PLAIN, ["tools"]),
        (TOOL_TEMPLATE, []),
        (ONE_TURN, ["tools", "a system turn", "several turns"]),
        (WITHOUT_SYSTEM, ["tools", "a system turn"]),
        (SYSTEM_IN_LAST, ["tools", "a system turn"]),
        ("{{ raise_exception('never') }}", []),  # of which nothing can be told: the run says so itself
    ],
)
def test_what_the_template_of_a_reward_model_does_not_hold_is_said_with_its_count(folder, template, unread):
    warnings = warned(folder, template, [*ROWS.values(), *ROWS.values()])
    assert len(warnings) == len(unread)
    for part, text in zip(unread, warnings, strict=True):
        assert f"2 of the first 8 prompts of {folder / 'prompts.jsonl'} have {part}" in text
        assert "set `chat_template`" in text


def test_a_reward_model_that_is_served_is_read_through_the_same_template(folder):
    by = bound(rankers, "endpoint", url="http://host/v1", model="m")
    assert len(warned(folder, ONE_TURN, [*ROWS.values()], by)) == 3


def test_nothing_is_said_of_prompts_that_it_holds(folder):
    assert warned(folder, PLAIN, [ROWS["plain"], ROWS["several turns"], ROWS["a system turn"]]) == []


def test_a_system_prompt_of_the_step_is_a_system_turn(folder):
    (text,) = warned(folder, WITHOUT_SYSTEM, [ROWS["plain"]], system_prompt="Be brief.")
    assert "1 of the first 1 prompts" in text
    assert "a system turn" in text


def test_a_format_of_turns_alone_holds_neither_tools_nor_system_turns(folder):
    warnings = warned(folder, PLAIN, [*ROWS.values()], bound(rankers, "pairwise", format="rlhflow"))
    assert ["tools" in warnings[0], "a system turn" in warnings[1], len(warnings)] == [True, True, 2]


def test_a_reward_model_without_a_chat_template_is_warned_of_where_the_policy_has_one(tiny, folder, tmp_path):
    """It reads what the policy's template writes; a ranker of texts does not, nor is there a difference without any."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = shutil.copytree(folder, tmp_path / "policy")
    (asked / "chat_template.jinja").write_text(PLAIN)

    def model(name: str, path: Path) -> InputStep:
        return InputStep("model", {"path": ModelPath(str(path)), "chat_template": None, "adapter": None}, name=name)

    def texts(policy: Path, by: str) -> list[str]:
        inputs = {
            "ranker": model("rm", folder),
            "prompts": InputStep("own", inputs={"tokenizer": model("sft", policy)}),
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_unread_prompts(bound(rankers, by), inputs)
        return [str(item.message) for item in caught]

    (text,) = texts(asked, "pointwise")
    assert "rm: it has no chat template, and sft has one" in text
    assert texts(folder, "pointwise") == texts(asked, "pairwise") == []


def test_rankers_of_texts_read_all(folder):
    assert warned(folder, ONE_TURN, [*ROWS.values()], bound(rankers, "pairwise")) == []


def test_a_plan_says_it_once(winnow, tmp_path, data_dir, tiny):
    """By reward, compare and judge one line; of a reward model that is trained here, by the template that it keeps."""
    rows = [{"prompt": [USER], "tools": json.dumps(TOOLS)}] * 3
    write_jsonl(tmp_path / "asked.jsonl", rows)
    template, tools = tmp_path / "plain.jinja", tmp_path / "tools.jinja"
    template.write_text(PLAIN)
    tools.write_text(TOOL_TEMPLATE)
    config = tmp_path / "mine.yaml"
    config.write_text(f"""
policy: {{use: model, with: {{path: {tiny.folder}, chat_template: {tools}}}}}
sft: {{use: model, with: {{path: {tiny.folder}, chat_template: {template}}}}}
ranker: {{use: reward_head, from: {{policy: sft}}}}
prompts: {{from: {{tokenizer: policy}}, with: {{path: {tmp_path}/asked.jsonl}}}}
sample: {{with: {{engine: transformers, max_tokens: 16}}}}
""")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of tests, where they are no errors
        code, text = winnow("plan", "rso", "--config", config)
    assert code == 0
    (steps,) = re.findall(r"winnow: ([\w, ]+): ranker: 3 of the first 3 prompts ", " ".join(text.split()))
    assert {"reward", "compare", "judge"} <= {*steps.split(", ")}


def test_the_ranker_of_a_judge_is_named_and_no_other_step(winnow, tmp_path, data_dir, tiny):
    """They train what the policy's own ranker says, which reads tools."""
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": [USER], "tools": json.dumps(TOOLS)}] * 3)
    (tmp_path / "plain.jinja").write_text(PLAIN)
    (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
    config = tmp_path / "mine.yaml"
    config.write_text(f"""
sft: {{use: model, with: {{path: {tiny.folder}, chat_template: {tmp_path}/tools.jinja}}}}
ranker: {{use: reward_head, from: {{policy: sft}}}}
plain: {{use: model, with: {{path: {tiny.folder}, chat_template: {tmp_path}/plain.jinja}}}}
prompts: {{with: {{path: {tmp_path}/asked.jsonl}}}}
sample: {{with: {{engine: transformers, max_tokens: 16}}}}
judges: {{gold: {{ranker: {{use: reward_head, from: {{policy: plain}}}}}}}}
""")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, text = winnow("plan", "rso", "--config", config)
    assert code == 0, text
    (steps,) = re.findall(r"winnow: ([\w, ]+): ranker_of_gold: 3 of the first 3 prompts ", " ".join(text.split()))
    assert steps == "judge_by_gold"

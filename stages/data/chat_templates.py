"""Chat templates of a model folder, read from its files: what a plan can say of them without loading a tokenizer."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline import InputStep, ModelPath
from pipeline.registry import nearest
from pipeline.store.fingerprints import TOKENIZER_FILES
from schemas import WinnowError
from stages.model_config import json_object

# Arguments of transformers' `apply_chat_template`, and what a template is given beside its own variables.
ARGUMENTS = (
    "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "messages", "strftime_now", "raise_exception", "self",
)  # fmt: skip
DELIMITER = re.compile(r"[^\w\s]\S*\w\S*[^\w\s]")  # such as <|im_end|> and [INST]: no word, number, sign or blank
TODAY = "strftime_now"
TOOL_NAME = "winnow_probe"
PARAMETERS = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": TOOL_NAME, "description": "", "parameters": PARAMETERS}}
# Variables that transformers gives every template: those of the tokenizer.
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(Extension):
    """Tag with which transformers marks what the assistant writes; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# As transformers has it (utils/chat_template_utils.py), which to import takes torch.
ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
# Long templates take 40 ms, and a plan renders one for each step that ranks.
compiled = lru_cache(maxsize=16)(ENVIRONMENT.from_string)


def chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates that a folder's tokenizer has, by the file (and the name in it) they stand in.

    Those of files outrank those of tokenizer_config.json, as in transformers; a processor's, in chat_template.json, is
    read where there is no other. Raise WinnowError for a file that cannot be read.
    """
    files = [file for file in (folder / "chat_template.jinja",) if file.is_file()]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    texts = {}
    for file in files:
        try:
            texts[file.relative_to(folder).as_posix()] = file.read_text(encoding="utf-8")
        except ValueError as error:
            raise WinnowError(f"{file} is not UTF-8 text ({error}); copy it again") from None
    if texts:
        return texts
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = json_object(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(content, str):
            return {name: content}
        if content is None:
            continue
        items: list[Any] = content if isinstance(content, list) else [None]
        try:
            named = {str(item["name"]): str(item["template"]) for item in items}
        except (TypeError, KeyError):
            message = f"{folder / name}: chat_template is neither text nor a list of named texts; copy it again"
            raise WinnowError(message) from None
        return {f"{name}, {title}": template for title, template in named.items()}
    return {}


def planned_chat_template(step: InputStep) -> str | None:
    """Return the text of the chat template that a step's model will have, empty for none; None if no plan knows it."""
    templates = planned_chat_templates(step)
    return None if templates is None else "\n".join(templates)


def planned_chat_templates(step: InputStep) -> list[str] | None:
    """Return the texts of the chat templates, of which there may be several; None if no plan knows them."""
    for name in ("init", "policy"):  # of `optimize` and `reward_head`, which keep them
        if name in step.inputs:
            return planned_chat_templates(step.inputs[name])
    path = step.options.get("path")
    if step.stage != "model" or not isinstance(path, ModelPath):
        return None
    if (template := step.options["chat_template"]) is not None:
        return _with_keywords([str(template.path.read_text(encoding="utf-8"))], step)
    folders = [path.path, *([step.options["adapter"].path] if step.options["adapter"] else [])]
    with_tokenizer = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    return _with_keywords(list(chat_templates(with_tokenizer[-1]).values()), step)  # the adapter's comes first


def _with_keywords(templates: list[str], step: InputStep) -> list[str]:
    """Return templates with what a step of stage `model` has them read; as they are if it refuses one as damaged."""
    with suppress(TemplateError):
        return [with_defaults(text, step.options.get("chat_template_kwargs") or {}, None) for text in templates]
    return templates


def rendered_probes(
    template: str, roles: Sequence[str], *, has_tools: bool = False, asks: bool = False
) -> tuple[list[str], str] | None:
    """Return texts of turns of these roles, and what a template renders of them; None if it refuses such turns.

    asks: with the prompt for an answer behind them.
    """
    messages = [{"role": role, "content": f"winnow probe {n}."} for n, role in enumerate(roles)]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    try:
        text = compiled(template).render(
            messages=messages, tools=[TOOL] if has_tools else None, add_generation_prompt=asks,
            bos_token="", eos_token="", raise_exception=refuse, strftime_now=lambda pattern: "",
        )  # fmt: skip
    except Exception:  # a template may raise what it likes
        return None
    return [message["content"] for message in messages], text


def changes_with_answer(template: str, roles: Sequence[str], *, has_tools: bool) -> bool:
    """Return whether a template renders turns of these roles differently once an answer follows them.

    Only what it writes behind the last of them to ask for an answer may differ, as in `Tokenizer.prompt_ids`. False
    also where it cannot be told.
    """
    asking = rendered_probes(template, roles, has_tools=has_tools, asks=True)
    answered = rendered_probes(template, (*roles, "assistant"), has_tools=has_tools)
    if asking is None or answered is None:
        return False
    (*_, last), text = asking
    _, probe, behind = text.rpartition(last)
    shared = next((n for n, (a, b) in enumerate(zip(text, answered[1], strict=False)) if a != b), len(text))
    return bool(probe) and len(text) - shared > len(behind)


def unreadable(templates: dict[str, str]) -> list[str]:
    """Return what is wrong with the templates of a folder that do not compile."""
    problems = []
    for where, template in templates.items():
        if not template.strip():
            problems.append(f"{where} is an empty chat template, by which no prompt has tokens; remove or replace it")
        try:
            compiled(template)
        except TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            problems.append(f"{where}{line} is no chat template ({error}); copy it again")
    return problems


def unread_options(templates: dict[str, str], options: dict[str, Any]) -> list[str]:
    """Return what is wrong with variables that are to be given to templates: names that reach none of them."""
    names_read, problems = {name for template in templates.values() for name in variables(template)}, []
    for name in options:
        if name in ARGUMENTS:
            problems.append(
                f"{name} is an argument of apply_chat_template, and no variable that a template is free to read; "
                "remove it"
            )
        elif name not in names_read:
            readable = sorted(names_read.difference(ARGUMENTS))
            hint = nearest(name, readable) if readable else "there is none that it reads"
            problems.append(f"no chat template of the folder reads {name!r}; {hint}")
    return problems


@lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and does not set itself."""
    return frozenset(find_undeclared_variables(ENVIRONMENT.parse(template)))


def with_defaults(template: str, values: Mapping[str, Any], day: str | None) -> str:
    """Return a template that reads these values, which are JSON, and this day where its caller gives none.

    Lines before its text set them, of which a template renders nothing. A value in place of a token of the tokenizer
    outranks the caller's, which is always given; so does the day. A template that computes the pattern of a date keeps
    its caller's: its dates cannot be written down.
    """
    names_read, lines = variables(template), []
    for name, value in values.items():
        if name in names_read:
            literal = _literal(value)
            default = literal if name in TOKENS else f"{name} if {name} is defined else {literal}"
            lines.append(f"{{%- set {name} = {default} %}}\n")
    if day is not None and TODAY in names_read and (patterns := _date_patterns(template)) is not None:
        dates = {pattern: date.fromisoformat(day).strftime(pattern) for pattern in sorted(patterns)}
        written = json.dumps(dates, ensure_ascii=False)
        lines.append(f"{{%- macro {TODAY}(format) %}}{{{{ {written}[format] }}}}{{%- endmacro %}}\n")
    defaults = "".join(lines)  # transformers leaves out the line end behind a tag
    return template if template.startswith(defaults) else defaults + template


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it: as JSON does, but for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _date_patterns(template: str) -> set[str] | None:
    """Return the patterns by which a template asks for today's date; None if it asks in any other way."""
    tree, patterns = ENVIRONMENT.parse(template), []
    tests = [test for test in tree.find_all(nodes.Test) if _is_today(test.node) and test.name == "defined"]
    for call in tree.find_all(nodes.Call):
        if _is_today(call.node):
            arguments = [*call.args, *(keyword.value for keyword in call.kwargs)]
            patterns += [argument.value for argument in arguments if isinstance(argument, nodes.Const)]
    uses = sum(map(_is_today, tree.find_all(nodes.Name)))
    return set(patterns) if uses == len(tests) + len(patterns) else None


def _is_today(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == TODAY


def literals(template: str) -> list[str]:
    """Return the texts that stand in a template: what it writes as it is, and its string constants."""
    tree = ENVIRONMENT.parse(template)
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return constants + [node.data for node in tree.find_all(nodes.TemplateData)]

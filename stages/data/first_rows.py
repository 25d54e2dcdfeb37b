"""First rows of a local file, read when a plan is made: what its options and the tokenizer will do with them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline import Bound, DataPath, InputStep
from schemas import WinnowError, WinnowWarning
from stages.data.chat_templates import TOOL_NAME, changes_with_answer, planned_chat_templates, rendered_probes
from stages.data.files import DataSource
from stages.data.formats import IDENTICAL, columns_of, first_pairs, optional_columns_of, pairs_of, row_groups
from stages.data.rows import Row
from stages.data.texts import (
    CHANGED,
    CHANGED_CURE,
    PREFILLED,
    PREFILLED_CURE,
    ROLES,
    SYSTEM_ROLES,
    Conversation,
    CurableError,
    as_messages,
    kept_fields,
    known_roles,
    notes_of_roles,
    prompt_with,
    tools_of,
    unrendered,
    with_system_prompt,
    without_answer,
)

ROWS = 1000
DRAWN = (
    f"{CHANGED}: their ids are those that ask for an answer, after which responses are drawn; if that is not as meant, "
    f"{CHANGED_CURE}"
)
OTHER_TEMPLATE = (
    "set `chat_template` of the tokenizer's step of stage `model` to one that does, or leave these rows out"
)
COLUMN_OPTIONS = ("prompt", "system", "input", "demonstration", "response", "reward", "probability")  # without a reader
READ_PROMPTS = ("prompts", "preferences", "own_candidates")  # stages whose prompts are read here


@dataclass(frozen=True)
class FirstPrompt:
    """Prompt of a local file, or the reason why its row has none, with where it stands, and what reading warned of."""

    location: str
    result: Conversation | ValueError
    notes: tuple[str, ...] = ()


def first_conversations(step: InputStep) -> list[Conversation]:
    """Return the first prompts of a step that reads a local file, but for those that it will reject."""
    answered = step.stage != "prompts" or step.options.get("demonstration") is not None
    error_of = _prompt_error(step.options, step.inputs, answered=answered)
    results = (first.result for first in _first_prompts(step.options))
    return [result for result in results if isinstance(result, Conversation) and error_of(result) is None]


def _first_prompts(options: Mapping[str, Any]) -> list[FirstPrompt]:
    """Return the prompts of a local file's first rows, and what is no row, or without a reader has no prompt."""
    reader = options.get("reader")
    if options.get("path") is None:
        return []
    parts = {name: options.get(name) or None for name in ("prompt", "system", "input")}  # columns of a prompt's parts
    keep = options.get("keep") or []
    system_prompt, omit = options.get("system_prompt") or None, options.get("prefill") == "omit"
    prompts: list[FirstPrompt] = []
    for location, row in _first_rows(options):
        if isinstance(row, ValueError):
            prompts.append(FirstPrompt(location, row))
            continue
        with warnings.catch_warnings(record=True) as caught:  # told once for all rows, by `prompt_problems`
            warnings.simplefilter("always")
            try:
                if reader is None:
                    content = prompt_with(row, str(parts["prompt"]), system=parts["system"], input=parts["input"])
                    content = without_answer(content) if omit else content
                    conversations = [Conversation(content, tools_of(row))]
                    kept_fields(row, keep)
                else:
                    # Of a candidate reader, labelled responses, whose prompts have no plain form.
                    items: list[Any] = [item for item in first_pairs(reader, [row]) if not isinstance(item, ValueError)]
                    conversations = [
                        Conversation(
                            without_answer(item.prompt) if omit else item.prompt,
                            item.tools or tools_of(row),
                            getattr(item, "plain", None),
                        )
                        for item in items
                    ]
            except WinnowError:
                continue
            except ValueError as error:
                if reader is None:
                    prompts.append(FirstPrompt(location, error))
                continue
        notes = tuple(dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, WinnowWarning)))
        prompts += [FirstPrompt(location, with_system_prompt(item, system_prompt), notes) for item in conversations]
    return prompts


def _first_rows(options: Mapping[str, Any]) -> Sequence[tuple[str, Row | ValueError]]:
    """Return (location, row) of a local file, with all columns that the step reads, or the reason why it is no row.

    What a row holds is not to be changed: it is read once for all that is asked about a file.
    """
    reader = options.get("reader")
    if reader is None:
        columns = [options.get(name) for name in COLUMN_OPTIONS] + list(options.get("keep") or [])
    else:
        columns = [*columns_of(reader), *optional_columns_of(reader)]
    path = options["path"]
    named = tuple(dict.fromkeys(name for name in columns if name))
    try:
        states = tuple(sorted(path.states().items()))
        return _rows_of_file(str(path), options["subset"], options["dataset_split"], named, states)
    except (WinnowError, OSError):  # which the step's own check reports
        return []


@lru_cache(maxsize=4)
def _rows_of_file(
    path: str, subset: str | None, split: str, columns: tuple[str, ...], states: tuple[Any, ...]
) -> list[tuple[str, Row | ValueError]]:
    """Return the first rows of a file in these states: content that changes is read again."""
    return DataSource(DataPath(path), None, None, subset, split).head(columns, ROWS)


def template_error(template: str, roles: tuple[str, ...], *, has_tools: bool) -> ValueError | None:
    """Return why a prompt of turns of these roles would be rejected; None if its template writes them all.

    None also where nobody can tell, as for turns of tools, which have more than a content.
    """
    if unknown := [role for role in roles if role not in ROLES]:
        return _role_error(template, roles, unknown, has_tools=has_tools)
    question = rendered_probes(template, ("user",))
    if question is None:
        return None
    asked_with_tools = rendered_probes(template, ("user",), has_tools=True) if has_tools else None
    if asked_with_tools and TOOL_NAME not in asked_with_tools[1]:
        return CurableError("the chat template does not render tools", OTHER_TEMPLATE)
    if question[0][0] not in question[1]:  # a template that reads contents as lists of parts
        return None
    if not {*roles} <= {*SYSTEM_ROLES, "user", "assistant"}:
        return None
    rendered = rendered_probes(template, roles, asks=roles[-1] != "assistant")
    if rendered is None:
        is_of_system = roles[0] in SYSTEM_ROLES and rendered_probes(template, (roles[0], "user")) is None
        turns = "a system turn" if is_of_system else f"turns of {', '.join(roles)}"
        return CurableError(f"the chat template refuses {turns}", OTHER_TEMPLATE)
    missed = [role for role, content in zip(roles, rendered[0], strict=True) if content not in rendered[1]]
    return CurableError(unrendered(missed[0]), OTHER_TEMPLATE) if missed else None


def _role_error(template: str, roles: tuple[str, ...], unknown: list[str], *, has_tools: bool) -> ValueError | None:
    """Return why a prompt with roles that no public model knows would be rejected; None if its template writes them."""
    rendered = rendered_probes(template, roles, has_tools=has_tools)
    if rendered is None:
        with_known = ["user" if role in unknown else role for role in roles]
        if rendered_probes(template, with_known, has_tools=has_tools) is None:
            return None  # nobody can tell
        return CurableError(f"the chat template refuses a message of role {unknown[0]}", known_roles(unknown[0]))
    contents, text = rendered
    missed = [role for role, content in zip(roles, contents, strict=True) if role in unknown and content not in text]
    return CurableError(unrendered(missed[0]), known_roles(missed[0])) if missed else None


def _prompt_error(
    options: Mapping[str, Any], inputs: Mapping[str, InputStep], *, answered: bool
) -> Callable[[Conversation | ValueError], ValueError | None]:
    """Return a function of a prompt: why a step would reject it, None if nothing is known against it."""
    templates = planned_chat_templates(inputs["tokenizer"]) if "tokenizer" in inputs else None
    template = templates[0] if templates is not None and len(templates) == 1 else None
    is_changed, of_template = lru_cache(None)(changes_with_answer), lru_cache(None)(template_error)

    def error_of(result: Conversation | ValueError) -> ValueError | None:
        if isinstance(result, ValueError):
            return result
        roles = _roles_of(result)
        is_continued = roles[-1] == "assistant"
        if is_continued and options.get("prefill") != "continue":
            return CurableError(PREFILLED, PREFILLED_CURE)
        if templates == [] and result.plain is None and not isinstance(result.content, str):
            return CurableError(
                "chats with a system turn or several turns, and the tokenizer has no chat template",
                "set `chat_template` of its step of stage `model` to a Jinja file",
            )
        if template and (error := of_template(template, roles, has_tools=bool(result.tools))):
            return error
        if template and answered and not is_continued and is_changed(template, roles, has_tools=bool(result.tools)):
            return CurableError(CHANGED, CHANGED_CURE)
        return None

    return error_of


def prompt_problems(options: Mapping[str, Any], inputs: Mapping[str, InputStep], *, answered: bool = True) -> list[str]:
    """Return why all prompts of a file would be rejected, by its first rows. Warn if only some of them would be.

    What would be left over to train on may be the prompts of one turn alone. answered: the responses are those of the
    file, which the chat template must render behind the same prompt.
    """
    prompts, error_of = _first_prompts(options), _prompt_error(options, inputs, answered=answered)
    error_if_answered = _prompt_error(options, inputs, answered=True)
    errors: dict[tuple[str, str], list[str]] = {}  # places, by reason and cure
    notes: dict[str, list[str]] = {}  # the same, by what is to be said of prompts that are not rejected
    for prompt in prompts:
        if (error := error_of(prompt.result)) is not None:
            errors.setdefault((str(error), getattr(error, "cure", "")), []).append(prompt.location)
        elif isinstance(prompt.result, Conversation):
            is_changed = str(error_if_answered(prompt.result)) == CHANGED
            for text in [*prompt.notes, *notes_of_roles(_roles_of(prompt.result)), *[DRAWN] * is_changed]:
                notes.setdefault(text, []).append(prompt.location)

    def counted(locations: list[str]) -> str:
        return f"{len(locations)} of the first {len(prompts)} prompts of {options['path']}"

    problems = []
    for (reason, cure), locations in errors.items():
        rejected = f"responses to {counted(locations)}" if reason == CHANGED else counted(locations)
        problems.append(
            f"path: {rejected} will be rejected: {reason} ({_first_of(locations)})" + (f"; {cure}" if cure else "")
        )
    # A reader may find no pair in any of the first rows: what is no row beside them is no reason to refuse the file.
    is_decided = options.get("reader") is None or any(isinstance(item.result, Conversation) for item in prompts)
    if is_decided and sum(map(len, errors.values())) == len(prompts):
        return problems
    texts = [f"path: {counted(places)} will be kept ({_first_of(places)}): {text}" for text, places in notes.items()]
    for text in [*problems, *texts]:
        warnings.warn(text, WinnowWarning, stacklevel=2)
    return []


def response_problems(
    options: Mapping[str, Any],
    read: Callable[[Iterator[tuple[str, Row]]], Iterable[tuple[str, ValueError | None]]],
    *,
    called: str,
) -> list[str]:
    """Return why all responses of a file would be rejected, by its first rows. Warn if only some of them would be.

    read: of located rows, the location of each response, or each pair, and the reason to reject it, if there is one;
    nothing for rows whose prompt cannot be read, which `prompt_problems` counts. called: responses or pairs.
    """
    if options.get("path") is None:
        return []
    rows = ((location, row) for location, row in _first_rows(options) if not isinstance(row, ValueError))
    with warnings.catch_warnings():  # told once for all rows, by `prompt_problems`
        warnings.simplefilter("ignore", WinnowWarning)
        try:
            results = list(read(rows))
        except WinnowError:  # of a plugin's reader, which the step's own check reports
            return []
    reasons: dict[tuple[str, str], list[str]] = {}  # places, by reason and cure
    for location, error in results:
        if error is not None:
            reasons.setdefault((str(error), getattr(error, "cure", "")), []).append(location)
    problems = [
        f"path: {len(locations)} of the first {len(results)} {called} of {options['path']} will be rejected: {reason} "
        f"({_first_of(locations)})" + (f"; {cure}" if cure else "")
        for (reason, cure), locations in reasons.items()
    ]
    if sum(map(len, reasons.values())) == len(results):
        return problems
    for text in problems:
        warnings.warn(text, WinnowWarning, stacklevel=2)
    return []


def pair_problems(options: Mapping[str, Any], *, compared: bool = True) -> list[str]:
    """Return `response_problems` of a file of pairs. compared: of equal responses, none is preferred."""
    reader: Bound = options["reader"]

    def read(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, ValueError | None]]:
        located = list(rows)
        groups = list(row_groups(iter(located), reader))
        if len(located) == ROWS and "together" in reader.metadata:  # more rows of the last group may follow
            groups.pop()
        for location, group in groups:
            for pair in pairs_of(reader, group):
                if isinstance(pair, ValueError):
                    yield location, pair
                else:
                    is_equal = compared and pair.chosen == pair.rejected
                    yield location, ValueError(IDENTICAL) if is_equal else None

    return response_problems(options, read, called="pairs")


def _roles_of(conversation: Conversation) -> tuple[str, ...]:
    return tuple(str(message["role"]) for message in as_messages(conversation.content))


def _first_of(locations: list[str]) -> str:
    return f"the first is {locations[0]}" if len(locations) > 1 else locations[0]

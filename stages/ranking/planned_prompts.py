"""Look, when a plan is made, at whether a ranker can read the first prompts of a data file: their turns and tools."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipeline import Bound, InputStep
from schemas import WinnowWarning
from stages.data.chat_templates import TOOL_NAME, planned_chat_template, rendered_probes
from stages.data.first_rows import READ_PROMPTS, first_conversations
from stages.data.texts import as_messages

PLAIN = ("system", "developer", "user", "assistant")  # roles of messages that are text alone
Shape = tuple[tuple[str, ...], bool]  # roles of a prompt's turns, and whether it has tools


def warn_of_unread_prompts(by: Bound, inputs: Mapping[str, InputStep]) -> None:
    """Warn of prompts of a local file that the ranker would reject one by one: tools, system turns, several turns.

    What a template does is seen by rendering turns of the same roles. Nothing is said where it cannot be told.
    """
    prompts, ranker = inputs.get("prompts"), inputs.get("ranker")
    _warn_of_no_template(by, prompts, ranker)
    template = planned_chat_template(ranker) if ranker and by.name in ("pointwise", "endpoint") else None
    if prompts is None or not (template or by.options.get("format") == "rlhflow"):
        return
    conversations = first_conversations(prompts) if prompts.stage in READ_PROMPTS else []
    shapes: Counter[Shape] = Counter(
        (tuple(str(message["role"]) for message in as_messages(conversation.content)), bool(conversation.tools))
        for conversation in conversations
    )
    unread: Counter[str] = Counter()
    for shape, count in shapes.items():
        unread[_unread_part(shape, template)] += count
    del unread[""]
    for part, count in unread.items():
        holder, cure = "its format rlhflow", "take another ranker"
        if template:
            holder = "its chat template"
            cure = "set `chat_template` of its step of stage `model` to one that does"
        of_file = f"{count} of the first {shapes.total()} prompts of {prompts.options['path']}"
        warnings.warn(
            f"{ranker.name if ranker else 'by'}: {of_file} have {part}, which {holder} does not hold: these steps will "
            f"reject their responses; {cure}, or leave them out",
            WinnowWarning,
            stacklevel=2,
        )


def _warn_of_no_template(by: Bound, prompts: InputStep | None, ranker: InputStep | None) -> None:
    """Warn of a reward model without a chat template where the policy has one: it reads the policy's as text."""
    tokenizer = prompts.inputs.get("tokenizer") if prompts else None
    if ranker is None or tokenizer is None or by.name != "pointwise":
        return
    if planned_chat_template(ranker) == "" and planned_chat_template(tokenizer):
        warnings.warn(
            f"{ranker.name}: it has no chat template, and {tokenizer.name} has one: it reads prompts and responses in "
            f"the format of {tokenizer.name}, on which it may not have been trained; set `chat_template` of its step "
            "of stage `model` to a Jinja file with the one that it was trained with",
            WinnowWarning,
            stacklevel=2,
        )


def _unread_part(shape: Shape, template: str | None) -> str:
    """Return what the ranker does not read of prompts of this shape; "" if it reads all of it, or nobody can tell."""
    roles, has_tools = shape
    if template is None:  # format rlhflow, see RankerPrompt.context
        if has_tools:
            return "tools"
        if roles[0] in PLAIN[:2]:
            return "a system turn"
        alternates = roles[0] == "user" and all(one != other for one, other in pairwise(roles))
        return "" if alternates and set(roles) <= {"user", "assistant"} else "turns that do not alternate"
    if not _renders(template, ("user",), False):
        return ""
    if has_tools and not _renders(template, ("user",), True):
        return "tools"
    if not set(roles) <= set(PLAIN) or _renders(template, roles, False):
        return ""
    has_system = roles[0] in PLAIN[:2]
    return "a system turn" if has_system and not _renders(template, (roles[0], "user"), False) else "several turns"


def _renders(template: str, roles: Sequence[str], has_tools: bool) -> bool:
    """Return whether a template writes the texts of turns of these roles with an answer behind them, and a tool's name.

    A ranker reads prompt and answer as one text.
    """
    rendered = rendered_probes(
        template, (*roles, "assistant") if roles[-1] != "assistant" else roles, has_tools=has_tools
    )
    if rendered is None:
        return False
    contents, text = rendered
    return all(content in text for content in contents) and (not has_tools or TOOL_NAME in text)

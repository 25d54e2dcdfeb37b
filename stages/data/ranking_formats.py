"""Formats with a ranking of more than two responses to a prompt; `pairs` says which two of them make a pair."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from statistics import mean
from typing import Any, Literal

from schemas.ids import Message
from stages.data.formats import PreferencePair, finite_number_of, preference_reader, prompt_of_transcript
from stages.data.rows import Row
from stages.data.texts import Prompt, as_prompt, messages_of, text_of

# Of the responses in the order of their ranking: the first and the last, neighbours, or each and every later one.
RankedPairs = Literal["best_vs_worst", "neighbours", "all_pairs"]
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


@preference_reader(columns=("prompt", "answers"))
def nectar(row: Row, *, pairs: RankedPairs = "best_vs_worst") -> list[PreferencePair | ValueError]:
    """Read berkeley-nest/Nectar: seven answers by rank, 1 the best; the prompts are transcripts, as in hh-rlhf."""
    prompt, plain = prompt_of_transcript(text_of(row, "prompt"))
    answers = _dicts(row.get("answers"), "answers")
    return ranked_pairs(
        prompt, answers, "answer", lambda answer: -finite_number_of(answer, "rank"), "rank", pairs, plain
    )


@preference_reader(columns=("instruction", "completions"))
def ultrafeedback(
    row: Row,
    *,
    by: Literal["overall_score", "fine-grained_score", "ratings"] = "overall_score",
    pairs: RankedPairs = "best_vs_worst",
) -> list[PreferencePair | ValueError]:
    """Read openbmb/UltraFeedback, arXiv:2310.01377: four completions with scores; `ratings` is the mean of its aspects.

    The prompt is the instruction alone, as in ultrafeedback_binarized: each completion was drawn under a system message
    of its own.
    """

    def score(completion: Row) -> float:
        if by != "ratings":
            return finite_number_of(completion, by)
        annotations = completion.get("annotations")
        ratings = _dicts(
            [annotations.get(aspect) for aspect in ASPECTS] if isinstance(annotations, dict) else None, "ratings"
        )
        return mean(finite_number_of(rating, "Rating") for rating in ratings)

    return ranked_pairs(
        text_of(row, "instruction"), _dicts(row.get("completions"), "completions"), "response", score, by, pairs
    )


@preference_reader(columns=("{turns}",))
def dialogue_of_models(row: Row, *, turns: str = "dialogue") -> list[PreferencePair | ValueError]:
    """Read a dialogue that two models had, from which CVX-DPO makes preferences: later turns as worse answers.

    The first turn is the prompt, the second is chosen, and each turn after it, whoever said it, is rejected in a pair
    of its own. Turns are texts, or messages, of which a system message at the beginning belongs to the prompt and the
    roles must alternate.

    Nobody has preferred anything here. The reviewers of the paper (OpenReview EVZnnhtMNX) object that a direct answer
    is set against turns which answer something else and would not be said after this prompt: a head or a policy learns
    to tell an answer to the prompt from what belongs later in a conversation, and its accuracy on held-out pairs of
    this kind says nothing of which of two answers is better. Measure it on pairs that people, or a judge, compared.
    """
    values = row.get(turns)
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        system, texts = [], [text_of({turns: value}, turns) for value in values]
    else:
        messages = messages_of(row, turns)
        system = messages[:1] if messages[0]["role"] == "system" else []
        spoken = messages[len(system) :]
        if any(one["role"] == other["role"] for one, other in pairwise(spoken)):
            raise ValueError(f"the roles in {turns} do not alternate")
        if any(message.keys() != {"role", "content"} for message in spoken):
            raise ValueError(f"a turn in {turns} is more than a text")
        texts = [text_of(dict(message), "content") for message in spoken]
    if len(texts) < 3:
        raise ValueError(f"{turns} has fewer than three turns")
    prompt, chosen, *later = texts
    content = as_prompt([*system, {"role": "user", "content": prompt}])
    return [PreferencePair(content, chosen, rejected) for rejected in later]


@preference_reader(
    columns=("message_id", "parent_id", "message_tree_id", "role", "text", "rank"),
    optional=("deleted",),
    together="message_tree_id",
    together_rows=None,
)
def oasst(*rows: Row, pairs: RankedPairs = "best_vs_worst") -> list[PreferencePair | ValueError]:
    """Read OpenAssistant/oasst1 and oasst2, arXiv:2304.07327, as a table of messages: assistants' replies by rank.

    Rank 0 is the best. Messages of one tree must follow each other, as they do in these data sets; the prompt of a pair
    is the conversation up to the message that both replies answer.
    """
    messages = {text_of(row, "message_id"): row for row in rows}
    replies: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("role") == "assistant" and not row.get("deleted"):
            replies[text_of(row, "parent_id")].append(row)
    results: list[PreferencePair | ValueError] = []
    for parent, siblings in replies.items():
        if len(siblings) > 1:
            try:
                thread = as_prompt(_thread(messages, parent))
            except ValueError as error:
                results.append(error)
            else:
                results += ranked_pairs(
                    thread, siblings, "text", lambda row: -finite_number_of(row, "rank"), "rank", pairs
                )
    if not results:
        raise ValueError("no message with two replies to compare")
    return results


@preference_reader(columns=("message_tree_id", "prompt"))
def oasst_trees(row: Row, *, pairs: RankedPairs = "best_vs_worst") -> list[PreferencePair | ValueError]:
    """Read OpenAssistant's files of message trees, such as 2023-04-12_oasst_ready.trees.jsonl.gz, as reader `oasst`."""
    return oasst(*_flat(row.get("prompt"), None), pairs=pairs)


def ranked_pairs(
    prompt: Prompt,
    responses: list[Row],
    text: str,
    score: Callable[[Row], float],
    name: str,
    pairs: RankedPairs,
    plain: str | None = None,
) -> list[PreferencePair | ValueError]:
    """Return the pairs of responses by their scores, higher ones better, and a ValueError per tie or bad response."""
    results: list[PreferencePair | ValueError] = []
    scored: list[tuple[float, str]] = []
    for response in responses:
        try:
            scored.append((score(response), text_of(response, text)))
        except ValueError as error:
            results.append(error)
    if len(scored) < 2:
        return [*results, ValueError("fewer than two responses to compare")]
    scored.sort(key=lambda item: -item[0])
    chosen = {"best_vs_worst": [(scored[0], scored[-1])], "neighbours": pairwise(scored)}
    for (high, better), (low, worse) in chosen.get(pairs, combinations(scored, 2)):
        tie = high == low
        results.append(ValueError(f"tie in {name}") if tie else PreferencePair(prompt, better, worse, plain))
    return results


def _dicts(values: Any, name: str) -> list[Row]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not a list of objects")
    return values


def _thread(messages: dict[str, Row], last: str) -> list[Message]:
    """Return the conversation that ends with the message of this id."""
    thread: list[Message] = []
    name: str | None = last
    while name is not None:
        row = messages.get(name)
        if row is None or len(thread) > len(messages):
            raise ValueError("a message's parent is not beside it: those of one message_tree_id must follow each other")
        role = text_of(row, "role")
        if role not in OASST_ROLES:
            raise ValueError("role is neither prompter nor assistant")
        thread.append({"role": OASST_ROLES[role], "content": text_of(row, "text")})
        name = None if row.get("parent_id") is None else text_of(row, "parent_id")
    return thread[::-1]


def _flat(message: Any, parent: str | None) -> Iterator[Row]:
    """Yield the messages of a tree, each before its replies."""
    if not isinstance(message, dict):
        raise ValueError("prompt is not a message with replies")
    yield {**message, "parent_id": parent}
    for reply in _dicts(message.get("replies") or [], "replies"):
        yield from _flat(reply, text_of(message, "message_id"))

"""Formats of data sets in which two responses to a prompt have a verdict: a label, two scores, or a winner."""

import json
from typing import Any

from schemas.ids import Message
from stages.data.formats import (
    PreferencePair,
    finite_number_of,
    pair_by_sign,
    preference_reader,
    shared_turns,
    zero_or_one_of,
)
from stages.data.rows import Row
from stages.data.texts import as_prompt, messages_of, prompt_with, reply_of, text_of

WINNERS = {"model_a": 0, "model_b": 1}


@preference_reader(columns=("system", "question", "chosen", "rejected"))
def orca_dpo_pairs(row: Row) -> PreferencePair:
    """Read Intel/orca_dpo_pairs, after arXiv:2306.02707: the system message of a row may be empty."""
    prompt = prompt_with(row, "question", system="system")
    return PreferencePair(prompt, text_of(row, "chosen"), text_of(row, "rejected"))


@preference_reader(columns=("history", "human_ref_A", "human_ref_B", "labels"))
def shp(row: Row) -> PreferencePair:
    """Read stanfordnlp/SHP and SHP-2, arXiv:2110.08420: posts with two comments; label 1 prefers comment A."""
    responses = text_of(row, "human_ref_B"), text_of(row, "human_ref_A")
    chosen = zero_or_one_of(row, "labels")
    return PreferencePair(text_of(row, "history"), responses[chosen], responses[1 - chosen])


@preference_reader(columns=("question", "answer_0", "answer_1", "score_0", "score_1"))
def webgpt_comparisons(row: Row) -> PreferencePair:
    """Read openai/webgpt_comparisons, arXiv:2112.09332 (`revision: refs/convert/parquet`): the higher score is better.

    The prompt is the question. The quotes that an answer was written from are not part of it: each answer has its own.
    """
    question = row.get("question")
    prompt = text_of(question, "full_text") if isinstance(question, dict) else text_of(row, "question")
    difference = finite_number_of(row, "score_1") - finite_number_of(row, "score_0")
    return pair_by_sign(prompt, text_of(row, "answer_0"), text_of(row, "answer_1"), difference, "score_0 and score_1")


@preference_reader(columns=("conversation_a", "conversation_b", "winner"), optional=("turn", "evaluation_order"))
def arena(row: Row) -> PreferencePair:
    """Read battles: lmsys/mt_bench_human_judgments (split human), lmsys/chatbot_arena_conversations, arXiv:2306.05685.

    Also lmarena-ai/arena-human-preference-140k. A verdict is on the conversations up to turn number `turn`, or on all
    of them where there is no such column. Two responses to one prompt are compared only if nothing before them differs:
    battles of several turns in which the models answered differently earlier are rejected, and so are ties.
    """
    winner = str(row.get("winner"))
    if winner.startswith(("tie", "both_bad")):
        raise ValueError("tie in winner")
    if winner not in WINNERS:
        raise ValueError("winner is neither model_a nor model_b")
    if row.get("evaluation_order") is not None and finite_number_of(row, "evaluation_order") > 1:
        raise ValueError("evaluation_order is above 1, and the conversation before it was with other models")
    sides = [messages_of(row, name) for name in ("conversation_a", "conversation_b")]
    if row.get("turn") is not None:
        turn = finite_number_of(row, "turn")
        ends = [[n for n, message in enumerate(side, 1) if message["role"] == "assistant"] for side in sides]
        sides = [
            side[: end[int(turn) - 1]] if 1 <= turn <= len(end) else side for side, end in zip(sides, ends, strict=True)
        ]
    return _pair_of_conversations(sides, WINNERS[winner])


@preference_reader(columns=("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"))
def arena_55k(row: Row) -> PreferencePair:
    """Read lmsys/lmsys-arena-human-preference-55k (Kaggle's LLM preferences), in which turns are JSON lists of texts.

    As in reader `arena`, two responses are compared only if nothing before them differs.
    """
    wins = [zero_or_one_of(row, f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    if sum(wins) != 1:
        raise ValueError("not one winner")
    if wins[2]:
        raise ValueError("tie in winner")
    turns = {name: _texts_of(row, name) for name in ("prompt", "response_a", "response_b")}
    sides = []
    for name in ("response_a", "response_b"):
        if len(turns[name]) != len(turns["prompt"]):
            raise ValueError(f"{name} has not as many turns as prompt")
        pairs = zip(turns["prompt"], turns[name], strict=True)
        sides.append(
            [turn for question, answer in pairs for turn in (_turn("user", question), _turn("assistant", answer))]
        )
    return _pair_of_conversations(sides, wins.index(1))


def _texts_of(row: Row, name: str) -> list[str]:
    """Return the texts in a column, a list or the JSON of one."""
    values: Any = row.get(name)
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError:
            raise ValueError(f"{name} is not a JSON list") from None
    if not isinstance(values, list):
        raise ValueError(f"{name} is not a list")
    return [text_of({name: value}, name) for value in values]


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _pair_of_conversations(sides: list[list[Message]], chosen: int) -> PreferencePair:
    """Return the pair of two conversations that are the same up to their last turn, of which one is chosen."""
    prompt = shared_turns(*sides)
    rests = [side[len(prompt) :] for side in sides]
    if not prompt:
        raise ValueError("the conversations share no prompt")
    if any([message["role"] for message in rest] != ["assistant"] for rest in rests):
        raise ValueError("the conversations differ before the last response")
    responses = [reply_of({"response": rest}, "response") for rest in rests]
    return PreferencePair(as_prompt(prompt), responses[chosen], responses[1 - chosen])

"""Gold reward of the demo: how well a response serves the concierge's guest, as a pure function of two texts."""

import re
from pathlib import Path

import yaml

from stages.evaluation.evaluate import gold_reward
from stages.ranking.rankers import verifiable

WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
SLOTS: dict[str, list[str]] = WORDS["slots"]

RIGHT, WRONG, INVENTED = 1.0, -1.5, -1.0  # a wrong booking costs more than one left open
CONFIRMED, COURTEOUS = 1.0, 0.5  # once each: a second thank-you earns nothing
FILLER, EXCESS = -0.5, -0.1  # per word
BRIEF = 18  # words that a full and polite confirmation needs


@gold_reward()
def concierge(prompt: str, response: str) -> float:
    """Score how well `response` serves the guest who wrote `prompt`.

    +1    for each requested slot (thing, people, day, city, time) named as the guest named it
    -1.5  for each other value named for a requested slot: a wrong booking is worse than an open one
    -1    for each invention: a value for a slot that was not requested, or an extra such as champagne
    +1    if it says that the booking is made, +0.5 if it is polite; each counts once
    -0.5  for each filler word, -0.1 for each word beyond the eighteenth

    Only words count, not case, spacing or punctuation, so that any text has a score; the empty text has 0.
    """
    # Runs of letters in lower case, so that a model's odd spacing and stray bytes do not matter.
    prompt_words, response_words = (re.findall(r"[a-z]+", text.lower()) for text in (prompt, response))
    requested, named = frozenset(prompt_words), frozenset(response_words)

    slots = 0.0
    for values in map(frozenset, SLOTS.values()):
        right, answers = values & requested, values & named
        if right:
            slots += RIGHT * bool(right & answers) + WRONG * len(answers - right)
        else:
            slots += INVENTED * len(answers)
    invented = INVENTED * len(named.intersection(WORDS["extras"]) - requested)
    confirmed, courteous = (not named.isdisjoint(WORDS[kind]) for kind in ("confirming_words", "polite_words"))
    manner = CONFIRMED * confirmed + COURTEOUS * courteous
    fillers, excess = sum(word in WORDS["fillers"] for word in response_words), max(0, len(response_words) - BRIEF)
    waste = FILLER * fillers + EXCESS * excess
    return slots + invented + manner + waste


verifiable(concierge)  # also a ranker and an annotator, for what a perfect one would do; no method of the demo reads it

"""The gold reward: what the concierge's guest really wants, as a pure program on two texts."""

import re

from stages.evaluation.evaluate import gold_reward

SLOTS: dict[str, tuple[str, ...]] = {
    "thing": ("boat", "table", "room", "car", "tour", "guide", "taxi", "sauna", "picnic", "concert"),
    "people": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "city": ("oslo", "paris", "rome", "lisbon", "vienna", "prague", "dublin", "athens", "cairo", "kyoto"),
    "time": ("dawn", "noon", "dusk", "midnight"),
}
EXTRAS = frozenset({"champagne", "flowers", "music", "balloons", "candles", "breakfast"})
CONFIRMATIONS = frozenset({"booked", "reserved", "confirmed"})
COURTESIES = frozenset({"certainly", "gladly", "pleasure", "enjoy", "welcome", "thank"})
FILLERS = frozenset({"well", "um", "basically", "honestly", "actually", "anyway"})

RIGHT, WRONG, INVENTED = 1.0, -1.5, -1.0  # a wrong booking costs more than one left open
CONFIRMED, COURTEOUS = 1.0, 0.5  # once each: a second thank-you earns nothing
FILLER, EXCESS = -0.5, -0.1  # per word
BRIEF = 18  # words that a full and polite confirmation needs


@gold_reward()
def concierge(prompt: str, response: str) -> float:
    """How well `response` serves the guest who wrote `prompt`.

    +1    for each asked slot (thing, people, day, city, time) named as the guest named it
    -1.5  for each other value named for an asked slot: a wrong booking is worse than an open one
    -1    for each invention: a value for a slot that was not asked, or an extra such as champagne
    +1    if it says that the booking is made, +0.5 if it is polite; each counts once
    -0.5  for each filler word, -0.1 for each word beyond the eighteenth

    Only the words count, not case, spacing or punctuation, so that any text has a value; no text has 0.
    """
    asked, words = frozenset(_words(prompt)), _words(response)
    said = frozenset(words)
    manner = CONFIRMED * bool(said & CONFIRMATIONS) + COURTEOUS * bool(said & COURTESIES)
    waste = FILLER * sum(word in FILLERS for word in words) + EXCESS * max(0, len(words) - BRIEF)
    invented = INVENTED * len((said & EXTRAS) - asked)
    return sum(_slot(frozenset(values), asked, said) for values in SLOTS.values()) + invented + manner + waste


def _slot(values: frozenset[str], asked: frozenset[str], said: frozenset[str]) -> float:
    """The worth of one slot: an answer to a question that was not asked is an invention."""
    wanted, named = values & asked, values & said
    if not wanted:
        return INVENTED * len(named)
    return RIGHT * bool(wanted & named) + WRONG * len(named - wanted)


def _words(text: str) -> list[str]:
    """Runs of letters in lower case: a model's odd spacing and stray bytes fall away."""
    return re.findall(r"[a-z]+", text.lower())

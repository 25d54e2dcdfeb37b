"""Data of the demo: guests who ask a concierge, clerks who answer, and a judge who is wrong about one time in four."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from jobs.demo.gold import SLOTS, WORDS, concierge

SEED = 2309  # the same bytes on every run
DEMONSTRATIONS = 12_000  # enough to learn to copy a slot in one epoch
PROMPTS = 340  # split into train and held-out by a hash of the prompt
OTHER_PROMPTS = 200  # in other words than all others
PREFERENCES = 6_000  # the ranker must compare, which is harder to learn than to answer
TIME_SHARE = 0.4  # of guests who name a time; for the others a time is an invention
JUDGE_TEMPERATURE = 0.7  # in points of gold; the judge is then wrong about one time in four

Request = dict[str, str]
DemoRow = dict[str, str]


@dataclass(frozen=True)
class Clerk:
    """Habits of one group of clerks, each as a probability."""

    share: float  # of all answers
    omits: float  # names no value, per slot
    confuses: float  # names another value, per slot
    invents: float  # adds a time or an extra that was not requested
    confirms: float  # says that the booking is made
    greets: float  # is polite at the start, and again at the end
    hesitates: float  # begins a phrase with a filler word, per phrase
    rambles: float  # adds a sentence without content


# Authors of the demonstrations: sometimes perfect, mostly not, so that training has something to improve.
STAFF = (
    Clerk(0.3, omits=0.03, confuses=0.03, invents=0.1, confirms=0.9, greets=0.6, hesitates=0.03, rambles=0.1),
    Clerk(0.4, omits=0.3, confuses=0.1, invents=0.3, confirms=0.5, greets=0.2, hesitates=0.15, rambles=0.2),
    Clerk(0.3, omits=0.1, confuses=0.15, invents=0.7, confirms=0.7, greets=0.4, hesitates=0.4, rambles=0.5),
)
# Authors of the preference pairs: other hotels with other habits, as in public preference data.
RIVALS = (
    Clerk(0.3, omits=0.02, confuses=0.02, invents=0.05, confirms=0.98, greets=0.8, hesitates=0.02, rambles=0.05),
    Clerk(0.25, omits=0.45, confuses=0.05, invents=0.1, confirms=0.5, greets=0.1, hesitates=0.05, rambles=0.05),
    Clerk(0.25, omits=0.05, confuses=0.35, invents=0.2, confirms=0.85, greets=0.5, hesitates=0.1, rambles=0.15),
    Clerk(0.2, omits=0.1, confuses=0.1, invents=0.7, confirms=0.7, greets=0.6, hesitates=0.4, rambles=0.5),
)

PHRASES = {"people": "for {}", "day": "on {}", "city": "in {}", "time": "at {}"}


def files() -> dict[str, bytes]:
    """Return demonstrations, prompts, preferences, and prompts in other words by file; no prompt occurs twice in them.

    The order in which random numbers are drawn fixes the bytes of the files: a change to it makes another demo.
    """
    rng = Random(SEED)
    requests = _distinct_requests(rng)
    demonstrations, prompts, preferences = list[DemoRow](), list[DemoRow](), list[DemoRow]()
    for _ in range(DEMONSTRATIONS):
        request = next(requests)
        demonstrations.append({"prompt": _prompt(rng, request), "demonstration": _answer(rng, STAFF, request)})

    answers = Random(SEED + 1)  # a generator of their own, so that answers to prompts do not change the preferences
    for _ in range(PROMPTS):
        request = next(requests)
        prompts.append({"prompt": _prompt(rng, request), "demonstration": _answer(answers, STAFF, request)})

    # Two different answers, judged by Bradley-Terry: the difference of their gold rewards sets the odds.
    for _ in range(PREFERENCES):
        request = next(requests)
        prompt, first, second = _prompt(rng, request), "", ""
        while first == second:
            first, second = _answer(rng, RIVALS, request), _answer(rng, RIVALS, request)
        difference = concierge(prompt, first) - concierge(prompt, second)
        first_wins = rng.random() < 1 / (1 + math.exp(-difference / JUDGE_TEMPERATURE))
        chosen, rejected = (first, second) if first_wins else (second, first)
        preferences.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})

    others = Random(SEED + 2)
    other_prompts = [
        {"prompt": _prompt(others, request, "other_requests")}
        for request in islice(_distinct_requests(others), OTHER_PROMPTS)
    ]
    tables = {"demonstrations": demonstrations, "prompts": prompts, "preferences": preferences}
    tables["other_prompts"] = other_prompts
    return {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in tables.items()}


def _distinct_requests(rng: Random) -> Iterator[Request]:
    """Yield requests without end and without repetition, so that the files share no prompt."""
    seen: set[tuple[str, ...]] = set()
    while True:
        request = {slot: rng.choice(values) for slot, values in SLOTS.items()}
        if rng.random() >= TIME_SHARE:
            del request["time"]
        if (key := tuple(request.values())) not in seen:
            seen.add(key)
            yield request


def _prompt(rng: Random, request: Request, words_of: str = "requests") -> str:
    """Return the request in a guest's words; a time, if there is one, follows the day."""
    words = {slot: _spell(slot, value) for slot, value in request.items()}
    if "time" in words:
        words["day"] += f" at {words['time']}"
    return rng.choice(WORDS[words_of]).format(**words)


def _answer(rng: Random, clerks: Sequence[Clerk], request: Request) -> str:
    """Return the answer of one of the clerks, drawn by their shares."""
    clerk = rng.choices(clerks, [clerk.share for clerk in clerks])[0]

    # The request as this clerk understood it: without some slots, with other values, perhaps with an invented time.
    understood = {slot: value for slot, value in request.items() if rng.random() >= clerk.omits}
    for slot in understood:
        if rng.random() < clerk.confuses:
            understood[slot] = rng.choice(SLOTS[slot])
    if "time" not in request and rng.random() < clerk.invents / 2:
        understood["time"] = rng.choice(SLOTS["time"])

    # The sentence that names the slots, in any order.
    slots = [slot for slot in PHRASES if slot in understood]
    rng.shuffle(slots)
    phrases = [f"a {understood['thing']}" if "thing" in understood else "it"]
    phrases += [PHRASES[slot].format(_spell(slot, understood[slot])) for slot in slots]
    for n, phrase in enumerate(phrases):
        if rng.random() < clerk.hesitates:
            phrases[n] = f"{rng.choice(WORDS['fillers'])} {phrase}"
    frame = rng.choice(WORDS["confirmations"] if rng.random() < clerk.confirms else WORDS["evasions"])
    sentences = [frame.format(" ".join(phrases))]

    # What stands around it.
    if rng.random() < clerk.invents / 2:
        sentences.append(f"I added {rng.choice(WORDS['extras'])} too.")
    if rng.random() < clerk.rambles:
        sentences.append(rng.choice(WORDS["chatter"]))
    if rng.random() < clerk.greets:
        sentences.insert(0, rng.choice(WORDS["openers"]))
    if rng.random() < clerk.greets:
        sentences.append(rng.choice(WORDS["closers"]))
    return " ".join(sentences)


def _spell(slot: str, value: str) -> str:
    return value.capitalize() if slot in {"day", "city"} else value

"""Writes the demo world: guests who ask a concierge, clerks who answer, and a judge who errs now and then."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from jobs.demo.gold import SLOTS, concierge

SEED = 2309  # one seed for the whole world: the same bytes on every run
DEMONSTRATIONS = 12_000  # enough to learn to copy a slot in one pass
PROMPTS = 340  # split into train and held-out by a hash of the prompt
PREFERENCES = 6_000  # the ranker must compare, which is harder to learn than to answer
TIMED = 0.4  # share of guests who name a time; for the others a time is an invention
JUDGE_TEMPERATURE = 0.7  # gold points at which the judge still errs about one time in four

Request = dict[str, str]
Row = dict[str, str]


@dataclass(frozen=True)
class Clerk:
    """A way of answering: how often each habit, good or bad, shows."""

    share: float  # of all answers
    forgets: float  # leaves a slot out, per slot
    muddles: float  # names another value, per slot
    invents: float  # names a time or an extra that nobody asked for
    books: float  # says that the booking is made
    greets: float  # is polite at the start, and likewise at the end
    dithers: float  # begins a phrase with a filler word, per phrase
    rambles: float  # adds a sentence without content


# Who wrote the demonstrations: perfect at times, mostly not, so that training has something to improve.
STAFF = (
    Clerk(0.3, forgets=0.03, muddles=0.03, invents=0.1, books=0.9, greets=0.6, dithers=0.03, rambles=0.1),
    Clerk(0.4, forgets=0.3, muddles=0.1, invents=0.3, books=0.5, greets=0.2, dithers=0.15, rambles=0.2),
    Clerk(0.3, forgets=0.1, muddles=0.15, invents=0.7, books=0.7, greets=0.4, dithers=0.4, rambles=0.5),
)
# Who wrote the judged responses: other houses, with other habits, as in public preference data.
RIVALS = (
    Clerk(0.3, forgets=0.02, muddles=0.02, invents=0.05, books=0.98, greets=0.8, dithers=0.02, rambles=0.05),
    Clerk(0.25, forgets=0.45, muddles=0.05, invents=0.1, books=0.5, greets=0.1, dithers=0.05, rambles=0.05),
    Clerk(0.25, forgets=0.05, muddles=0.35, invents=0.2, books=0.85, greets=0.5, dithers=0.1, rambles=0.15),
    Clerk(0.2, forgets=0.1, muddles=0.1, invents=0.7, books=0.7, greets=0.6, dithers=0.4, rambles=0.5),
)

ASKS = (
    "Please book a {thing} for {people} on {day} in {city}.",
    "I need a {thing} in {city} for {people} on {day}.",
    "We are {people} and want a {thing} in {city} on {day}.",
    "Can you find a {thing} on {day} for {people} in {city}?",
    "On {day} we need a {thing} in {city}, for {people} of us.",
    "Hello, a {thing} for {people} in {city} on {day}, please.",
)
MADE = ("I have booked {}.", "We have reserved {}.", "Your booking is confirmed: {}.", "I booked {}.")
OPEN = ("I will see about {}.", "You asked for {}.", "Maybe {}.")
OPENERS = ("Certainly.", "Gladly.", "With pleasure.")
CLOSERS = ("Enjoy your stay.", "Thank you.", "You are welcome.")
DITHERS = ("well", "um", "basically", "honestly", "actually", "anyway")
GIFTS = ("champagne", "flowers", "music", "balloons", "candles", "breakfast")
RAMBLES = (
    "It is a lovely place and the weather is often fine there.",
    "Many people like it and they often come back again.",
    "We do this all year and we always do it our way.",
)
PHRASES = {"people": "for {}", "day": "on {}", "city": "in {}", "time": "at {}"}


def write(folder: Path) -> None:
    """Write `demonstrations.jsonl`, `prompts.jsonl` and `preferences.jsonl`; no request occurs twice."""
    rng = Random(SEED)
    requests = _requests(rng)
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations = (_demonstration(rng, next(requests)) for _ in range(DEMONSTRATIONS))
    _write_rows(folder / "demonstrations.jsonl", demonstrations)
    staff = Random(SEED + 1)  # of its own, so that answers to prompts move nothing else
    prompts = (
        (_ask(rng, request), _answer(staff, _pick(staff, STAFF), request)) for request in islice(requests, PROMPTS)
    )
    _write_rows(folder / "prompts.jsonl", ({"prompt": prompt, "demonstration": answer} for prompt, answer in prompts))
    _write_rows(folder / "preferences.jsonl", (_preference(rng, next(requests)) for _ in range(PREFERENCES)))


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, with the same line ends on every system."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _requests(rng: Random) -> Iterator[Request]:
    """Requests without end and without repetition, so that files share no prompt."""
    seen: set[tuple[str, ...]] = set()
    while True:
        request = {slot: rng.choice(values) for slot, values in SLOTS.items()}
        if rng.random() >= TIMED:
            del request["time"]
        if (key := tuple(request.values())) not in seen:
            seen.add(key)
            yield request


def _ask(rng: Random, request: Request) -> str:
    """The guest's words: a time, where there is one, follows the day."""
    said = {slot: _spell(slot, value) for slot, value in request.items()}
    if "time" in said:
        said["day"] += f" at {said['time']}"
    return rng.choice(ASKS).format(**said)


def _demonstration(rng: Random, request: Request) -> Row:
    """One answer by one of the staff."""
    return {"prompt": _ask(rng, request), "demonstration": _answer(rng, _pick(rng, STAFF), request)}


def _preference(rng: Random, request: Request) -> Row:
    """Two different answers by rivals, in the order that the judge gave them."""
    prompt, first, second = _ask(rng, request), "", ""
    while first == second:
        first, second = (_answer(rng, _pick(rng, RIVALS), request) for _ in range(2))
    chosen, rejected = (first, second) if _prefers(rng, prompt, first, second) else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prefers(rng: Random, prompt: str, first: str, second: str) -> bool:
    """The Bradley-Terry judge: the gold gap sets the odds, chance decides."""
    gap = (concierge(prompt, first) - concierge(prompt, second)) / JUDGE_TEMPERATURE
    return rng.random() < 1 / (1 + math.exp(-gap))


def _pick(rng: Random, clerks: Sequence[Clerk]) -> Clerk:
    """One clerk, by their shares of the work."""
    return rng.choices(clerks, [clerk.share for clerk in clerks])[0]


def _answer(rng: Random, clerk: Clerk, request: Request) -> str:
    """What this clerk says to this request."""
    sentences = [_booking(rng, clerk, _understood(rng, clerk, request))]
    if rng.random() < clerk.invents / 2:
        sentences.append(f"I added {rng.choice(GIFTS)} too.")
    if rng.random() < clerk.rambles:
        sentences.append(rng.choice(RAMBLES))
    if rng.random() < clerk.greets:
        sentences.insert(0, rng.choice(OPENERS))
    if rng.random() < clerk.greets:
        sentences.append(rng.choice(CLOSERS))
    return " ".join(sentences)


def _understood(rng: Random, clerk: Clerk, request: Request) -> Request:
    """The request as it reached this clerk: slots lost, slots changed, perhaps a time made up."""
    heard = {slot: value for slot, value in request.items() if rng.random() >= clerk.forgets}
    for slot in heard:
        if rng.random() < clerk.muddles:
            heard[slot] = rng.choice(SLOTS[slot])
    if "time" not in request and rng.random() < clerk.invents / 2:
        heard["time"] = rng.choice(SLOTS["time"])
    return heard


def _booking(rng: Random, clerk: Clerk, heard: Request) -> str:
    """The sentence with the slots in it, in an order that varies."""
    slots = [slot for slot in PHRASES if slot in heard]
    rng.shuffle(slots)
    thing = f"a {heard['thing']}" if "thing" in heard else "it"
    phrases = [thing, *(PHRASES[slot].format(_spell(slot, heard[slot])) for slot in slots)]
    hesitant = [f"{rng.choice(DITHERS)} {part}" if rng.random() < clerk.dithers else part for part in phrases]
    frames = MADE if rng.random() < clerk.books else OPEN
    return rng.choice(frames).format(" ".join(hesitant))


def _spell(slot: str, value: str) -> str:
    """Days and cities take a capital."""
    return value.capitalize() if slot in {"day", "city"} else value

"""Verifiable instructions of IFEval (arXiv:2311.07911, table 1), each a function of a response and of its arguments.

Names and arguments are those of the columns `instruction_id_list` and `kwargs` of the data set google/IFEval, and what
follows an instruction is what its published checks take for it, but for three things that they leave to libraries with
data of their own: sentences are counted by their marks, words in capitals by white space, and the language of a
response is not detected (`language:response_language` is unknown here, and capitals and small letters count alone).
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, get_type_hints

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}
ARGUMENTS: dict[str, tuple[str, ...]] = {}  # that the data give each check
COUNTED_FROM_ONE = ("num_paragraphs", "nth_paragraph")
RELATIONS = ("at least", "less than")
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|e\.g|i\.e)\Z")
WORD = re.compile(r"\w+")
MARKS = ".!?…"
SENTENCE_END = re.compile(r"[.!?…]++[\"'”’)\]]*+")  # before a space, or at the end of the text


def instruction_check(name: str, *arguments: str) -> Callable[[Check], Check]:
    """Register the check of an instruction, with the names of the arguments that the data give it."""

    def register(check: Check) -> Check:
        CHECKS[name] = check
        ARGUMENTS[name] = arguments
        return check

    return register


@lru_cache(maxsize=4096)
def instructions_of(ids: str, arguments: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return instruction ids with their arguments, of two JSON lists of one length.

    Raise ValueError with the reason to reject the row: no such lists, an unknown instruction, arguments that it lacks,
    or of another type, or that no response could follow or all do: a paragraph before the first, no keywords.
    """
    try:
        names, kwargs = json.loads(ids), json.loads(arguments)
    except (ValueError, RecursionError):
        raise ValueError("instructions are not JSON") from None
    if not isinstance(names, list) or not isinstance(kwargs, list) or len(names) != len(kwargs) or not names:
        raise ValueError("instructions and their arguments are not two lists of one length")
    items = []
    for name, values in zip(names, kwargs, strict=True):
        if not isinstance(name, str) or name not in CHECKS:
            raise ValueError(f"unknown instruction {name}")
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"arguments of instruction {name} are no mapping")
        values = {key: value for key, value in (values or {}).items() if value is not None}  # Parquet fills in nulls
        needed = ARGUMENTS[name]
        if missing := [key for key in needed if key not in values]:
            raise ValueError(f"instruction {name} has no {missing[0]}")
        kinds = get_type_hints(CHECKS[name])
        items.append((name, {key: _argument(name, key, values[key], kinds[key]) for key in needed}))
    return tuple(items)


def _argument(name: str, key: str, value: Any, kind: Any) -> Any:
    """Return the argument of an instruction; raise ValueError for one of another type, or an unknown relation."""
    if kind is int and isinstance(value, float) and value.is_integer():  # as a table with nulls has it
        value = int(value)
    if kind is int:
        is_right = type(value) is int and value >= (key in COUNTED_FROM_ONE)
    elif kind is str:
        is_right = isinstance(value, str) and bool(value.strip())
    else:
        is_right = isinstance(value, list) and bool(value)
        is_right = is_right and all(isinstance(item, str) and item.strip() for item in value)
    if not is_right or (key.endswith("relation") and value not in RELATIONS):
        raise ValueError(f"instruction {name} cannot read {key}")
    return value


def followed(response: str, ids: str, arguments: str) -> list[bool]:
    """Return for each instruction whether the response follows it, strictly; an empty response follows none."""
    is_empty = not response.strip()
    return [not is_empty and CHECKS[name](response, **values) for name, values in instructions_of(ids, arguments)]


def _holds(count: int, relation: str, limit: float) -> bool:
    return count >= limit if relation == "at least" else count < limit


# Keywords


@instruction_check("keywords:existence", "keywords")
def has_keywords(response: str, keywords: list[str]) -> bool:
    """Return whether every keyword occurs, in any case, also inside a word."""
    return all(re.search(re.escape(word), response, re.IGNORECASE) for word in keywords)


@instruction_check("keywords:frequency", "keyword", "frequency", "relation")
def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """Return whether a keyword occurs so often."""
    return _holds(len(re.findall(re.escape(keyword), response, re.IGNORECASE)), relation, frequency)


@instruction_check("keywords:forbidden_words", "forbidden_words")
def lacks_words(response: str, forbidden_words: list[str]) -> bool:
    """Return whether none of the words occurs as a word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


@instruction_check("keywords:letter_frequency", "letter", "let_frequency", "let_relation")
def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Return whether a letter occurs so often, in either case."""
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


# Lengths


@instruction_check("length_constraints:number_words", "num_words", "relation")
def number_of_words(response: str, num_words: int, relation: str) -> bool:
    """Return whether the response has so many runs of letters and digits."""
    return _holds(len(WORD.findall(response)), relation, num_words)


@instruction_check("length_constraints:number_sentences", "num_sentences", "relation")
def number_of_sentences(response: str, num_sentences: int, relation: str) -> bool:
    """Return whether it has so many sentences: texts with words that end with a mark before a space, and a last one.

    The mark of an abbreviation ends none.
    """
    sentences, start = [], 0
    # In one pass: a pattern with the conditions in it would begin anew at each of many marks.
    for match in SENTENCE_END.finditer(response):
        is_inside = match.end() < len(response) and not response[match.end()].isspace()
        before = response[max(0, match.start() - 8) : match.start()]
        is_abbreviation = not set(match[0][1:]) & set(MARKS) and ABBREVIATION.search(before)
        if not is_inside and not is_abbreviation:
            sentences.append(response[start : match.start()])
            start = match.end()
    return _holds(sum(bool(WORD.search(text)) for text in [*sentences, response[start:]]), relation, num_sentences)


@instruction_check("length_constraints:number_paragraphs", "num_paragraphs")
def number_of_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Return whether the response is so many paragraphs between `***`, none of them empty but outside of the first."""
    parts = re.split(r"\s?\*\*\*\s?", response)
    inner = [part for n, part in enumerate(parts) if part.strip() or 0 < n < len(parts) - 1]
    return len(inner) == num_paragraphs and all(part.strip() for part in inner)


@instruction_check("length_constraints:nth_paragraph_first_word", "num_paragraphs", "nth_paragraph", "first_word")
def first_word_of_paragraph(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Return whether there are so many paragraphs between empty lines, and the nth begins with the word."""
    parts = response.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if count != num_paragraphs or nth_paragraph > count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# Content


@instruction_check("detectable_content:number_placeholders", "num_placeholders")
def number_of_placeholders(response: str, num_placeholders: int) -> bool:
    """Return whether there are at least so many placeholders such as [address]."""
    closed = (part for line in response.split("\n") for part in line.split("]")[:-1])
    return sum("[" in part for part in closed) >= num_placeholders


@instruction_check("detectable_content:postscript", "postscript_marker")
def has_postscript(response: str, postscript_marker: str) -> bool:
    """Return whether a postscript begins with the marker; letters of P.S. and P.P.S may have spaces between them."""
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    mark = marks.get(postscript_marker, re.escape(postscript_marker.strip().lower()))
    return re.search(mark, response.lower()) is not None


# Format


@instruction_check("detectable_format:number_bullet_lists", "num_bullets")
def number_of_bullets(response: str, num_bullets: int) -> bool:
    """Return whether exactly so many lines begin with `* ` or `-`."""
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", response, re.MULTILINE)
    return len(stars) + len(re.findall(r"^[^\S\n]*-.*$", response, re.MULTILINE)) == num_bullets


@instruction_check("detectable_format:constrained_response")
def is_one_of_three_answers(response: str) -> bool:
    """Return whether it says that its answer is yes, no or maybe, in just these words."""
    return any(answer in response for answer in ANSWERS)


@instruction_check("detectable_format:number_highlighted_sections", "num_highlights")
def number_of_highlights(response: str, num_highlights: int) -> bool:
    """Return whether at least so many texts stand between `*` or `**`."""
    single = re.findall(r"\*([^\n\*]*)\*", response)
    double = re.findall(r"\*\*([^\n\*]*)\*\*", response)
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


@instruction_check("detectable_format:multiple_sections", "section_spliter", "num_sections")
def number_of_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """Return whether at least so many sections begin with the word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


@instruction_check("detectable_format:json_format")
def is_json(response: str) -> bool:
    """Return whether all of it is JSON, perhaps in a block fenced as code."""
    text = re.sub(r"^```(json)?", "", response.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@instruction_check("detectable_format:title")
def has_title(response: str) -> bool:
    """Return whether a title stands in double angular brackets."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


# Combinations, start and end, case, punctuation


@instruction_check("combination:two_responses")
def is_two_responses(response: str) -> bool:
    """Return whether it is two different responses with six asterisks between them."""
    parts = response.split("******")
    inner = [part.strip() for n, part in enumerate(parts) if part.strip() or 0 < n < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


@instruction_check("combination:repeat_prompt", "prompt_to_repeat")
def repeats_the_prompt(response: str, prompt_to_repeat: str) -> bool:
    """Return whether it begins with the prompt."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction_check("startend:end_checker", "end_phrase")
def ends_with_phrase(response: str, end_phrase: str) -> bool:
    """Return whether it ends with the phrase, in any case; a quotation mark may follow."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction_check("startend:quotation")
def is_quoted(response: str) -> bool:
    """Return whether all of it stands in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction_check("change_case:english_capital")
def is_upper_case(response: str) -> bool:
    """Return whether all letters are capitals."""
    return response.isupper()


@instruction_check("change_case:english_lowercase")
def is_lower_case(response: str) -> bool:
    """Return whether all letters are small."""
    return response.islower()


@instruction_check("change_case:capital_word_frequency", "capital_frequency", "capital_relation")
def capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """Return whether so many words are in capitals alone."""
    return _holds(sum(word.isupper() for word in response.split()), capital_relation, capital_frequency)


@instruction_check("punctuation:no_comma")
def has_no_comma(response: str) -> bool:
    """Return whether it has no comma."""
    return "," not in response

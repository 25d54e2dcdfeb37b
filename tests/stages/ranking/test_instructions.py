"""IFEval's instructions: each followed and not followed, and rows of the data set with what is not known."""

import json
import random
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store.fingerprints import DataPath
from schemas.tables import CANDIDATES, JUDGEMENTS, PROMPTS
from stages.data.prompts import prompts
from stages.data.rows import fields_of
from stages.evaluation.evaluate import evaluate, gold_reward
from stages.ranking.instructions import CHECKS, followed, instructions_of, number_of_sentences
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.ranking.verifiers import instruction_share, instructions
from tests.material import bound

AT_LEAST, LESS = "at least", "less than"
PARTS = "One.\n\nTwo.\n\nThree."
# Name, arguments, responses that follow it, responses that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["boat", "tree"]}, ["A Boat by trees"], ["A boat."]),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": AT_LEAST}, ["Boat, boats"], ["boat"]),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": LESS}, ["boat"], ["boat boat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["car", "a+b"]}, ["A cart."], ["A CAR.", "x car"]),
    ("keywords:letter_frequency", {"letter": "N", "let_frequency": 3, "let_relation": AT_LEAST}, ["no Nn"], ["no n"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["a b-c"], ["a b."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["a b."], ["a b c"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": LESS},
        ["Mr. Roe has 3.5 boats. He said: “Hm.”", "No mark at all"],
        ["One. Two! Three?", 'He said "No." Then left. And so on'],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "*** a *** b ***"],
        ["a", "a******b"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "two"},
        [PARTS, "One.\n\n'Two' it is.\n\nThree."],
        ["One.\n\nTwo.", "One.\n\nTwofold.\n\nThree.", PARTS + "\n\nFour."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b] [c]"], ["[a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP. P. S. y", "p.p.s y"], ["P.S. y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP. S. y", "p.s. y"], ["x"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", " * a\n * b"], ["* a", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["Yes.", "my answer is yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a*", "** **, *a*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        ["PART 1\nx\nPART 2\ny"],
        ["PART 1\nx", "PART one PART two"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]"], ["a: 1", 'So: {"a": 1}']),
    ("detectable_format:title", {}, ["<<A boat>>\nx"], ["<A boat>", "<<>>", "<< >>"]),
    (
        "combination:two_responses",
        {},
        ["a ****** b", "****** a ****** b ******"],
        ["a ****** a", "a", "a******b******c"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say so. "}, [" say SO. Yes."], ["Yes. Say so."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ['So. "any Questions?"', "Any questions? "], ["No."]),
    ("startend:quotation", {}, ['"So."', ' "So." '], ["So.", '"', '"So".']),
    ("change_case:english_capital", {}, ["SO 2!"], ["So.", "2"]),
    ("change_case:english_lowercase", {}, ["so 2!"], ["So.", "2"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["I saw NASA.", "A, B"],
        ["NASA is 2.", "Nasa Esa"],
    ),
    ("punctuation:no_comma", {}, ["No; none."], ["One, two."]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_an_instruction_is_followed_or_not(name, arguments, good, bad):
    ids, kwargs = json.dumps([name]), json.dumps([arguments | {"other": None}])
    assert [followed(response, ids, kwargs) for response in good] == [[True]] * len(good)
    assert [followed(response, ids, kwargs) for response in [*bad, "", " \n"]] == [[False]] * (len(bad) + 2)


def test_all_instructions_of_the_paper_but_the_language_are_known():
    assert CHECKS.keys() == {case[0] for case in CASES}
    assert len(CHECKS) == 24


def test_a_response_is_scored_by_all_of_its_instructions_or_by_their_share():
    fields = {
        "instruction_id_list": json.dumps(["punctuation:no_comma", "change_case:english_lowercase"]),
        "kwargs": json.dumps([{}, {}]),
    }
    cases = {"so it is": (1, 1), "So it is": (0, 0.5), "So, it is": (0, 0), "": (0, 0)}
    for response, scores in cases.items():
        assert (instructions("", response, fields), instruction_share("", response, fields)) == scores


@pytest.mark.parametrize(
    ("ids", "kwargs", "reason"),
    [
        (["language:response_language"], [{"language": "de"}], "unknown instruction language:response_language"),
        (["punctuation:no_commas"], [{}], "unknown instruction punctuation:no_commas"),
        (["startend:end_checker"], [{"end_phrase": None}], "startend:end_checker has no end_phrase"),
        (["punctuation:no_comma"], [], "two lists of one length"),
        ([], [], "two lists of one length"),
        (["length_constraints:number_words"], [{"num_words": "3", "relation": LESS}], "cannot read num_words"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "most"}], "cannot read relation"),
        (["keywords:existence"], [{"keywords": "boat"}], "cannot read keywords"),
        (["punctuation:no_comma"], [[1]], "arguments of instruction punctuation:no_comma are no mapping"),
        (["punctuation:no_comma"], ["x"], "are no mapping"),
        (["punctuation:no_comma"], [0], "are no mapping"),
        ([["punctuation:no_comma"]], [{}], "unknown instruction"),
        ([{}], [{}], "unknown instruction"),
        ([1], [{}], "unknown instruction 1"),
        (
            ["length_constraints:nth_paragraph_first_word"],
            [{"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "so"}],
            "cannot read nth_paragraph",
        ),
        (
            ["length_constraints:nth_paragraph_first_word"],
            [{"num_paragraphs": 2, "nth_paragraph": -1, "first_word": "so"}],
            "cannot read nth_paragraph",
        ),
        (["length_constraints:number_words"], [{"num_words": -3, "relation": LESS}], "cannot read num_words"),
        (["length_constraints:number_words"], [{"num_words": True, "relation": LESS}], "cannot read num_words"),
        (["keywords:existence"], [{"keywords": []}], "cannot read keywords"),
        (["keywords:forbidden_words"], [{"forbidden_words": [" "]}], "cannot read forbidden_words"),
        (["keywords:letter_frequency"], [{"letter": " ", "let_frequency": 1, "let_relation": LESS}], "read letter"),
    ],
)
def test_what_cannot_be_checked_has_a_reason(ids, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        instructions_of(json.dumps(ids), json.dumps(kwargs))


def test_lists_nested_too_deep_have_a_reason():
    with pytest.raises(ValueError, match="not JSON"):
        instructions_of("[" * 10**5, "[]")


@pytest.mark.parametrize("text", ["[", "!", "!a", "<<", ">", "*", "\n", " ", "-", "[]", ". ", "* ", "<<a>", "\"'"])
def test_a_long_response_of_one_mark_takes_linear_time(text):
    """200,000 of them by every check: at quadratic cost, the first would take minutes, and some would never end."""
    names = [case[0] for case in CASES]
    kwargs = [case[1] for case in CASES]
    followed(text * 200_000 + "a", json.dumps(names), json.dumps(kwargs))


def test_sentences_end_where_a_pattern_with_all_conditions_says():
    """The reference is one regular expression, which takes quadratic time where many marks stand side by side."""
    short = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)"
    ends = re.compile(short + r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
    rng, pieces = (
        random.Random(3),
        ["Mr", "Prof", "e.g", "i.e", ".", "!", "?", '"', ")", " ", "\n", "a", "boat", "…", "xMr", "vs"],
    )
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        expected = sum(bool(re.search(r"\w", part)) for part in ends.split(text))
        assert number_of_sentences(text, expected, AT_LEAST), text
        assert number_of_sentences(text, expected + 1, LESS), text


def test_rows_of_the_data_set_keep_their_columns(tiny, tmp_path, ctx):
    """From Parquet, where every argument of every instruction is there, null or as a float."""
    rows = [
        {
            "prompt": "Write.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": 2, "relation": AT_LEAST}],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ifeval.parquet")
    path = DataPath(str(tmp_path / "ifeval.parquet"))
    (row,) = prompts(tiny, ctx, path=path, keep=["instruction_id_list", "kwargs"]).to_pylist()
    assert [instruction_share("", text, fields_of(row)) for text in ("Two words", "One", "One, two")] == [1, 0.5, 0.5]
    floats = json.dumps([{}, {"num_words": 2.0, "relation": AT_LEAST}])
    assert followed("Two words", fields_of(row)["instruction_id_list"], floats) == [True, True]


def test_prompts_with_unknown_instructions_are_rejected_by_name_as_reward_and_as_gold(ctx):
    """The rest of them is scored; an evaluation does not end."""
    known = {"p": "punctuation:no_comma", "q": "language:response_language"}
    table = pa.Table.from_pylist(
        [
            dict(prompt_id=name, text="Write.", token_ids=[1], split="heldout",
                 fields=[("instruction_id_list", json.dumps([item])), ("kwargs", '[{"language": "de"}]')])
            for name, item in known.items()
        ],
        PROMPTS,
    )  # fmt: skip
    candidates = pa.Table.from_pylist(
        [
            dict(prompt_id=name, candidate_id=name + "0", k=0, token_ids=[1], text="So it is", n_tokens=1,
                 finish_reason="stop", logp_kind="none")
            for name in known
        ],
        CANDIDATES,
    )  # fmt: skip
    rewards = reward(table, candidates, ctx, by=bound(rankers, "instructions")).to_pylist()
    assert [(row["candidate_id"], row["reward"], row["label_threshold"]) for row in rewards] == [("p0", 1.0, 0.5)]
    judged = [dict(prompt_id=name, k=0, candidate_id=name + "0", baseline_id=name + "0", logit=0.0) for name in known]
    judgements = pa.Table.from_pylist(judged, JUDGEMENTS)
    outcomes, metrics = evaluate(
        table, candidates, candidates, judgements, ctx, gold=bound(gold_reward, "instruction_share")
    )
    assert {row["prompt_id"]: row["gold"] for row in outcomes.to_pylist()} == {"p": 1.0, "q": None}
    counts = {row["metric"]: row["n"] for row in metrics.to_pylist()}
    assert (counts["gold"], counts["proxy_win"]) == (1, 2)
    reasons = [row["reason"] for row in ctx.rejects.to_pylist()]
    assert len(reasons) == 2
    assert all("unknown instruction language:response_language" in reason for reason in reasons)

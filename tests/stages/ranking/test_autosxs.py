"""AutoSxS: what is a vote, when a pair is decided, the table of votes, and judges behind a server and in memory."""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

from pipeline.registry import Bound, Entry
from pipeline.resources import Resources, working_with
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, JUDGEMENTS, VOTES
from stages.evaluation.agreement import Agreement
from stages.evaluation.win_rate import win_rate
from stages.ranking.autosxs import autosxs, open_autosxs, voter
from stages.ranking.autosxs_prompts import TASKS
from stages.ranking.llm_judge import vote_logit
from stages.ranking.voters import AutoSxs, choice_vote
from tests.material import bound, context
from tests.served import ServedModel, no_client_left  # noqa: F401 - a fixture
from tests.stages.ranking.test_rankers import candidates_with, one_prompt


@pytest.mark.parametrize(
    ("answer", "vote"),
    [
        ("(A) is shorter.\n\nChoice: (A)", 1),
        ("(A) is shorter, (B) is right.\nChoice: (B)", 0),
        ("Both are fine.\n**Choice: same**", 0.5),
        ("Choice: (B)\n\nContext: another one that nobody asked for\n\nChoice: (A)", 0),  # a base model goes on
        ("I would say\nSame", 0.5),
        ("B", 0),
        ("Response (A) is better than response (B)", None),
        ("Choice: neither", None),
        ("Choice: Both", None),
        ("", None),
    ],
)
def test_a_vote_is_the_choice_of_the_answer_and_goes_to_its_text(answer: str, vote: float | None):
    assert choice_vote(answer, flipped=False) == vote
    assert choice_vote(answer, flipped=True) == (None if vote is None else 1 - vote)


def test_a_pair_is_decided_beyond_the_threshold_of_the_mean_score():
    """7 of 8 votes are 0.875, further than 0.35 from a half; 6 and a tie, 0.8125, are not; a tie counts one half."""
    assert vote_logit([1, 1, 1, 1, 1, 1, 1, 0], 0.35) == pytest.approx(np.log(7.5 / 1.5))
    assert vote_logit([0, 0, 0, 0, 0, 0, 0, 1], 0.35) == -vote_logit([1, 1, 1, 1, 1, 1, 1, 0], 0.35)
    assert vote_logit([1, 1, 1, 1, 1, 1, 0.5, 0], 0.35) == 0
    assert vote_logit([1, 1, 1, 1, 1, 1, 0.5, 0], 0.175) == pytest.approx(np.log(7 / 2))
    assert vote_logit([0.5] * 8, 0.0) == 0


class Scripted:
    """Voter whose answers are a function of the responses that a question shows first and second."""

    def __init__(self, answer) -> None:
        self.answer, self.questions, self.seeds = answer, list[str](), list[int]()

    def fits(self, question: str) -> bool:
        return "too long" not in question

    def ask(self, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        self.questions += questions
        self.seeds += seeds
        return [self.answer(*question.split("|")) for question in questions]

    def close(self) -> None: ...


def responses_with(texts: list[str]) -> pa.Table:
    """Return candidates with as many tokens as their texts have characters."""
    rows = [row | {"n_tokens": len(row["text"])} for row in candidates_with(texts).to_pylist()]
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


def judged(answer, ours: list[str], theirs: list[str], **options):
    """Return judgements, votes, the voter and the context of these responses to one prompt."""
    scripted, ctx = Scripted(answer), context()
    by = Bound(Entry("scripted", lambda model, **given: scripted, {"reads_model": False}), {})
    baseline = pa.Table.from_pylist(
        [row | {"candidate_id": f"b{row['k']}"} for row in responses_with(theirs).to_pylist()], schema=CANDIDATES
    )
    tables = autosxs(one_prompt(), responses_with(ours), baseline, ctx, by=by, template="{a}|{b}{prompt:.0}", **options)
    return conform(tables[0], JUDGEMENTS).to_pylist(), conform(tables[1], VOTES), scripted, ctx


def test_half_of_the_votes_see_the_other_order_and_the_table_has_each_answer():
    """`long` always wins: four votes for whichever is first, four for whichever is second, all for the same text."""
    longer = lambda a, b: f"Because.\nChoice: ({'A' if len(a) > len(b) else 'B'})"  # noqa: E731
    (row,), votes, scripted, ctx = judged(longer, ["long one"], ["short"])
    assert scripted.questions == ["long one|short", "short|long one"] * 4
    assert len(set(scripted.seeds)) == 8
    assert row["logit"] == pytest.approx(np.log(8.5 / 0.5))
    rows = votes.to_pylist()
    assert [vote["first"] for vote in rows] == ["candidate", "baseline"] * 4
    assert [vote["vote"] for vote in rows] == [1.0] * 8
    assert {vote["answer"] for vote in rows} == {"Because.\nChoice: (A)", "Because.\nChoice: (B)"}
    assert ctx.counters["votes"] == 8
    (row,), votes, *_ = judged(longer, ["short"], ["long one"])
    assert (row["logit"] < 0, set(votes["vote"].to_pylist())) == (True, {0.0})


def test_a_judge_that_likes_a_position_decides_nothing():
    (row,), votes, *_ = judged(lambda a, b: "Choice: (A)", ["x"], ["y"])
    assert row["logit"] == 0
    assert sorted(votes["vote"].to_pylist()) == [0.0] * 4 + [1.0] * 4


def test_answers_that_cannot_be_read_are_counted_and_stay_in_the_table():
    """Unread in one order: no verdict. Unread everywhere, on enough votes: the stage ends with what was written."""

    def answer(a: str, b: str) -> str:
        return "Choice: (A)" if (a, b) == ("x", "y") else "hm"

    (row,), votes, _, ctx = judged(answer, ["x"], ["y"], max_without_verdict=0.5)
    assert row["logit"] is None
    assert votes["vote"].null_count == 4
    assert votes["answer"].to_pylist().count("hm") == 4
    assert (ctx.counters["votes"], ctx.counters["votes_without_verdict"]) == (8, 4)
    with pytest.raises(WinnowError, match=r"32 of 32 answers.*'hm'.*`template`"):
        judged(lambda a, b: "hm", ["x", "z"], ["y", "w"])


def test_undecided_unread_and_tied_comparisons_are_counted_apart():
    """Against one opponent: a win, a tie, one without a verdict, one too long for the judge, which loses."""

    def answer(a: str, b: str) -> str:
        if "dull" in (a, b):
            return "Choice: same"
        return "hm" if "odd" in (a, b) else f"Choice: ({'A' if a == 'good' else 'B'})"

    rows, *_ = judged(answer, ["good", "dull", "odd", "too long"], ["x"], max_without_verdict=1.0)
    baseline = pa.Table.from_pylist(
        [row | {"candidate_id": "b0"} for row in candidates_with(["x"]).to_pylist()], schema=CANDIDATES
    )
    candidates = candidates_with(["good", "dull", "odd", "too long"])
    table = pa.Table.from_pylist(rows, JUDGEMENTS)
    with pytest.warns(match="25 % of the comparisons by sxs"):
        wins, metrics = win_rate(candidates, baseline, table, context(), judge="sxs", resamples=10)
    assert wins["win"].to_pylist() == [1.0, 0.5, None, 0.0]
    found = {row["metric"]: row["value"] for row in metrics.to_pylist()}
    assert found["sxs_win"] == pytest.approx(0.5)
    assert [found[f"sxs_{name}"] for name in ("ties", "undecided", "unread")] == [0.25, 0.25, 0.25]


def test_an_opponents_name_ends_the_names_of_metrics():
    rows, *_ = judged(lambda a, b: "Choice: same", ["x"], ["y"])
    baseline = pa.Table.from_pylist(
        [row | {"candidate_id": "b0"} for row in candidates_with(["y"]).to_pylist()], schema=CANDIDATES
    )
    table = pa.Table.from_pylist(rows, JUDGEMENTS)
    _, metrics = win_rate(candidates_with(["x"]), baseline, table, context(), judge="sxs", against="rso@2", resamples=5)
    assert "sxs_win_vs_rso@2" in metrics["metric"].to_pylist()


def test_equal_texts_tie_without_a_vote():
    (row,), votes, scripted, _ = judged(lambda a, b: "Choice: (A)", ["x"], ["x"])
    assert (row["logit"], votes.num_rows, scripted.questions) == (0, 0, [])


@pytest.mark.parametrize("task", TASKS)
def test_both_questions_hold_three_worked_examples_one_of_each_choice(task: str):
    """And can be read as the stage reads answers."""
    question = TASKS[task].format(prompt="P", a="1", b="2")
    choices = [line for line in question.splitlines() if line.startswith("Choice: ")]
    assert sorted(choices) == ["Choice: (A)", "Choice: (B)", "Choice: same"]
    assert [choice_vote(choice, flipped=False) for choice in sorted(choices)] == [1, 0, 0.5]
    assert question.endswith("Explanation:")
    assert "Context: P\n\nResponse (A): 1\n\nResponse (B): 2" in question


def test_votes_of_a_real_engine_repeat_and_a_question_too_long_is_unread(tiny):
    options = {"name": "local_voter", "engine": "transformers", "max_tokens": 4, "temperature": 1.0}
    by = bound(voter, **options)

    def voted(a: str):
        ctx = context()
        with closing(by(tiny)) as opened:
            judge = AutoSxs(opened, "{prompt} {a} {b}", 4, 0.35, 1.0, 0)
            fits = judge.fits("x", a, "y")
            logits = judge.logits("x", [(a, "y")]).tolist() if fits else []
            judge.finish_part(ctx)
            return fits, str(logits), judge.votes_on(a, "y")

    assert voted("boat") == voted("boat")
    assert len(voted("boat")[2]) == 4
    assert voted("boat " * 200)[0] is False


def test_a_voter_takes_the_gpus_of_the_profile(tiny):
    """As `llm_judge` does, and as the plan counts its memory: an engine that has one GPU says so."""
    by = bound(voter, "local_voter", engine="transformers")
    with working_with(Resources(gpus=2, tensor_parallel=2)), pytest.raises(WinnowError, match="tensor_parallel: 2"):
        by(tiny)


def test_a_model_that_cannot_read_the_question_is_refused(tiny):
    """The few-shot questions are longer than its context of 128 tokens; else every response would be unread."""
    by = bound(voter, "local_voter", engine="transformers", max_tokens=4)
    with pytest.raises(WinnowError, match=r"cannot read its question.*`template`"):
        open_autosxs(by, tiny, TASKS["summary"], 8, 0.35, 0.5, 0)


class VotingServer(ServedModel):
    """Server that prefers the longer response and says so."""

    def respond(self, path, body):
        (message,) = body["messages"]
        first, second = message["content"].split("|")
        content = f"Because.\nChoice: ({'A' if len(first) > len(second) else 'B'})"
        return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def test_votes_come_from_a_chat_server_with_their_own_seeds(tiny):
    with closing(VotingServer(tiny)) as server:
        by = bound(voter, "hosted_voter", url=server.url, model="tiny", max_retries=0)
        with closing(by(None)) as opened:
            judge = AutoSxs(opened, "{a}|{b}{prompt:.0}", 8, 0.35, 0.5, 0)
            assert judge.logits("x", [("long one", "short")]) == pytest.approx(np.log(8.5 / 0.5))
        bodies = [body for _, body, _ in server.requests]
    assert len({body["seed"] for body in bodies}) == len(bodies) == 8
    assert {body["model"] for body in bodies} == {"tiny"}


# Agreement


def test_alpha_is_that_of_krippendorffs_example_and_agreement_the_share_of_equal_votes():
    """Nominal data of four observers on 12 units, with missing values (Krippendorff 2011, C): alpha = 0.743.

    Here the five values are spread over as many columns as VALUES has: alpha knows no order of them.
    """
    units = [(1, 1, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4), (4, 4, 4, 4),
             (1, 1, 2, 1), (2, 2, 2, 2), (5, 5, 5), (1, 1)]  # fmt: skip
    counts = np.array([[unit.count(value) for value in range(1, 6)] for unit in units], dtype=np.float64)
    figures = Agreement(counts, np.arange(len(units))).figures(50, np.random.default_rng(0))
    assert figures["alpha"][0] == pytest.approx(0.743, abs=5e-4)
    equal = [np.mean([a == b for n, a in enumerate(unit) for b in unit[:n]]) for unit in units]
    assert figures["agreement"][0] == pytest.approx(np.mean(equal))
    for value, low, high in figures.values():
        assert low <= value <= high

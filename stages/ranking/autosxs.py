"""Stage `autosxs`: a language model compares two responses several times, in both orders, with three answers."""

import json
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired

import pyarrow as pa

from pipeline import EXECUTION, Bound, Range, Registry, StageContext, stage
from pipeline.resources import current_resources
from schemas import Candidates, Judgements, Model, Prompts, Votes, WinnowError
from schemas.tables import VOTES
from stages.data.rows import Row
from stages.endpoint import Concurrency, Endpoint, Retries, ServedName, Timeout, Url, VariableName
from stages.limits import context_length
from stages.options import Count, Precision, Seed, Temperature
from stages.ranking.autosxs_prompts import TASKS
from stages.ranking.base import CANNOT_READ, TOO_LONG, candidate_text, reading_problem
from stages.ranking.judge import Matches, finished_judgements, judged_prompts
from stages.ranking.memory import ranker_cost
from stages.ranking.rankers import EvenCount, Question, reads_its_model, with_output
from stages.sampling.engines.options import EngineOptions, JudgeEngine, length_limit
from stages.work import voting_work

if TYPE_CHECKING:
    from stages.ranking.voters import AutoSxs, Voter

voter = Registry("voter", "model", reads_model=bool, output=NotRequired[Literal["vocabulary"]])


@voter(reads_model=True, output="vocabulary")
def local_voter(
    model: Model,
    *,
    temperature: Temperature = 0.7,
    max_tokens: Count = 256,
    engine: JudgeEngine = "vllm",
    engine_options: EngineOptions = None,
    dtype: Precision = "float32",
) -> "Voter":
    """Sample the answers of the language model under `ranker` with an engine of this machine, as `sample` does."""
    from stages.data.tokenizer import Tokenizer
    from stages.ranking.voters import LocalVoter
    from stages.sampling.engines import Sampling, open_engine

    folder = with_output(model, "vocabulary", "local_voter").folder
    tokenizer = Tokenizer(model)
    opened = open_engine(engine, folder, dtype, current_resources().tensor_parallel, json.dumps(engine_options or {}))
    limit = length_limit(context_length(folder), engine_options) - max_tokens
    return LocalVoter(tokenizer, opened, Sampling(temperature, 0, max_tokens, tokenizer.stop), limit)


@voter(reads_model=False)
def hosted_voter(
    local_model: None,
    *,
    url: Annotated[Url, EXECUTION],
    model: ServedName,
    temperature: Temperature = 0.7,
    max_tokens: Count = 256,
    api_key_env: Annotated[VariableName | None, EXECUTION] = None,
    concurrency: Annotated[Concurrency, EXECUTION] = 64,
    timeout: Annotated[Timeout, EXECUTION] = 600.0,
    max_retries: Annotated[Retries, EXECUTION] = 10,
) -> "Voter":
    """Ask a chat model on an OpenAI-compatible server, which is known by its name alone, as in `hosted_judge`.

    `url` ends in /v1; the other options are those of the engine `endpoint`. Answers repeat only as far as the server
    heeds `seed`; those that it gave are in the table `votes`.
    """
    from stages.ranking.voters import HostedVoter

    server = Endpoint(url, model, api_key_env, concurrency, timeout, max_retries)
    return HostedVoter(server, temperature, max_tokens)


def open_autosxs(
    by: Bound, model: Model | None, template: str, votes: int, threshold: float, max_without_verdict: float, seed: int
) -> "AutoSxs":
    """Open the voter, which a stage holds in memory for all of its shards.

    Raise WinnowError if it cannot read the question alone: else every response would lose, as if it were too long.
    """
    from stages.ranking.voters import AutoSxs

    opened = AutoSxs(by(model), template, votes, threshold, max_without_verdict, seed)
    if problem := reading_problem(opened, "", ("", "")):
        opened.close()
        reason = "it is longer than the context leaves beside `by.max_tokens`"
        if problem.reason != TOO_LONG:
            reason = problem.reason.removeprefix(CANNOT_READ)
        raise WinnowError(
            f"autosxs: the model cannot read its question, not even without a prompt and responses ({reason}); set a "
            "shorter `template`, lower `by.max_tokens`, or give another model"
        )
    return opened


@stage(
    version=1,
    check=reads_its_model,
    cost=ranker_cost(voting_work),
)
def autosxs(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, voter] = "local_voter",  # type: ignore[assignment]
    task: Literal["summary", "dialogue"] = "dialogue",
    template: Question | None = None,
    votes: EvenCount = 8,
    threshold: Annotated[float, Range(ge=0, lt=0.5)] = 0.35,
    max_without_verdict: Annotated[float, Range(ge=0, le=1)] = 0.5,
    matches: Matches = "all",
    special_tokens: bool = False,
    seed: Seed = 0,
) -> tuple[Judgements, Votes]:
    """Compare by AutoSxS: eight sampled answers A, B or same, four in the other order (arXiv:2309.06657, A.4).

    An answer scores 1 for A, 0 for B and 1/2 for same, turned round where the order was. The mean of the means in both
    orders decides if it is further than `threshold` from one half; else the pair is a tie, logit 0. (The paper says
    that the magnitude of the average must exceed 0.35 and not from where it is counted; of scores from -1 to 1 it would
    be `threshold: 0.175` here.) An answer with none of the three is no vote, and a pair without a vote in one of the
    orders has no verdict; both are counted, and if more than the share `max_without_verdict` of the answers are none,
    the stage ends with examples. Each answer in full is in the table `votes`. `task` chooses between our two few-shot
    questions, for summaries (the paper's TL;DR) and for dialogues (its HH); `template` replaces them. A pair of equal
    texts is a tie without a vote. `matches: same_k` asks less often by the number of draws; otherwise as in `judge`.
    """
    question = template or TASKS[task]
    opened = ctx.open_once(open_autosxs, by, ranker, question, votes, threshold, max_without_verdict, seed)
    rows: list[Row] = []
    vote_rows: list[Row] = []
    for group, opponents, of_prompt in judged_prompts(
        opened, prompts, candidates, baseline, ctx, matches, special_tokens
    ):
        rows += of_prompt
        ours, theirs = (
            {row["candidate_id"]: candidate_text(row, special_tokens) for row in side} for side in (group, opponents)
        )
        for row in of_prompt:
            if row["unread"] is None:
                ids = {name: row[name] for name in ("prompt_id", "candidate_id", "baseline_id")}
                texts = ours[row["candidate_id"]], theirs[row["baseline_id"]]
                vote_rows += [ids | vote for vote in opened.votes_on(*texts)]
    judgements = finished_judgements("autosxs", opened, rows, (candidates, baseline), ctx)
    return judgements, pa.Table.from_pylist(vote_rows, VOTES)

"""Registry of rankers: which of two responses is better, and by how much. To add a ranker, add a function here.

A ranker is a function from the model under the step's `ranker` input (None if it reads none) to a `Ranker`; or,
with `@verifiable`, a program from prompt and response to a score. Options are keyword-only parameters.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from inspect import Parameter, getattr_static, isfunction, signature
from string import Formatter
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import AfterValidator

from pipeline import EXECUTION, Bound, InputStep, Range, Registry
from pipeline.resources import current_resources
from schemas import Model, WinnowError
from stages.endpoint import Concurrency, Endpoint, Retries, ServedName, Timeout, Url, VariableName, endpoint_problems
from stages.extras import install_command
from stages.limits import context_length
from stages.model_config import input_problems, planned_output
from stages.options import Count, Precision, Seed, SmallCount, Temperature
from stages.ranking.base import QUESTION, PairFormat, Ranker, Reading, Response, Scorer
from stages.results import floats, number
from stages.sampling.engines.options import EngineOptions, JudgeEngine, engine_problems, length_limit, name_of

PROGRAM = ("prompt", "response")
FIELDS = (*PROGRAM, "fields")


def plain_program(fn: Callable[..., Any], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return arguments and metadata of a function in a user's file, whose scores may be labels (`label_threshold`)."""
    arguments = plain_arguments(fn)
    metadata: dict[str, Any] = {"reads_model": False, "program": True, "reads_fields": arguments == FIELDS}
    if (threshold := options.pop("label_threshold", None)) is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise WinnowError(f"label_threshold: must be a finite number, got {threshold!r}")
        metadata["label_threshold"] = float(threshold)
    return arguments, metadata


def plain_arguments(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments of a function in a user's file: prompt and response, and perhaps `fields`."""
    parameters = [item for item in signature(fn).parameters.values() if item.kind in POSITIONAL]
    reads_fields = len(parameters) > len(PROGRAM)
    if reads_fields and parameters[2].default is not Parameter.empty and parameters[2].name != FIELDS[2]:
        name = parameters[2].name
        raise WinnowError(
            f"function: the third parameter of {fn.__name__}, {name}={parameters[2].default!r}, would be given the "
            f"columns that are kept with a prompt; write `*, {name}` if it is an option, or call it `fields`"
        )
    return FIELDS if reads_fields else PROGRAM


POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
ranker = Registry(
    "ranker",
    "model",
    plain=plain_program,
    reads_model=bool,
    program=NotRequired[bool],
    reads_fields=NotRequired[bool],
    columns=NotRequired[tuple[str, ...]],
    check=NotRequired[Callable[..., Any]],
    requires=NotRequired[str],
    output=NotRequired[Literal["score", "vocabulary"]],
    label_threshold=NotRequired[float],
)


# A program from (prompt, response) to a score, registered as a ranker: `@verifiable` or `@verifiable(version=3)`. The
# version is part of the key; raise it when the scores change. `@verifiable(label_threshold=0.5)` says that the scores
# are labels, 0 for wrong and 1 for right.
verifiable = ranker.decorator(*PROGRAM, reads_model=False, program=True)

# The same with a third argument, a mapping of the columns of the data file that `prompts` keeps. `columns` are those of
# its options that name one; `requires` is the library that it imports; `check`, called with the mapping and these
# options, raises ValueError with the reason why no response can be scored by them.
verifier = ranker.decorator(*FIELDS, reads_model=False, program=True, reads_fields=True)


def fields_problems(program: Bound, inputs: Mapping[str, InputStep], option: str) -> list[str]:
    """Return the plan-time problems of a program: its library is not installed, or the prompts lack its columns."""
    problems = []
    library = program.metadata.get("requires")
    if library and find_spec(library) is None:
        problems.append(
            f"{option}: {program.name} needs the library {library}: {install_command('verifiers', library)}"
        )
    step = inputs.get("prompts")
    if not program.metadata.get("reads_fields") or step is None or not step.stage:
        return problems
    prompt_columns = step.options.get("keep") or []
    columns = [program.options[name] for name in program.metadata.get("columns", ())]
    lacking = [name for name in columns if name not in prompt_columns]
    if step.stage != "prompts" or lacking or not prompt_columns:
        cure = f"set `keep: [{', '.join(lacking or ['COLUMN'])}]` in the step of stage prompts that it reads"
        what = f"the column {' and '.join(lacking)}" if lacking else "columns"
        problems.append(
            f"{option}: {program.name} reads {what} of the data file, which the prompts do not keep; {cure}"
        )
    return problems


def _even(votes: int) -> int:
    if votes % 2:
        raise ValueError("must be even, so that half of the votes have the order flipped")
    return votes


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


def _template(text: str) -> str:
    fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    if sorted(fields) != ["a", "b", "prompt"]:
        raise ValueError("must name {prompt}, {a} and {b} once each, and write other braces twice")
    return text


Question = Annotated[str, AfterValidator(_template)]
EvenCount = Annotated[SmallCount, AfterValidator(_even)]


@ranker(reads_model=True, output="vocabulary", version=2)
def pairwise(
    model: Model,
    *,
    format: PairFormat | None = None,
    dtype: Precision = "float32",
    compile_layers: Annotated[bool, EXECUTION] = False,
) -> Ranker:
    """Read both responses as text and answer with the token A or B. Sec. 3.1 of arXiv:2309.06657.

    format: `marks` is `[CONTEXT] x [RESPONSE A] y1 [RESPONSE B] y2`; `chat` is a question as a user's turn of the
    model's chat template; `rlhflow` is that of RLHFlow/pair-preference-model-LLaMA3-8B. By default chat if the
    tokenizer has a template and none of the marks as a token, else marks, and likewise in `ranker_examples`.
    `compile_layers` lets torch compile each layer: on a GPU, faster by a fifth after some 20 s of each worker's start.
    """
    from stages.ranking.pairwise import PairwiseRanker

    with_vocabulary = with_output(model, "vocabulary", "pairwise")
    return PairwiseRanker(with_vocabulary, dtype, format=format, compiled=compile_layers)


@ranker(reads_model=True, output="score", version=6)
def pointwise(
    model: Model, *, dtype: Precision = "float32", compile_layers: Annotated[bool, EXECUTION] = False
) -> Ranker:
    """Score with a reward model (`reward_head`, trained with the objective `sigmoid`).

    Its score is the reward, the difference of two scores the logit. It reads the ids that the policy read and drew if
    its own tokenizer and chat template give the prompt the same ids. Else it reads the ids of `apply_chat_template` of
    the whole conversation, the response as its last message; without a template, those of the texts. A model that
    `reward_head` made of a policy is scored at the end of the last turn, any other behind all that its template writes
    after that, and a response that was cut at max_tokens at its last token. `compile_layers` is that of `pairwise`.
    """
    from stages.ranking.pointwise import PointwiseRanker

    return PointwiseRanker(with_output(model, "score", "pointwise"), dtype, compiled=compile_layers)


@ranker(reads_model=True, output="score", version=2)
def endpoint(
    reward_model: Model,
    *,
    url: Annotated[Url, EXECUTION],
    model: Annotated[ServedName, EXECUTION],
    api_key_env: Annotated[VariableName | None, EXECUTION] = None,
    concurrency: Annotated[Concurrency, EXECUTION] = 256,
    timeout: Annotated[Timeout, EXECUTION] = 600.0,
    max_retries: Annotated[Retries, EXECUTION] = 10,
    verify: Annotated[bool, EXECUTION] = True,
    dtype: Precision = "float32",
) -> Ranker:
    """Score with a reward model that vLLM serves under the name `model`, at `url` (which ends in /v1): `/classify`.

    It reads what `pointwise` reads, as token ids, and its score is that before any activation. The reward model stays
    a step with a folder, under `ranker`, whose content is part of the key, and whose tokenizer and chat template render
    what is sent. Start the server with `vllm serve FOLDER --served-model-name NAME --dtype float32` (or bfloat16, as
    `dtype` says). When the step starts, and after a lost connection, a few scores are compared with the folder's own
    network on a CPU of this machine, unless `verify: false`. The other options are those of the engine `endpoint`.
    """
    from stages.ranking.served import ServedRewardModel

    server = Endpoint(url, model, api_key_env, concurrency, timeout, max_retries)
    return ServedRewardModel(with_output(reward_model, "score", "endpoint"), dtype, server, verify)


@ranker(reads_model=True, output="vocabulary", version=3)
def llm_judge(
    model: Model,
    *,
    template: Question = QUESTION,
    votes: EvenCount = 8,
    threshold: Annotated[float, Range(ge=0, lt=0.5)] = 0.0,
    max_without_verdict: Annotated[float, Range(ge=0, le=1)] = 0.5,
    temperature: Temperature = 0.7,
    max_tokens: Count = 8,
    engine: JudgeEngine = "vllm",
    engine_options: EngineOptions = None,
    dtype: Precision = "float32",
    seed: Seed = 0,
) -> Ranker:
    """Let an instruction-tuned model vote 8 times, 4 with the order flipped (AutoSxS, as in arXiv:2309.06657).

    A vote is the one letter A or B on the last line of an answer; anything else is no vote, and a pair without a vote
    in one of the orders has no verdict. Votes without a verdict are counted; a judge with more than the share
    `max_without_verdict` of them is refused, with examples of what it wrote. If the share of votes is within
    `threshold` of one half, the pair is a tie, logit 0. The prompt of AutoSxS is not public: the default `template` is
    another. To let the model reason first, ask for it there and raise `max_tokens`. `engine` and `engine_options` are
    those of `sample`, and so is `tensor_parallel` of the profile.
    """
    from stages.data.tokenizer import Tokenizer
    from stages.ranking.llm_judge import LlmJudge
    from stages.sampling.engines import open_engine

    folder = with_output(model, "vocabulary", "llm_judge").folder
    try:  # checked here: else every question would be rejected, as if no response fitted
        Tokenizer(model).prompt_ids(template)
    except ValueError as error:
        raise WinnowError(
            f"llm_judge: its model cannot read the template ({error}); set `by.template` to another wording"
        ) from None
    devices = current_resources().tensor_parallel
    opened = open_engine(engine, folder, dtype, devices, json.dumps(engine_options or {}))
    max_prompt_tokens = length_limit(context_length(folder), engine_options) - max_tokens
    return LlmJudge(
        model, opened, template, votes, threshold, max_without_verdict, temperature, max_tokens, seed, max_prompt_tokens
    )


@ranker(reads_model=False, version=1)
def hosted_judge(
    local_model: None,
    *,
    url: Annotated[Url, EXECUTION],
    model: ServedName,
    template: Question = QUESTION,
    max_without_verdict: Annotated[float, Range(ge=0, le=1)] = 0.5,
    api_key_env: Annotated[VariableName | None, EXECUTION] = None,
    concurrency: Annotated[Concurrency, EXECUTION] = 64,
    timeout: Annotated[Timeout, EXECUTION] = 600.0,
    max_retries: Annotated[Retries, EXECUTION] = 10,
) -> Ranker:
    """Ask a chat model on a server which response is better, and read the log-probs of A and B as its first token.

    For a judge without a local folder: the question goes to `/chat/completions` as one user's message, and the server
    renders it. The server must give `logprobs` and `top_logprobs` (OpenAI's API and vLLM do); both orders are asked. A
    label that is not among the 20 likeliest tokens counts with the probability of the last of them (counter
    `answers_of_one_label`); with neither there is no verdict. The server's model is known by its name alone, which is
    part of the key: a server that has other weights under the same name is not noticed. A question that is too long
    for it ends the step. `url` ends in /v1; the other options are those of the engine `endpoint`.
    """
    from stages.ranking.hosted_judge import HostedJudge

    server = Endpoint(url, model, api_key_env, concurrency, timeout, max_retries)
    return HostedJudge(server, template, max_without_verdict)


@verifiable(version=2, label_threshold=0.5)
def pattern(prompt: str, response: str, *, regex: Annotated[str, AfterValidator(_regex)]) -> float:
    """Return 1 if the regular expression matches somewhere in the response, else 0."""
    return float(re.search(regex, response) is not None)


@verifiable(version=2)
def brevity(prompt: str, response: str, *, words: Annotated[int, Range(ge=0, le=10**9)]) -> float:
    """Return minus the distance of the length from `words`, in words; with stage `combine`, a length penalty."""
    return -float(abs(len(response.split()) - words))


def check_fields(program: Bound, fields: Mapping[str, str]) -> None:
    """Raise ValueError with the reason why a program can score no response by the columns of its prompt."""
    if check := program.metadata.get("check"):
        check(fields, **{name: program.options[name] for name in program.metadata["columns"]})


@dataclass(frozen=True)
class ProgramScorer(Scorer):
    """Scorer that runs a registered program."""

    program: Bound

    def read(self, context: str, response: Response) -> Reading:
        """Return the text, and with it the columns of the data file that its prompt has, if the program reads them."""
        if not self.program.metadata.get("reads_fields"):
            return response.text
        check_fields(self.program, response.fields)
        return response.text, tuple(sorted(response.fields.items()))

    def score(self, context: str, texts: Sequence[Reading]) -> np.ndarray:
        scores = []
        for reading in texts:
            text, *fields = (reading,) if isinstance(reading, str) else (reading[0], dict(reading[1]))
            # A score that is not finite is the stage's to reject, with its candidate.
            score = self.program(context, text, *fields)
            scores.append(number(self.program, score, finite=False, of=repr(text)))
        return np.array(scores, dtype=np.float64)


def open_ranker(by: Bound, model: Model | None) -> Ranker:
    """Load the ranker that the option `by` names; a stage holds it in memory for all of its shards.

    What its methods raise and return is checked as what `by` itself does.
    """
    if by.metadata.get("program"):
        return ProgramScorer(by)
    opened = by(model)
    if not isinstance(opened, Ranker):
        raise by.wrong_result(opened, "a Ranker or a Scorer")
    for name in dir(opened):
        if not name.startswith("_") and isfunction(getattr_static(opened, name)):
            object.__setattr__(opened, name, _checked_method(by, getattr(opened, name)))  # a frozen dataclass, too
    return opened


def _checked_method(by: Bound, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        reason = None
        with by.entry.failures():
            try:
                result = method(*args, **options)
            except ValueError as error:
                if method.__name__ not in ("read", "fits") or isinstance(error, WinnowError):
                    raise
                reason = error  # to reject a response, and no failure
        if reason is not None:
            raise reason
        # One per pair or text. The stage rejects those that are not finite.
        origin = f"from its method {method.__name__}"
        if method.__name__ in ("logits", "score") and len(args) == 2:
            return floats(by, result, (len(args[1]),), origin, finite=False)
        if method.__name__ in ("logits_by_prompt", "score_by_prompt"):
            questions = args[0]
            if len(result) != len(questions):
                raise by.wrong_result(result, f"{len(questions)} arrays, one per prompt, {origin}")
            return [floats(by, values, (len(items),), origin, finite=False)
                    for values, (_, items) in zip(result, questions, strict=True)]  # fmt: skip
        return result

    return call


def ranker_for(inputs: Mapping[str, InputStep]) -> dict[str, Any]:
    """Return `by` of a stage whose ranker is a reward model by its config: its scores, and differences of them."""
    is_scored = "ranker" in inputs and planned_output(inputs["ranker"]) == "score"
    return {"by": "pointwise"} if is_scored else {}


def reads_its_model(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the plan-time problems of a stage that ranks: its ranker has no model, or one that it does not read."""
    from stages.ranking.planned_prompts import warn_of_unread_prompts  # jinja2: workers that train have none

    by: Bound = options["by"]
    # Only the judge samples, and vLLM can do so from quantised weights; a ranker of a plugin knows best itself.
    output = by.metadata.get("output")
    engine = name_of(by.options.get("engine", ""))
    problems = endpoint_problems("by") if by.name in ("endpoint", "hosted_judge", "hosted_voter") else []
    problems += engine_problems(engine, by.options.get("engine_options"))
    problems += input_problems(inputs, "ranker", output, quantized=engine == "vllm" or not output)
    problems += fields_problems(by, inputs, "by")
    warn_of_unread_prompts(by, inputs)
    if by.metadata["reads_model"] and "ranker" not in inputs:
        problems.append(f"`by: {by.name}` reads a model, and there is none: add `ranker` under `from`")
    trained_on = inputs["ranker"].inputs.get("examples") if "ranker" in inputs else None
    if by.name == "pairwise" and trained_on is not None and trained_on.stage == "ranker_examples":
        formats = by.options["format"], trained_on.options.get("format")
        if formats[0] != formats[1]:
            problems.append(
                "by.format: {}, and the ranker is trained on format {}; set both to the same".format(*formats)
            )
    if not by.metadata["reads_model"] and "ranker" in inputs:
        problems.append(f"`by: {by.name}` reads no model, and `ranker` is one: set `ranker: null` under `from`")
    return problems


def with_output(model: Model, output: Literal["vocabulary", "score"], by: str) -> Model:
    """Return the model, or raise WinnowError if it is of the other kind, before any weight is loaded."""
    from stages.network.load import is_reward_model

    actual = "score" if is_reward_model(model) else "vocabulary"
    if actual != output:
        cure = "`pointwise`" if actual == "score" else "`pairwise` or `llm_judge`"
        raise WinnowError(
            f"ranker: model {model.digest[:12]} outputs a {actual}, and `by: {by}` needs one that outputs a {output}; "
            f"set `by` to {cure}"
        )
    return model

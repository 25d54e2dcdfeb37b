"""Candidates that another system made, with a reward or a win probability each: they enter at `select`."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa

from pipeline import DataPath, InputStep, Range, StageContext, stage
from schemas import Candidates, Model, Prompts, Rewards
from schemas.tables import REWARDS
from stages.data.files import Source, prompt_of, reply_of
from stages.data.formats import check_source, read_columns
from stages.data.preferences import Pool
from stages.data.prompts import PromptReader, Share


def _one_score(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    named = {name: options[name] for name in ("reward", "probability")}
    if None not in named.values():
        both = " and ".join(f"`{name}` is {column!r}" for name, column in named.items())
        problems = [f"{both}, and one of them is read; unset the other: `--set own_candidates.probability=null`"]
    elif not any(named.values()):
        problems = ["name either the `reward` column or the `probability` column (of beating a fixed baseline)"]
    else:
        problems = []
    return problems + check_source(options, [options["prompt"], options["response"], *filter(None, named.values())])


@stage(version=2, unsharded=True, check=_one_score)
def own_candidates(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    part: str = "train",
    prompt: str = "prompt",
    response: str = "response",
    reward: str | None = None,
    probability: str | None = None,
    heldout: Share = 0.0,
    max_tokens: Annotated[int, Range(gt=0)] = 1024,
) -> tuple[Prompts, Candidates, Rewards]:
    """One row of the file is one candidate. A probability becomes its logit, the reward of arXiv:2309.06657.

    Left out, with reason: a reward that is not finite, a probability outside the open interval (0, 1)
    (its logit is infinite), an empty response, an empty or too long prompt. Equal responses of one
    prompt stay apart: their number is what the sampling policy said about them.
    """
    from stages.data.tokenizer import Tokenizer

    score = reward or probability or ""
    pool = Pool(PromptReader(Tokenizer(tokenizer), ctx, heldout, max_tokens))
    rewards: list[dict[str, Any]] = []
    source = Source(path, dataset, revision, subset, part)
    for place, row in read_columns(ctx, source, [prompt, response, score]):
        try:
            value = _logit(row.get(score)) if probability else _finite(row.get(score))
            asked = prompt_of(row, prompt)
            name = pool.prompt(asked)
            candidate = pool.response(name, reply_of(row, response, asked), again=True)
        except ValueError as error:
            ctx.reject(str(error), place=place, detail=repr(row.get(score)))
            continue
        rewards.append(dict(prompt_id=name, candidate_id=candidate, reward=value))
    ordered = sorted(rewards, key=lambda row: (row["prompt_id"], row["candidate_id"]))
    return *pool.tables(), pa.Table.from_pylist(ordered, schema=REWARDS)


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("reward is not a number") from None
    if not math.isfinite(number):
        raise ValueError("reward is not finite")
    return number


def _logit(value: Any) -> float:
    p = _finite(value)
    if p in (0.0, 1.0):
        raise ValueError(f"probability is exactly {p:.0f}")
    if not 0 < p < 1:
        raise ValueError("probability is not in (0, 1)")
    return math.log(p) - math.log1p(-p)

"""Stage own_candidates: responses of another system with a reward or a win probability each, ready for `select`."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import DataPath, InputStep, StageContext, stage
from schemas import Candidates, Model, Prompts, Rewards
from schemas.tables import REWARDS
from stages.data.files import DataSource, check_source
from stages.data.prompts import DataTables
from stages.data.rows import Row, label_threshold
from stages.data.texts import number_of, prompt_of, reply_of
from stages.options import Count, HeldoutShare


def _check_own_candidates(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    reward, probability = options["reward"], options["probability"]
    problems = []
    if reward is not None and probability is not None:
        problems.append(
            f"`reward` is {reward!r} and `probability` is {probability!r}, but only one of them can be read; unset the "
            "other, as in `--set own_candidates.probability=null`"
        )
    elif not reward and not probability:
        problems.append("name either the `reward` column or the `probability` column (of beating a fixed baseline)")
    scores = [column for column in (reward, probability) if column]
    return problems + check_source(options, [options["prompt"], options["response"], *scores])


@stage(version=3, unsharded=True, check=_check_own_candidates)
def own_candidates(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    dataset_split: str = "train",
    prompt: str = "prompt",
    response: str = "response",
    reward: str | None = None,
    probability: str | None = None,
    heldout: HeldoutShare = 0.0,
    max_tokens: Count = 1024,
) -> tuple[Prompts, Candidates, Rewards]:
    """Read one candidate per row. A probability p becomes its logit ln(p / (1 - p)), the reward of arXiv:2309.06657.

    Rejected, with a reason: a reward that is not finite, a probability outside the open interval (0, 1)
    (its logit is infinite), an empty response, an empty or too long prompt. Equal responses to one prompt stay
    separate candidates: how often one occurs is an estimate of its probability under the sampling policy.

    If all rewards of the file are 0 or 1 (or false and true), or -1 or 1, they are labels: later stages take them for
    right and wrong by 0.5 or 0, and not by a prompt's mean.
    """
    column = reward or probability or ""
    source = DataSource(path, dataset, revision, subset, dataset_split)
    data = DataTables(tokenizer, heldout, max_tokens)
    rewards: list[Row] = []
    for location, row in source.rows(ctx, [prompt, response, column]):
        try:
            value = number_of(row, column, called="reward")
            if not math.isfinite(value):
                raise ValueError("reward is not finite")
            if probability:
                if value in (0.0, 1.0):
                    raise ValueError(f"probability is exactly {value:.0f}")
                if not 0 < value < 1:
                    raise ValueError("probability is not in (0, 1)")
                value = math.log(value) - math.log1p(-value)
            content = prompt_of(row, prompt)
            name = data.add_prompt(content)
            candidate = data.add_response(name, reply_of(row, response, content), repeated=True)
        except ValueError as error:
            ctx.reject(str(error), place=location, detail=repr(row.get(column)))
            continue
        rewards.append(dict(prompt_id=name, candidate_id=candidate, reward=value))
    threshold = label_threshold(row["reward"] for row in rewards) if reward else None
    rewards = [row | {"label_threshold": threshold} for row in rewards]
    rewards.sort(key=lambda row: (row["prompt_id"], row["candidate_id"]))
    return *data.tables(), pa.Table.from_pylist(rewards, schema=REWARDS)

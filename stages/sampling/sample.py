"""Room 2: n candidates of each prompt from a policy."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa

from pipeline import InputStep, Range, StageContext, stage
from schemas import Candidates, Heads, Model, Prompts, candidate_id, seed_for
from schemas.tables import CANDIDATES
from stages.head.relu import relu_head_of
from stages.limits import check_ids, context_length
from stages.sampling.engines import Completion, Request, Sampling, Steering, open_engine

Row = dict[str, Any]


def _can_steer(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    usual = {name: option.default for name, option in inspect.signature(sample).parameters.items()}
    if "head" not in wired:
        set_anyway = [name for name in usual if name.startswith("steer") and options[name] != usual[name]]
        return [f"{name}: there is no head to steer by; wire `head` in `from`" for name in set_anyway]
    problems = []
    if options["engine"] != "transformers":
        problems.append(f"engine: {options['engine']} cannot steer; set `engine: transformers`, or unwire `head`")
    read = wired["head"].inputs.get("features")
    if read and read.stage == "features" and read.inputs.get("policy") != wired.get("policy"):
        problems.append("head was trained on features of another policy than the one that draws; wire both to one")
    return problems


@stage(version=3, concurrent=True, check=_can_steer)
def sample(
    prompts: Prompts,
    policy: Model,
    ctx: StageContext,
    head: Heads | None = None,
    *,
    split: Literal["train", "heldout"] = "train",
    engine: Literal["vllm", "transformers", "fake"] = "vllm",
    dtype: Literal["float32", "bfloat16"] = "float32",
    n: Annotated[int, Range(gt=0)] = 64,
    temperature: Annotated[float, Range(gt=0, le=2)] = 0.7,
    top_k: Annotated[int, Range(ge=0)] = 40,
    max_tokens: Annotated[int, Range(gt=0)] = 128,
    keep_empty: bool = False,
    seed: int = 0,
    steer: Annotated[float, Range(ge=0)] = 2.0,
    steer_top: Annotated[int, Range(gt=0)] = 15,
    steer_every: Annotated[int, Range(gt=0)] = 5,
) -> Candidates:
    """Draw n responses of up to max_tokens tokens; top_k = 0 means no cut (sec. 3.2 of arXiv:2309.06657: 64, 0.7, 40).

    The seed of a draw is a hash of (seed, prompt id, k). Kernels and batching can still move a draw on
    other hardware, so what is promised is the law and the seeds; the ids drawn are kept, and all later
    stages start from them. An empty response teaches nothing and is left out, unless `keep_empty`: an
    evaluation must count it.

    With a `head` (arXiv:2605.23244), the `steer_top` likeliest tokens are scored by it at every `steer_every`-th
    step, 0 to 1, and `steer` times that is added to their logits. At temperature 1 without a cut, `logp` is then
    the log-prob under the steered law, which is what KL to another policy needs.
    """
    from stages.data.tokenizer import Tokenizer

    tokenizer = ctx.hold(Tokenizer, policy)
    chosen = [row for row in prompts.to_pylist() if row["split"] == split]
    check_ids(policy, "prompts", [row["token_ids"] for row in chosen])
    chosen = _fitting(chosen, context_length(policy.folder) - max_tokens, ctx)
    if not chosen:
        return CANDIDATES.empty_table()
    draws = [(row, k, seed_for(seed, row["prompt_id"], k)) for row in chosen for k in range(n)]
    steering = Steering(relu_head_of(head), steer, steer_top, steer_every) if head is not None else None
    sampling = Sampling(temperature, top_k, max_tokens, tokenizer.stop, steering)
    generator = ctx.hold(open_engine, engine, policy.folder, dtype, ctx.resources.tensor_parallel)
    completions = generator.generate(
        [Request(row["token_ids"], own) for row, _, own in draws],
        sampling,
        lambda done: ctx.progress(done, len(draws), "draws"),
    )
    ctx.count(tokens=sum(len(completion.token_ids) for completion in completions))
    return _table(tokenizer, draws, completions, sampling.logp_kind, keep_empty, ctx)


def _fitting(rows: list[Row], room: int, ctx: StageContext) -> list[Row]:
    for row in rows:
        if len(row["token_ids"]) > room:
            detail = f"{len(row['token_ids'])} tokens, room for {room}"
            ctx.reject("prompt too long", place="prompts", prompt=row["prompt_id"], detail=detail)
    return [row for row in rows if len(row["token_ids"]) <= room]


def _table(
    tokenizer: Any,
    draws: list[tuple[Row, int, int]],
    completions: list[Completion],
    kind: str,
    keep_empty: bool,
    ctx: StageContext,
) -> pa.Table:
    """Rows in order of (prompt, k)."""
    rows: list[Row] = []
    copies: dict[tuple[str, tuple[int, ...]], int] = {}
    for (prompt, k, seed), completion in zip(draws, completions, strict=True):
        ids, name = completion.token_ids, prompt["prompt_id"]
        text = tokenizer.decode(ids)
        if not text and not keep_empty:
            ctx.reject("empty response", place=f"k={k}", prompt=name, detail=repr(ids))
            continue
        copy = copies.get((name, tuple(ids)), 0)
        copies[name, tuple(ids)] = copy + 1
        rows.append(
            {
                "prompt_id": name,
                "candidate_id": candidate_id(name, ids, copy),
                "k": k,
                "token_ids": ids,
                "text": text,
                "logp": completion.logp,
                "logp_kind": kind,
                "n_tokens": len(ids),
                "finish_reason": completion.finish_reason,
                "seed": seed,
            }
        )
    return pa.Table.from_pylist(rows, schema=CANDIDATES)

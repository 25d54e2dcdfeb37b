"""Stage `sample`: n candidates per prompt from a policy."""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa

from pipeline import InputStep, Range, StageContext, stage
from schemas import Candidates, Heads, Model, Prompts, candidate_id, seed_for
from schemas.tables import CANDIDATES
from stages.data.rows import Row
from stages.head.relu import read_relu_head
from stages.limits import check_ids, context_length
from stages.options import Count, NotNegative, Precision, Seed, SmallCount, Temperature
from stages.sampling.engines import Request, Sampling, Steering, open_engine


def _check_sample(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems at plan time, also responses for which a model that is known by then has no room."""
    problems = _check_steering(options, inputs)
    policy = inputs.get("policy")
    while policy and policy.stage == "optimize":
        policy = policy.inputs.get("init")  # whose context it keeps
    if policy and policy.stage in ("model", "untrained") and policy.options:
        is_folder = policy.stage == "model"
        length = context_length(policy.options["path"].path) if is_folder else policy.options["context"]
        if options["max_tokens"] >= length:
            problems.append(
                f"max_tokens: {options['max_tokens']:,} leaves no room for a prompt in the policy's context of "
                f"{length:,} tokens; set max_tokens lower"
            )
    return problems


def _check_steering(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems at plan time: a head that cannot steer, or steering options without a head."""
    if "head" not in inputs:
        defaults = {name: option.default for name, option in inspect.signature(sample).parameters.items()}
        changed = [name for name in defaults if name.startswith("steer") and options[name] != defaults[name]]
        return [f"{name}: there is no head to steer by; add `head` under `from`" for name in changed]
    problems = []
    if options["engine"] != "transformers":
        engine = options["engine"]
        problems.append(f"engine: {engine} cannot steer; set `engine: transformers`, or remove `head` under `from`")
    features = inputs["head"].inputs.get("features")
    if features and features.stage == "features" and features.inputs.get("policy") != inputs.get("policy"):
        problems.append("head was trained on features of another policy than the one sampled from; use one for both")
    return problems


@stage(version=3, concurrent=True, check=_check_sample)
def sample(
    prompts: Prompts,
    policy: Model,
    ctx: StageContext,
    head: Heads | None = None,
    *,
    split: Literal["train", "heldout"] = "train",
    engine: Literal["vllm", "transformers", "fake"] = "vllm",
    dtype: Precision = "float32",
    n: SmallCount = 64,
    temperature: Temperature = 0.7,
    top_k: Annotated[int, Range(ge=0, le=10**9)] = 40,
    max_tokens: Count = 128,
    keep_empty: bool = False,
    seed: Seed = 0,
    steer: NotNegative = 2.0,
    steer_top: Count = 15,
    steer_every: Count = 5,
) -> Candidates:
    """Draw n responses of at most max_tokens; top_k = 0 disables top-k (sec. 3.2 of arXiv:2309.06657: 64, 0.7, 40).

    The seed of a draw is a hash of (seed, prompt id, k). Kernels and batching can still change a draw on other
    hardware: only the sampling distribution and the seeds are guaranteed. The ids are stored, and all later stages
    start from them. Empty completions are rejected, unless `keep_empty`: an evaluation must count them.

    With a `head` (arXiv:2605.23244), the `steer_top` likeliest tokens are scored by it at every `steer_every`-th
    step, 0 to 1, and `steer` times that is added to their logits. At temperature 1 with top-k disabled, `logp` is
    then the log-prob under the steered distribution, which is what KL to another policy needs.
    """
    from stages.data.tokenizer import Tokenizer

    tokenizer = ctx.open_once(Tokenizer, policy)
    rows = [row for row in prompts.to_pylist() if row["split"] == split]
    check_ids(policy, "prompts", [row["token_ids"] for row in rows])

    # Prompts that leave room for max_tokens in the context.
    max_prompt_tokens = context_length(policy.folder) - max_tokens
    fitting: list[Row] = []
    for row in rows:
        if len(row["token_ids"]) <= max_prompt_tokens:
            fitting.append(row)
        else:
            detail = f"{len(row['token_ids'])} tokens, room for {max_prompt_tokens}"
            ctx.reject("prompt too long", place="prompts", prompt=row["prompt_id"], detail=detail)
    if not fitting:
        return CANDIDATES.empty_table()

    # One request per draw.
    draws = [(row, k, seed_for(seed, row["prompt_id"], k)) for row in fitting for k in range(n)]
    requests = [Request(row["token_ids"], draw_seed) for row, _, draw_seed in draws]
    steering = Steering(read_relu_head(head), steer, steer_top, steer_every) if head is not None else None
    sampling = Sampling(temperature, top_k, max_tokens, tokenizer.stop, steering)
    generator = ctx.open_once(open_engine, engine, policy.folder, dtype, ctx.resources.tensor_parallel)
    completions = generator.generate(requests, sampling, lambda done: ctx.progress(done, len(draws), "draws"))
    ctx.count(tokens=sum(len(completion.token_ids) for completion in completions))

    # Rows in order of (prompt, k). Equal responses to a prompt stay apart: an id counts the copies before it.
    candidates: list[Row] = []
    copies: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for (row, k, draw_seed), completion in zip(draws, completions, strict=True):
        ids, prompt = completion.token_ids, row["prompt_id"]
        text = tokenizer.decode(ids)
        if not text and not keep_empty:
            ctx.reject("empty response", place=f"k={k}", prompt=prompt, detail=repr(ids))
            continue
        candidates.append(
            {
                "prompt_id": prompt,
                "candidate_id": candidate_id(prompt, ids, copies[prompt, tuple(ids)]),
                "k": k,
                "token_ids": ids,
                "text": text,
                "logp": completion.logp,
                "logp_kind": sampling.logp_kind,
                "n_tokens": len(ids),
                "finish_reason": completion.finish_reason,
                "seed": draw_seed,
            }
        )
        copies[prompt, tuple(ids)] += 1
    return pa.Table.from_pylist(candidates, schema=CANDIDATES)

"""Stage `sample`: n candidates per prompt from a policy."""

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa

from pipeline import InputStep, Range, StageContext, stage
from pipeline.registry import nearest
from schemas import Candidates, Heads, Model, Prompts, WinnowError, candidate_id, seed_for
from schemas.tables import CANDIDATES
from stages.data.rows import Row
from stages.head.relu import read_relu_head
from stages.limits import check_ids, context_length
from stages.model_config import ModelConfig, generation_problems, input_problems, planned_config
from stages.options import Count, NotNegative, Precision, Seed, SmallCount, Temperature
from stages.sampling.engines import Request, Sampling, Steering, open_engine


def _check_sample(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems at plan time: what is no policy, a head that cannot steer, steering options without a head."""
    problems = input_problems(inputs, "policy", "vocabulary", quantized=options["engine"] != "transformers")
    config = planned_config(inputs["policy"]) if "policy" in inputs else None
    if config and config.content.get("is_encoder_decoder"):
        problems.append(f"policy: {config.architecture} is an encoder-decoder, which no engine here samples from")
    problems += generation_problems(config) if config else []
    if options["keep_special"] and options["allow_special"]:
        problems.append("allow_special: `keep_special` keeps responses with any special token; unset one of them")
    # Also responses for which a model that is known by now has no room.
    policy = inputs.get("policy")
    while policy and policy.stage == "optimize":
        policy = policy.inputs.get("init")  # whose context it keeps
    if policy and policy.stage in ("model", "untrained") and policy.options:
        folder = getattr(policy.options.get("path"), "path", None)
        length = context_length(folder) if folder else policy.options.get("context", options["max_tokens"] + 1)
        if options["max_tokens"] >= length:
            problems.append(
                f"max_tokens: {options['max_tokens']:,} leaves no room for a prompt in the policy's context of "
                f"{length:,} tokens; set max_tokens lower"
            )
    if "head" not in inputs:
        defaults = {name: option.default for name, option in inspect.signature(sample).parameters.items()}
        changed = [name for name in defaults if name.startswith("steer") and options[name] != defaults[name]]
        return problems + [f"{name}: there is no head to steer by; add `head` under `from`" for name in changed]
    if options["engine"] != "transformers":
        engine = options["engine"]
        problems.append(f"engine: {engine} cannot steer; set `engine: transformers`, or remove `head` under `from`")
    features = inputs["head"].inputs.get("features")
    if features and features.stage == "features" and features.inputs.get("policy") != inputs.get("policy"):
        problems.append("head was trained on features of another policy than the one sampled from; use one for both")
    return problems


def _refused_ids(special_tokens: dict[int, str], allowed: list[str]) -> set[int]:
    """Return the special ids that a response may not hold before its end; raise WinnowError for an unknown token."""
    tokens = list(special_tokens.values())
    for token in allowed:
        if token not in tokens:
            hint = nearest(token, tokens)
            raise WinnowError(f"allow_special: {token!r} is no special token of this tokenizer; {hint}")
    return {index for index, token in special_tokens.items() if token not in allowed}


@stage(version=5, concurrent=True, check=_check_sample)
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
    keep_special: bool = False,
    allow_special: list[str] | None = None,
    seed: Seed = 0,
    steer: NotNegative = 2.0,
    steer_top: Count = 15,
    steer_every: Count = 5,
) -> Candidates:
    """Draw n responses of at most max_tokens; top_k = 0 disables top-k (sec. 3.2 of arXiv:2309.06657: 64, 0.7, 40).

    The seed of a draw is a hash of (seed, prompt id, k). Kernels and batching can still change a draw on other
    hardware: only the sampling distribution and the seeds are guaranteed. The ids are stored, and all later stages
    start from them. Empty completions are rejected, unless `keep_empty`: an evaluation must count them. So are draws
    with an id that the tokenizer has no token for, in a vocabulary that is padded. The engine holds weights and
    computes in `dtype`: bfloat16 halves the memory, and rounds a policy that is saved in fp32.

    Also rejected, unless `keep_special`, are those with a special token of the tokenizer (BOS, PAD, a role) before
    their end, which no text shows and training would read. `allow_special` lists the ones that a response may hold, as
    some models write their reasoning between special tokens. `raw_text` shows what was kept.

    With a `head` (arXiv:2605.23244), the `steer_top` likeliest tokens are scored by it at every `steer_every`-th
    step, 0 to 1, and `steer` times that is added to their logits. At temperature 1 with top-k disabled, `logp` is
    then the log-prob under the steered distribution, which is what KL to another policy needs.
    """
    from stages.data.tokenizer import Tokenizer

    tokenizer = ctx.open_once(Tokenizer, policy)
    # A padded vocabulary has ids of no token. A draw of one is rejected and not masked: a mask would change the law
    # that `logp` is under, and cost time in every step of every engine, for what a trained model hardly ever draws.
    unknown_ids = {*range(ModelConfig(policy.folder).vocabulary or 0)} - {*tokenizer.inner.get_vocab().values()}
    rows = [row for row in prompts.to_pylist() if row["split"] == split]
    check_ids(policy, "prompts", [row["token_ids"] for row in rows])
    refused_ids = set() if keep_special else _refused_ids(tokenizer.special_tokens, allow_special or [])

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
        if not math.isfinite(completion.logp):
            raise WinnowError(
                f"sample: policy {policy.digest[:12]} gave a draw of prompt {prompt} (k={k}) the log-prob "
                f"{completion.logp}: its weights or its activations in {dtype} are not finite; give a policy from "
                "before its training failed, or another `dtype`"
            )
        if unknown := unknown_ids.intersection(ids):
            detail = f"id {min(unknown)} of {ids}"
            ctx.reject("id beyond the tokenizer", place=f"k={k}", prompt=prompt, detail=detail)
            continue
        inside = ids[:-1] if completion.finish_reason == "stop" else ids
        text = tokenizer.decode(inside)
        is_special = not tokenizer.special_tokens.keys().isdisjoint(inside)
        raw_text = tokenizer.decode(inside, special_tokens=True) if is_special else None
        if is_special and not refused_ids.isdisjoint(inside):
            ctx.reject("special token in the response", place=f"k={k}", prompt=prompt, detail=raw_text or "")
            continue
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
                "raw_text": raw_text,
                "logp": completion.logp,
                "logp_kind": sampling.logp_kind,
                # The fake engine reads no weights, so that nothing of it can be compared with them.
                "model": None if engine == "fake" else policy.digest,
                "dtype": None if engine == "fake" else dtype,
                "n_tokens": len(ids),
                "finish_reason": completion.finish_reason,
                "seed": draw_seed,
            }
        )
        copies[prompt, tuple(ids)] += 1
    return pa.Table.from_pylist(candidates, schema=CANDIDATES)

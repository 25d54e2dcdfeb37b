"""Stage `sample`: n candidates per prompt from a policy."""

import inspect
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import pyarrow as pa

from pipeline import InputStep, Range, StageContext, stage
from pipeline.costs import Cost
from pipeline.registry import nearest
from schemas import Candidates, Heads, Model, Prompts, WinnowError, WinnowWarning, candidate_id, seed_for
from schemas.tables import CANDIDATES, REJECTS
from stages.data.rows import Row
from stages.head.relu import read_relu_head
from stages.limits import check_ids, context_length
from stages.model_config import ModelConfig, generation_problems, id_problems, input_problems, planned_config
from stages.options import (
    Count,
    LogitBias,
    NotNegative,
    Penalty,
    Positive,
    Precision,
    Seed,
    Share,
    SmallCount,
    Split,
    Temperature,
    Texts,
    TokenIds,
    TopP,
    split_problems,
)
from stages.sampling.devices import draws_device_problem
from stages.sampling.draws import draw_texts, ids_before_end, known_ids_of
from stages.sampling.engines import POLICY_ITSELF, Completion, LogpKind, Request, Sampling, Steering, open_engine
from stages.sampling.engines.options import (
    SPECULATION,
    AnyEngine,
    EngineOptions,
    engine_problems,
    is_policy_itself,
    length_limit,
    name_of,
)
from stages.sampling.memory import draws_need, engine_gpus, less_engine_memory
from stages.work import sampling_work

# Temperature and top-k are not among them: every recipe sets them, and a dry run is one of that recipe.
UNREAD_BY_FAKE = (
    "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words",
    "min_tokens", "ignore_eos", "stop",
)  # fmt: skip
DRAW_PLACE = re.compile(r"k=(\d+)")  # of the rejects of single draws
MAX_BAD_WORDS = 64  # two sequences of ids each, and vLLM takes 128 (VLLM_MAX_NUM_BAD_WORDS)


def _check_sample(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems at plan time: what is no policy, a head that cannot steer, steering options without a head."""
    engine = name_of(options["engine"])
    problems = input_problems(inputs, "policy", "vocabulary", quantized=engine in ("vllm", "fake"))
    problems += id_problems(inputs, "prompts", "policy")
    cure = "end the run with what is trained (`--until optimize`, or `--set target=optimize`)"
    problems += split_problems(options, inputs.get("prompts"), cure=cure)
    config = planned_config(inputs["policy"]) if "policy" in inputs else None
    if config and config.content.get("is_encoder_decoder"):
        problems.append(f"policy: {config.architecture} is an encoder-decoder, which no engine here samples from")
    problems += generation_problems(config, options) if config else []
    if options["keep_special"] and options["allow_special"]:
        problems.append("allow_special: `keep_special` keeps responses with any special token; unset one of them")
    problems += engine_problems(engine, options["engine_options"])
    if engine == "fake":
        changed = [
            name for name in UNREAD_BY_FAKE if options[name] not in (None, [], {}, POLICY_ITSELF.get(name, False))
        ]
        problems += [f"{name}: engine fake draws tokens at random and does not read it; unset it" for name in changed]
    speculates = [name for name in SPECULATION if name in (options["engine_options"] or {})]
    for name in ("min_p", "logit_bias"):
        if speculates and options[name]:
            problems.append(f"{name}: vLLM does not speculate with it; unset it, or engine_options.{speculates[0]}")
    problems += _ending_problems(options)
    vocabulary = config.vocabulary if config else None
    for name in ("logit_bias", "stop_token_ids"):
        if vocabulary and (unknown := [token for token in map(int, options[name] or ()) if token >= vocabulary]):
            problems.append(f"{name}: {unknown[0]} is no token id of the policy, which has {vocabulary:,}")
    if len(options["bad_words"] or ()) > MAX_BAD_WORDS:
        problems.append(f"bad_words: {len(options['bad_words'])} words, and vLLM takes {MAX_BAD_WORDS} at most")
    policy = inputs.get("policy")
    is_rounded = options["dtype"] == "bfloat16" and engine != "fake"
    if is_rounded and policy and policy.stage == "optimize" and policy.options.get("save_dtype") == "float32":
        warnings.warn(
            "dtype: bfloat16, and its policy is an `optimize` step with save_dtype: float32: the engine rounds "
            "the trained weights, so draws are of another policy than `reference` scores, and may lack most of a small "
            "change; set `dtype: float32` in `sample`, or `save_dtype: bfloat16` and `save_rounding: stochastic` in "
            "`optimize`, so that both read the same weights",
            WinnowWarning,
            stacklevel=2,
        )
    if engine == "endpoint" and policy and policy.stage not in ("model", "untrained"):
        warnings.warn(
            f"engine endpoint, and its policy is made by a step of stage {policy.stage}: the server must serve "
            "that step's folder when this one starts, which is checked then; or set `engine: vllm` in this step",
            WinnowWarning,
            stacklevel=2,
        )
    # Also responses for which a model that is known by now has no room.
    while policy and policy.stage == "optimize":
        policy = policy.inputs.get("init")  # whose context it keeps
    if policy and policy.stage in ("model", "untrained") and policy.options:
        folder = getattr(policy.options.get("path"), "path", None)
        length = context_length(folder) if folder else policy.options.get("context", options["max_tokens"] + 1)
        length = length_limit(length, options["engine_options"])
        if options["max_tokens"] >= length:
            problems.append(
                f"max_tokens: {options['max_tokens']:,} leaves no room for a prompt in the policy's context of "
                f"{length:,} tokens; set max_tokens lower"
            )
    if "head" not in inputs:
        defaults = {name: option.default for name, option in inspect.signature(sample).parameters.items()}
        changed = [name for name in defaults if name.startswith("steer") and options[name] != defaults[name]]
        return problems + [f"{name}: there is no head to steer by; add `head` under `from`" for name in changed]
    if engine != "transformers":
        problems.append(f"engine: {engine} cannot steer; set `engine: transformers`, or remove `head` under `from`")
    if config and (narrow := config.narrow_attention):
        problems.append(
            f"policy: {config.folder} cannot be steered by a head, since not all of its layers attend to all that "
            f"precedes a token (config.json has {narrow}); remove `head` under `from` (the head can rank what is "
            "sampled without it: `head_reward`), or give another policy"
        )
    features = inputs["head"].inputs.get("features")
    if features and features.stage == "features" and features.inputs.get("policy") != inputs.get("policy"):
        problems.append("head was trained on features of another policy than the one sampled from; use one for both")
    return problems


def _ending_problems(options: dict[str, Any]) -> list[str]:
    """Return what cannot be meant together among the options that say where a response ends."""
    problems = []
    if options["min_tokens"] > options["max_tokens"]:
        problems.append(
            f"min_tokens: {options['min_tokens']:,} is more than max_tokens, {options['max_tokens']:,}; set it lower"
        )
    if options["ignore_eos"] and options["min_tokens"]:
        problems.append(
            "min_tokens: it holds back the end of a response, and `ignore_eos` knows none; unset one of them"
        )
    if options["ignore_eos"] and not (options["keep_special"] or options["allow_special"]):
        problems.append(
            "ignore_eos: responses go on after EOS, and those that hold it would be rejected; set "
            "`keep_special: true`, or list it in `allow_special`"
        )
    return problems


def _check_stop(stop: list[str], special_tokens: dict[int, str]) -> None:
    """Raise WinnowError for a stop string with a special token, which is no part of a response's text."""
    for text in stop:
        if held := [(index, token) for index, token in special_tokens.items() if token in text]:
            index, token = held[0]
            raise WinnowError(
                f"stop: {text!r} holds the special token {token}, which is no text and would never end a response; "
                f"set `stop_token_ids: [{index}]`"
            )


def _refused_ids(special_tokens: dict[int, str], allowed: list[str]) -> set[int]:
    """Return the special ids that a response may not hold before its end; raise WinnowError for an unknown token."""
    tokens = list(special_tokens.values())
    for token in allowed:
        if token not in tokens:
            hint = nearest(token, tokens)
            raise WinnowError(f"allow_special: {token!r} is no special token of this tokenizer; {hint}")
    return {index for index, token in special_tokens.items() if token not in allowed}


def _earlier_draws(ctx: StageContext, prompts: set[str], n: int) -> dict[tuple[str, int], Row]:
    """Return the draws that finished steps have, by prompt id and k: rows of `candidates`, or of `rejects`.

    Of each prompt those of one step, which has most: elsewhere than on one machine, equal seeds can give other draws.
    """
    draws: dict[tuple[str, int], Row] = {}
    missing = set(prompts)
    for read in ctx.earlier:
        of_step = {}
        for row in read(CANDIDATES).to_pylist():
            if row["prompt_id"] in missing:
                of_step[row["prompt_id"], row["k"]] = row
        for row in read(REJECTS).to_pylist():
            if row["prompt_id"] in missing and (draw := DRAW_PLACE.fullmatch(row["place"])):
                of_step[row["prompt_id"], int(draw[1])] = row
        draws |= {draw: row for draw, row in of_step.items() if draw[1] < n}
        missing -= {prompt for prompt, _ in of_step}
    return draws


@stage(
    version=8,
    concurrent=True,
    check=_check_sample,
    cost=Cost(draws_need, less_engine_memory, sampling_work, draws_device_problem, engine_gpus),
    which_rows=("n", "split"),
    goes_on=True,
)
def sample(
    prompts: Prompts,
    policy: Model,
    ctx: StageContext,
    head: Heads | None = None,
    *,
    split: Split = "train",
    engine: AnyEngine = "vllm",
    engine_options: EngineOptions = None,
    dtype: Precision = "float32",
    n: SmallCount = 64,
    temperature: Temperature = 0.7,
    top_k: Annotated[int, Range(ge=0, le=10**9)] = 40,
    max_tokens: Count = 128,
    top_p: TopP = 1.0,
    min_p: Share = 0.0,
    repetition_penalty: Positive = 1.0,
    presence_penalty: Penalty = 0.0,
    frequency_penalty: Penalty = 0.0,
    logit_bias: LogitBias | None = None,
    bad_words: Texts | None = None,
    min_tokens: Annotated[int, Range(ge=0, le=10**9)] = 0,
    ignore_eos: bool = False,
    stop: Texts | None = None,
    stop_token_ids: TokenIds | None = None,
    keep_empty: bool = False,
    keep_special: bool = False,
    allow_special: list[str] | None = None,
    seed: Seed = 0,
    steer: NotNegative = 2.0,
    steer_top: Count = 15,
    steer_every: Count = 5,
) -> Candidates:
    """Draw n responses of at most max_tokens; top_k = 0 disables top-k (sec. 3.2 of arXiv:2309.06657: 64, 0.7, 40).

    The seed of a draw is a hash of (seed, prompt id, k). Draws that a finished step of this store has by the same
    options but `n`, of the same prompt, are taken from there: a smaller n draws nothing, and a larger one, or more
    prompts, only what is missing. Kernels and batching can still change a draw on other
    hardware: only the sampling distribution and the seeds are guaranteed. The ids are stored, and all later stages
    start from them. Empty completions are rejected, unless `keep_empty`: an evaluation must count them. The engine
    holds weights and computes in `dtype`: bfloat16 halves the memory, and rounds a policy that is saved in fp32.

    Also rejected, unless `keep_special`, are those with a special token of the tokenizer (BOS, PAD, a role) before
    their end, or with an id that it has no token for, in a vocabulary that is padded: no text shows them, and training
    would read them. An evaluation keeps them, with the text that a user would see, and counts those of the latter.
    `allow_special` lists the special tokens that a response may hold, as some models write their reasoning between
    them. `raw_text` shows what was kept.

    engine: `vllm` is the fastest, on a GPU or a CPU, for which it lacks some sizes of heads; `transformers` runs every
    model that can be trained here, in this process, and alone can steer; `fake` draws random tokens and reads no
    weights, for dry runs; `{name: endpoint, url: ..., model: ...}` is a policy that vLLM serves elsewhere, whose server
    computes in `dtype`.

    engine_options: vLLM's engine arguments by its own names (`gpu_memory_utilization`, `max_num_seqs`,
    `speculative_config`, ...), of which those that say how it runs are not part of the key; stages/sampling/engines/
    options.py lists them. With one that makes it compute another network than the policy's (`quantization`,
    `kv_cache_dtype`), `logp_kind` is `approximate`: such log-probs are compared with none, and there is no KL.

    `top_p` to `stop_token_ids` are vLLM's sampling parameters of those names; the engine transformers does the same,
    and `fake`, which draws tokens at random for dry runs, reads `max_tokens` alone. logit_bias: what is added to the
    logits of token ids. stop, stop_token_ids: texts and ids that end a response besides the ends of the model, which
    `ignore_eos` takes away. A response that a text ended has finish_reason `stop_string`: its `token_ids` are all that
    were drawn, the text's included, and are what is trained on; its `text` ends before the text, as vLLM's does. Where
    the last token goes on after the text, the id stays whole: such draws are counted. Where a prompt ends with an
    assistant turn, the response's `text` keeps the space before its first word.

    What changes the distribution (all but what ends a response) leaves `logp` the policy's own, and `logp_kind` raw.

    With a `head` (arXiv:2605.23244), the `steer_top` likeliest tokens are scored by it at every `steer_every`-th
    step, 0 to 1, and `steer` times that is added to their logits. Where nothing else changes the distribution
    (temperature 1, no top-k, no penalty), `logp` is then the log-prob under the steered distribution, which is what KL
    to another policy needs.
    """
    from stages.data.tokenizer import Tokenizer

    tokenizer = ctx.open_once(Tokenizer, policy)
    # A padded vocabulary has ids of no token. A draw of one is rejected and not masked: a mask would change the law
    # that `logp` is under, and cost time in every step of every engine, for what a trained model hardly ever draws.
    known_ids = known_ids_of(tokenizer)
    vocabulary = ModelConfig(policy.folder).vocabulary or len(known_ids)
    rows = [row for row in prompts.to_pylist() if row["split"] == split]
    check_ids(policy, "prompts", [row["token_ids"] for row in rows])
    refused_ids = set() if keep_special else _refused_ids(tokenizer.special_tokens, allow_special or [])
    _check_stop(stop or [], tokenizer.special_tokens)
    bias = tuple((int(token), value) for token, value in (logit_bias or {}).items())
    check_ids(policy, "logit_bias and stop_token_ids", [[token for token, _ in bias], stop_token_ids or []])

    # Prompts that leave room for max_tokens in the context.
    max_prompt_tokens = length_limit(context_length(policy.folder), engine_options) - max_tokens
    fitting: list[Row] = []
    for row in rows:
        if len(row["token_ids"]) <= max_prompt_tokens:
            fitting.append(row)
        else:
            detail = f"{len(row['token_ids'])} tokens, room for {max_prompt_tokens}"
            ctx.reject("prompt too long", place="prompts", prompt=row["prompt_id"], detail=detail)
    if not fitting:
        return CANDIDATES.empty_table()

    # One request per draw, but for those that are there.
    draws = [(row, k, seed_for(seed, row["prompt_id"], k)) for row in fitting for k in range(n)]
    earlier = _earlier_draws(ctx, {row["prompt_id"] for row in fitting}, n)
    requests = [
        Request(row["token_ids"], draw_seed) for row, k, draw_seed in draws if (row["prompt_id"], k) not in earlier
    ]
    ctx.count(draws_of_earlier_steps=len(draws) - len(requests))
    steering = Steering(read_relu_head(head), steer, steer_top, steer_every) if head is not None else None
    ends = dict.fromkeys([*(() if ignore_eos else tokenizer.stop), *(stop_token_ids or ())])
    sampling = Sampling(
        temperature, top_k, max_tokens, tuple(ends), steering, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        logit_bias=bias, bad_words=tuple(bad_words or ()), min_tokens=min_tokens, ignore_eos=ignore_eos,
        stop=tuple(stop or ()),
    )  # fmt: skip
    vllm_options = json.dumps(engine_options or {}, sort_keys=True)
    logp_kind: LogpKind = sampling.logp_kind if is_policy_itself(engine_options) else "approximate"
    completions: list[Completion] = []
    if requests:
        opened = ctx.open_once(open_engine, engine, policy.folder, dtype, ctx.resources.tensor_parallel, vllm_options)
        completions = opened.generate(requests, sampling, lambda done: ctx.progress(done, len(requests), "draws"))
    ctx.count(tokens=sum(len(completion.token_ids) for completion in completions))
    new_draws = iter(completions)

    # Rows in order of (prompt, k). Equal responses to a prompt stay apart: an id counts the copies before it.
    candidates: list[Row] = []
    copies: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for row, k, draw_seed in draws:
        prompt = row["prompt_id"]
        if draw := earlier.get((prompt, k)):
            if "reason" in draw:
                ctx.reject(draw["reason"], place=draw["place"], prompt=prompt, detail=draw["detail"])
            else:
                copy = (prompt, tuple(draw["token_ids"]))
                candidates.append(draw | {"candidate_id": candidate_id(*copy, copies[copy])})
                copies[copy] += 1
            continue
        completion = next(new_draws)
        ids = completion.token_ids
        if not math.isfinite(completion.logp):
            raise WinnowError(
                f"sample: policy {policy.digest[:12]} gave a draw of prompt {prompt} (k={k}) the log-prob "
                f"{completion.logp}: its weights or its activations in {dtype} are not finite; give a policy from "
                "before its training failed, or another `dtype`"
            )
        if unknown := {*ids} - known_ids:
            if not keep_special or max(unknown) >= vocabulary:
                detail = f"id {min(unknown)} of {ids}"
                ctx.reject("id beyond the tokenizer", place=f"k={k}", prompt=prompt, detail=detail)
                continue
            ctx.count(draws_with_ids_beyond_the_tokenizer=1)
            completion = replace(completion, token_ids=[token for token in ids if token in known_ids])
        try:
            text, raw_text, rest = draw_texts(tokenizer, completion, sampling.stop, row)
        except ValueError as error:
            ctx.reject(str(error), place=f"k={k}", prompt=prompt, detail=repr(ids))
            continue
        if completion.finish_reason == "stop_string":
            ctx.count(stop_strings=1, stop_strings_inside_a_token=bool(rest))
        if raw_text is not None and not refused_ids.isdisjoint(ids_before_end(completion)):
            ctx.reject("special token in the response", place=f"k={k}", prompt=prompt, detail=raw_text)
            continue
        if not text.strip() and not keep_empty:
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
                "logp_kind": logp_kind,
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

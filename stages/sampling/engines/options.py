"""Options `engine` and `engine_options`, checked when a plan is made, without importing torch or vLLM."""

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, PlainValidator

from pipeline import EXECUTION, Bound, EntryHint, ExecutionEntries, Registry
from pipeline.registry import nearest
from stages.endpoint import Concurrency, Endpoint, Retries, ServedName, Timeout, Url, VariableName, endpoint_problems

if TYPE_CHECKING:
    from stages.sampling.engines import Engine

engine = Registry("engine", "folder", "dtype")  # those with options of their own; the others are a name alone


@engine
def endpoint(
    folder: Path,
    dtype: str,
    *,
    url: Annotated[Url, EXECUTION],
    model: Annotated[ServedName, EXECUTION],
    api_key_env: Annotated[VariableName | None, EXECUTION] = None,
    concurrency: Annotated[Concurrency, EXECUTION] = 256,
    timeout: Annotated[Timeout, EXECUTION] = 600.0,
    max_retries: Annotated[Retries, EXECUTION] = 10,
    verify: Annotated[bool, EXECUTION] = True,
) -> "Engine":
    """Ask a server that serves the policy under the name `model`: vLLM's OpenAI-compatible one, at `url`, with /v1.

    The policy stays a step with a folder, whose content is part of the key: its tokenizer and chat template render the
    prompts, which are sent as token ids, and the server returns the ids that it drew. A server that returns no ids is
    refused. Every sampling option is in the request, so that defaults of the server count for nothing; seeds are those
    of the other engines. A server's batches are not ours: its draws may differ from theirs, and from its own, where
    two tokens are equally likely but for rounding.

    Start it with `vllm serve FOLDER --served-model-name NAME --dtype float32` (or bfloat16, as the step's `dtype`
    says), without logits processors of its own, which nobody can see from here. When the step starts, and when the
    server was lost or its fingerprint changed meanwhile, a few draws are compared with the folder's own network on a
    CPU of this machine: other weights, another dtype than a float32 that was promised, another tokenizer and processed
    log-probs are refused. `verify: false`, for a folder that this machine cannot hold, leaves that to `reference` and
    `optimize`, and for the draws of an evaluation to nobody.

    api_key_env: name of the environment variable that holds the server's key, where the step runs. concurrency:
    requests of one worker on their way at once. timeout: seconds for one whole answer, time in the queue included.
    max_retries: attempts after the first, 10 of them within a minute; then the step fails, and the same command goes
    on with the parts that are missing.
    """
    from stages.sampling.engines.endpoint import EndpointEngine

    return EndpointEngine(folder, dtype, Endpoint(url, model, api_key_env, concurrency, timeout, max_retries), verify)


def _chosen(names: tuple[str, ...], value: Any) -> Any:
    """Return the name of an engine without options, or a registered one with its options."""
    if isinstance(value, dict) and value.get("name") in names:
        if len(value) > 1:
            raise ValueError(f"{value['name']} has no options here; vLLM's are in `engine_options`")
        value = value["name"]
    if isinstance(value, str) and value not in (*names, *engine.entries):
        *first, last = map(repr, (*names, *engine.entries))
        raise ValueError(f"must be {', '.join(first)} or {last}")
    return value if isinstance(value, str) and value in names else engine.bind(value)


AnyEngine = Annotated[
    Literal["vllm", "transformers", "fake"] | Annotated[Bound, engine],
    PlainValidator(lambda value: _chosen(("vllm", "transformers", "fake"), value)),
]
JudgeEngine = Annotated[
    Literal["vllm", "transformers"] | Annotated[Bound, engine],
    PlainValidator(lambda value: _chosen(("vllm", "transformers"), value)),
]


def name_of(value: str | Bound) -> str:
    """Return the name of an engine, with or without options."""
    return value if isinstance(value, str) else value.name


# How the engine runs: memory, batches, devices, kernels, and speculation, whose draws have the policy's distribution.
# Draws can differ by rounding, as on another machine. All others are part of the key: they may change what is computed.
EXECUTION_OPTIONS = frozenset({
    "async_scheduling", "attention_backend", "block_size", "compilation_config", "cpu_offload_gb", "cpu_offload_params",
    "cudagraph_capture_sizes", "disable_cascade_attn", "disable_custom_all_reduce", "distributed_executor_backend",
    "enable_chunked_prefill", "enable_expert_parallel", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_offloading_size", "long_prefill_token_threshold",
    "max_cudagraph_capture_size", "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers",
    "moe_backend", "num_gpu_blocks_override", "offload_backend", "offload_group_size", "offload_num_in_group",
    "offload_params", "offload_prefetch_step", "optimization_level", "pipeline_parallel_size",
    "prefix_caching_hash_algo", "safetensors_load_strategy", "scheduling_policy", "spec_method", "spec_model",
    "spec_tokens", "speculative_config",
})  # fmt: skip
MAX_SEQUENCES = 512  # that run at once; as many again wait in the engine, so that the end of one leaves no gap
CPU_STEP_TOKENS = 16_384  # of a step on a CPU; raised to the context length, for one whole prompt must fit
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # environment variable: GiB of the KV cache on a CPU, where it must be set
CPU_CACHE_GIB = "2"
# Part of the key, and the network stays the policy's own.
SAME_NETWORK = EXECUTION_OPTIONS | {"max_model_len"}
SPECULATION = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
CHANGES_LAW = "it would change the distribution of the draws, and no column would say so"
RUNS_CODE = "it names code to run, and a recipe's options run none"
STARTED_WITH = "it is what the engine of this step is started with"
REFUSED = {
    "model": "set `policy` (of a judge: `ranker`) under `from`",
    "dtype": "set `dtype` beside it",
    "seed": "set `seed` beside it: each draw has a seed of its own",
    "tensor_parallel_size": "set `tensor_parallel` in the profile, which reserves the GPUs",
    "data_parallel_size": "set `max_workers` in the profile: each worker has an engine of its own",
    "trust_remote_code": "code in a model's folder is not run",
    "hf_token": "a key does not belong in a recipe; set HF_TOKEN in the environment",
    "generation_config": CHANGES_LAW,
    "override_generation_config": CHANGES_LAW,
    "logits_processors": CHANGES_LAW,
    "watermark_config": CHANGES_LAW,
    **dict.fromkeys(
        ("code_revision", "ec_manager_config", "ec_transfer_config", "io_processor_plugin", "kv_transfer_config",
         "log_config_file", "model_class_overrides", "reasoning_parser_plugin", "scheduler_cls", "worker_cls",
         "worker_extension_cls"), RUNS_CODE,
    ),
    **dict.fromkeys(
        ("convert", "disable_log_stats", "enable_lora", "logprobs_mode", "max_lora_rank", "revision", "runner",
         "skip_tokenizer_init", "tokenizer", "tokenizer_mode", "tokenizer_revision"), STARTED_WITH,
    ),
}  # fmt: skip


# That are read here too, by the plan's estimates of memory and by the engine.
COUNTS = ("kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size")
# Of what vLLM imports by a name with dots; and formats of weights that are not those of the folder's safetensors.
NAMES_CODE = ("compilation_config", "distributed_executor_backend", "quantization", "speculative_config")
QUALIFIED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
RANDOM_OR_PICKLED = {
    "dummy": "weights would be random numbers",
    **dict.fromkeys(("pt", "npcache", "mistral"), "weights are read from the folder's safetensors, without pickle"),
}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in the values of an option."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


@lru_cache
def vllm_arguments() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, read from its source: to import it takes seconds and torch.

    Empty where vLLM is not installed: the machine that plans need not be the one that samples. There, vLLM itself
    refuses an unknown name before anything is drawn.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse((Path(spec.origin).parent / "engine/arg_utils.py").read_text(encoding="utf-8"))
    return frozenset(
        item.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    )


def _check(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the options without those that are null, which is vLLM's default."""
    names = vllm_arguments()
    for name, value in (options or {}).items():
        if name in REFUSED:
            raise ValueError(f"{name} cannot be set here: {REFUSED[name]}")
        if names and name not in names:
            raise ValueError(f"{name} is no engine argument of the installed vLLM; {nearest(name, sorted(names))}")
        if name in COUNTS and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        is_share = type(value) in (int, float) and 0 < value <= 1
        if name == "gpu_memory_utilization" and value is not None and not is_share:
            raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")
        for text in _texts(value) if name == "load_format" else ():
            if text in RANDOM_OR_PICKLED:
                raise ValueError(f"load_format {text}: {RANDOM_OR_PICKLED[text]}; unset it")
        if name in NAMES_CODE and any(QUALIFIED.fullmatch(text) for text in _texts(value)):
            raise ValueError(f"{name} cannot name a class or function here: {RUNS_CODE}")
        if name == "speculative_config" and "synthetic" in str(value):
            raise ValueError("speculative_config: synthetic rejection accepts tokens that the policy would not draw")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold what JSON has, for vLLM reads it as such: {error}") from None
    return {name: value for name, value in (options or {}).items() if value is not None} or None


def _hint(name: str, value: Any) -> str:
    """Return where an argument of vLLM's engine goes that is written as an option of a step."""
    if name in REFUSED:
        return f"of vLLM's arguments it cannot be set here: {REFUSED[name]}"
    if name in vllm_arguments() | SAME_NETWORK:
        return (
            f"it is an argument of vLLM's engine: write `engine_options: {{{name}: {json.dumps(value, default=str)}}}`"
        )
    return ""


EngineOptions = Annotated[
    dict[str, Any] | None, AfterValidator(_check), ExecutionEntries(EXECUTION_OPTIONS), EntryHint(_hint)
]


def cpu_cache_gib() -> float:
    """Return the GiB of the KV cache on a CPU: what the environment says, or ours."""
    try:
        return float(os.environ.get(CPU_CACHE, CPU_CACHE_GIB))
    except ValueError:  # which vLLM reports
        return float(CPU_CACHE_GIB)


def engine_problems(engine: str, options: Mapping[str, Any] | None) -> list[str]:
    """Return at plan time why an engine cannot start, or takes no such options."""
    problems = endpoint_problems("engine") if engine == "endpoint" else []
    if options and engine == "endpoint":
        problems.append("engine_options: they are the server's own; start it with them, and unset them here")
    elif options and engine != "vllm":
        problems.append(
            f"engine_options: they are vLLM's, and the engine is {engine}; unset them, or set `engine: vllm`"
        )
    return problems


def is_policy_itself(options: Mapping[str, Any] | None) -> bool:
    """Return whether an engine with these options computes the network of the policy's folder, but for rounding."""
    return (options or {}).keys() <= SAME_NETWORK


def length_limit(length: int, options: Mapping[str, Any] | None) -> int:
    """Return the longest sequence that the engine takes of a model with a context of `length`."""
    return min(length, (options or {}).get("max_model_len", length))

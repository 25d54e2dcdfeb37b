"""Memory of an engine: weights in its dtype, the KV cache, and what a step passes through a layer."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import InputStep
from pipeline.costs import GIB, Change, Device, Need
from stages.model_config import planned_context
from stages.network.memory import BF16, FP32, NetworkShape, planned_shape
from stages.sampling.engines.options import CPU_STEP_TOKENS, MAX_SEQUENCES, cpu_cache_gib, length_limit, name_of

# Tokens that vLLM puts through a network at once on a GPU, unless max_num_batched_tokens says otherwise: on one of at
# least so many GiB (but on an A100, which is counted as the others), and below.
GPU_STEP_TOKENS = {70: 16_384, 0: 8_192}
GPU_SHARE = 0.92  # of a GPU's memory that vLLM takes, unless gpu_memory_utilization says otherwise
ROWS = 256  # draws at once of the engine transformers


def sampling_need(
    options: Mapping[str, Any], policy: InputStep | None, prompt_tokens: int, device: Device
) -> Need | None:
    """Return the memory of an engine on each of its devices: what it cannot do without.

    On a GPU, vLLM fills what it is given (`gpu_memory_utilization`) with its KV cache; counted is the cache of one
    sequence of the longest kind, below which it refuses to start. On a CPU the cache is of a fixed size.
    """
    if name_of(options["engine"]) not in ("vllm", "transformers"):  # a server has its own memory
        return None
    shape = planned_shape(policy)
    if shape is None:
        return None
    extra = options.get("engine_options") or {}
    size = BF16 if options["dtype"] == "bfloat16" else FP32
    weights = size * shape.parameters / device.count
    if name_of(options["engine"]) == "transformers":
        tokens = ROWS * (prompt_tokens + int(options["max_tokens"]))
        parts = {
            "weights": weights,
            "activations": ROWS * prompt_tokens * shape.passing_per_token() * size / FP32,
            "logits": 4.0 * FP32 * ROWS * shape.vocabulary,
            "KV cache": tokens * cache_per_token(shape, size),
        }
        return Need(shape.parameters, options["dtype"], parts)
    length = length_limit(planned_context(policy) or 2 * int(options["max_tokens"]), extra)
    on_cpu = device.kind == "cpu"
    installed = (device.memory or 0.0) / GIB
    of_gpu = next(tokens for least, tokens in GPU_STEP_TOKENS.items() if installed >= least)
    step_tokens = max(CPU_STEP_TOKENS, length) if on_cpu else of_gpu
    step_tokens = int(extra.get("max_num_batched_tokens", step_tokens))
    cache = float(length) * cache_per_token(shape, size) / device.count
    if on_cpu:
        cache = float(extra.get("kv_cache_memory_bytes") or cpu_cache_gib() * GIB)
    sequences = int(extra.get("max_num_seqs", MAX_SEQUENCES))
    parts = {
        "weights": weights,
        "activations": step_tokens * shape.passing_per_token() * size / FP32 / device.count,
        "logits": 2.0 * FP32 * sequences * shape.vocabulary / device.count,
        "KV cache": cache,
    }
    if not on_cpu:
        parts["left free"] = sum(parts.values()) * (1 / float(extra.get("gpu_memory_utilization", GPU_SHARE)) - 1)
    return Need(shape.parameters, options["dtype"], parts)


def draws_need(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> Need | None:
    """Return the memory of the engine of stage `sample`."""
    prompts = inputs.get("prompts")
    return sampling_need(options, inputs.get("policy"), prompts.options.get("max_tokens", 0) if prompts else 0, device)


def cache_per_token(shape: NetworkShape, size: int) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return 2 * shape.layers * shape.keys * size


def engine_gpus(options: Mapping[str, Any], device: Device) -> int:
    """Return on how many GPUs an engine computes: vLLM on `tensor_parallel` times `pipeline_parallel_size`."""
    if name_of(options["engine"]) != "vllm":
        return 1
    return device.count * int((options.get("engine_options") or {}).get("pipeline_parallel_size") or 1)


def less_engine_memory(options: Mapping[str, Any], device: Device) -> Iterator[Change]:
    """Yield changes that take less memory: a shorter context, more GPUs, half the precision."""
    extra = options.get("engine_options") or {}
    halves: list[tuple[str, dict[str, Any]]] = [("", dict(options))]
    if name_of(options["engine"]) == "vllm":
        for length in (32_768, 16_384, 8192, 4096, 2048):
            if 2 * int(options["max_tokens"]) <= length < extra.get("max_model_len", 1 << 30):
                shorter = dict(extra) | {"max_model_len": length}
                setting = f"`engine_options: {{max_model_len: {length}}}`"
                halves.append((setting, dict(options) | {"engine_options": shorter}))
        if device.kind == "cpu":
            fewer = dict(extra) | {"max_num_batched_tokens": 2048, "max_model_len": 2048}
            halves.append((
                "`engine_options: {max_model_len: 2048, max_num_batched_tokens: 2048}`",
                dict(options) | {"engine_options": fewer},
            ))  # fmt: skip
    yield from ((setting, changed, device) for setting, changed in halves if setting)
    if options["dtype"] == "float32":
        halved = [(" and ".join(filter(None, ("`dtype: bfloat16`", setting))), changed) for setting, changed in halves]
        yield from ((setting, changed | {"dtype": "bfloat16"}, device) for setting, changed in halved)
    if name_of(options["engine"]) == "vllm" and device.kind == "cuda":
        for count in (2, 4, 8, 16):
            if count > device.count:
                wider = Device(device.kind, device.memory, count)
                yield f"`gpus: {count}` and `tensor_parallel: {count}` in the profile", dict(options), wider

"""Devices that vLLM's kernels of attention run a model on: what a plan can know without importing vLLM or torch."""

import ast
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline import Bound, InputStep
from pipeline.costs import Device
from stages.model_config import planned_head_size
from stages.sampling.engines.options import name_of

CPU_BACKEND = "v1/attention/backends/cpu_attn.py"
UNLISTED = {48}  # head sizes that the kernels of vLLM 0.32 take, and its list leaves out: each size to 600 was called


@lru_cache
def cpu_head_sizes() -> frozenset[int]:
    """Return the sizes of a head for which vLLM has CPU kernels, read from its source; empty if it names none.

    vLLM itself looks at the list only on GPUs, where FlexAttention takes what no other backend does. On a CPU it starts
    with any size, and ends in its first step. Empty too where it is not installed: the machine that plans need not be
    the one that samples.
    """
    spec = find_spec("vllm")
    file = Path(spec.origin).parent / CPU_BACKEND if spec and spec.origin else None
    if file is None or not file.is_file():
        return frozenset()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            lists = [item.value for item in ast.walk(node) if isinstance(item, ast.Return) and item.value]
            constants = [item for value in lists for item in ast.walk(value) if isinstance(item, ast.Constant)]
            sizes = {item.value for item in constants if isinstance(item.value, int)}
            return frozenset(sizes and sizes | UNLISTED)
    return frozenset()


def vllm_problem(engine: str | Bound, model: InputStep | None, device: Device) -> str:
    """Return why vLLM cannot run the model of a step on a device, and the cure; "" if it can, or is not the engine."""
    size, sizes = planned_head_size(model), cpu_head_sizes()
    if name_of(engine) != "vllm" or device.kind != "cpu" or size is None or not sizes or size in sizes:
        return ""
    return (
        f"engine: on a CPU, vLLM has no attention for heads of {size} numbers (it has "
        f"{', '.join(map(str, sorted(sizes)))}), which is what the model has; set `engine: transformers`"
    )


def draws_device_problem(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> str:
    """Return why a device cannot run the engine of stage `sample`, and the cure; "" if it can."""
    return vllm_problem(options["engine"], inputs.get("policy"), device)

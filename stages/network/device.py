"""Numerics of a device, in one place: what is computed in which precision, how much of the head at once, attention.

Nothing here depends on what else a device holds at the moment, only on the device: a run that goes on where it was
interrupted must compute what it would have computed.
"""

import gc
import os
import subprocess
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pipeline.costs import GIB, Device
from pipeline.resources import Resources, current_resources
from schemas import MachineError, WinnowError, WinnowWarning
from stages.limits import KEPT_FRACTION, LOGITS_AT_ONCE

CPU = torch.device("cpu")
THREADS = torch.get_num_threads()  # of this process; scoring lowers the number that is in force
# How far the trial of a network at its load may be off, as a fraction of the largest number: fp32 added up in another
# order; in bfloat16, of which random networks of eight layers differ by 1.3e-2 (tests/bench/h100.md), roundings.
TRIAL_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# How far the loss of step 0 may be off that of policy = reference: on average, and of a pair on average.
REFERENCE_TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}
FUSED_NUMBERS = 1 << 24  # below, a kernel is not worth being compiled
FLASH_HEAD_SIZE = 256  # of torch's flash attention at most, in multiples of 8


def default_device() -> torch.device:
    """Return where networks go: to the first GPU that this process sees, or the CPU.

    That is the CPU, too, for a worker whose profile gives it no GPU. Raises WinnowError where a worker has reserved
    more GPUs than one network is computed on: the others would be idle, and nobody else could have them.
    """
    resources = current_resources()
    if (resources.gpus or 0) > 1:
        raise WinnowError(
            f"profile: a worker reserves gpus: {resources.gpus:g}, and torch computes a network on one: set `gpus: 1`, "
            "and `max_workers` to as many workers as there are GPUs (of training, `world_size`)"
        )
    return torch.device("cuda" if resources.gpus != 0 and torch.cuda.is_available() else "cpu")


def free_memory(device: torch.device) -> tuple[float, float] | None:
    """Return the bytes of a GPU that are free, and all of them; None for a CPU, whose memory the system lends out."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return float(free), float(total)


def check_free_memory(needed: float, device: torch.device, what: str, cure: str) -> None:
    """Raise MachineError if a device lacks free memory for what is started next, with who holds it and the cure.

    What this process holds without using it is freed first.
    """
    memory = free_memory(device)
    if memory is None or memory[0] >= needed:
        return
    release(device)
    if (memory := free_memory(device)) is None or memory[0] >= needed:
        return
    free, total = memory
    raise MachineError(
        f"{what} takes {needed / GIB:.2f} GiB, and {device} has {free / GIB:.2f} of its {total / GIB:.2f} GiB free; "
        f"it is held by {gpu_holders() or 'a process that nvidia-smi does not name'}; end what holds it, or {cure}"
    )


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more, and what torch keeps of a GPU's memory for itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device had no memory left: a GPU has a class for it, a CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def gpu_holders() -> str:
    """Return which processes hold memory of the GPUs that this one sees, as nvidia-smi knows them; "" if none."""
    rows = nvidia_smi("--query-compute-apps=pid,used_memory,process_name")
    names = []
    for pid, used, name in (row for row in rows if len(row) == 3):
        size = f"{float(used) / 1024:.1f} GiB" if used.isdecimal() else "of unknown size"
        names.append("this process" if pid == str(os.getpid()) else f"process {pid} ({Path(name).name})")
        names[-1] += f", {size}"
    return "; ".join(names)


def nvidia_smi(query: str) -> list[list[str]]:
    """Return the answer of nvidia-smi to a query, of the GPUs that this process sees, as rows; empty without an answer.

    Unlike torch, it leaves no context of this process on them.
    """
    ids = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *([f"--id={ids}"] if ids else [])]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def say_precision() -> None:
    """Let fp32 be fp32, and sums of bfloat16 products be in fp32, whatever the environment says.

    NVIDIA's containers allow TF32 (10 bits of a number), with which the trial of a network is off by 6.5e-4 and no
    prompt would be shared; torch itself allows cuBLAS to add parts of a product up in bfloat16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    """Return torch's autocast to bfloat16, switched off for float32.

    It remembers the weights that it has rounded until the pass ends, except where ranks share a network: each rank
    would hold a copy of all layers, which it gathers one after the other.
    """
    remember = not torch.distributed.is_initialized()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=remember)


def logits_at_once(device: torch.device) -> int:
    """Return how many logits the head computes at a time."""
    return LOGITS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]


def kept_bytes(device: torch.device) -> int:
    """Return how many bytes of probabilities a forward pass may keep for its backward pass; beyond, they are redone."""
    return int(torch.cuda.get_device_properties(device).total_memory * KEPT_FRACTION) if device.type == "cuda" else 0


def prompts_per_call(device: torch.device) -> int:
    """Return the responses of how many prompts are scored in one call, by a ranker's network.

    On a GPU as many as fill some passes, whose last one is seldom full. A CPU gains nothing from full passes, and with
    one prompt a number depends on no other.
    """
    return 1 if device.type == "cpu" else 8


def memory_of(device: torch.device, resources: Resources) -> Device:
    """Return a device with its memory: as a profile says, else what it has (of a CPU, the machine's RAM)."""
    if device.type == "cpu":
        installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Device("cpu", resources.memory * GIB if resources.memory else installed)
    installed = float(torch.cuda.get_device_properties(device).total_memory)
    return Device("cuda", resources.gpu_memory * GIB if resources.gpu_memory else installed)


def has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether torch's flash attention computes heads of this size in this precision on the device."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_size <= FLASH_HEAD_SIZE
        and head_size % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile has what it needs for a device: on a GPU, Triton."""
    return device.type == "cpu" or find_spec("triton") is not None


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def fused(function: Callable[..., Any], numbers: int, device: torch.device) -> Callable[..., Any]:
    """Return a function of so many numbers as few kernels, where that pays: on a GPU, for many, with Triton.

    torch.compile reads the numbers twice where the function as it is written reads and writes them eight times. If it
    cannot compile (Triton wants a C compiler), a warning says so, and the function goes on as it is written.
    """
    if device.type != "cuda" or numbers < FUSED_NUMBERS or not can_compile(device):
        return function

    def call(*args: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return _compiled.setdefault(function, torch.compile(function))(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many kinds
            reason = (str(error).splitlines() or [""])[0]
            message = f"torch.compile fails here ({type(error).__name__}: {reason}): slower kernels take its place"
            warnings.warn(message, WinnowWarning, stacklevel=2)
            _compiled[function] = function
            return function(*args)

    return call

"""Numerics of a device, in one place: what is computed in which precision, how much of the head at once, attention.

Nothing here depends on what else a device holds at the moment, only on the device: a run that goes on where it was
interrupted must compute what it would have computed.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch

from pipeline.costs import GIB, Device
from pipeline.resources import Resources
from schemas import WinnowWarning
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
    """Return where networks go: to the first GPU that this process sees, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say_precision() -> None:
    """Let fp32 be fp32, and sums of bfloat16 products be in fp32, whatever the environment says.

    NVIDIA's containers allow TF32 (10 bits of a number), with which the trial of a network is off by 6.5e-4 and no
    prompt would be shared; torch itself allows cuBLAS to add parts of a product up in bfloat16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    """Return torch's autocast to bfloat16, switched off for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def logits_at_once(device: torch.device) -> int:
    """Return how many logits the head computes at a time."""
    return LOGITS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]


def kept_bytes(device: torch.device) -> int:
    """Return how many bytes of probabilities a forward pass may keep for its backward pass; beyond, they are redone."""
    return int(torch.cuda.get_device_properties(device).total_memory * KEPT_FRACTION) if device.type == "cuda" else 0


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

"""Heap of a CPU's process: freed blocks go back to the system before a training takes more than it needs.

glibc keeps the blocks that a pass frees, divides them up for smaller ones, and cannot use the pieces again: a LoRA of
26M weights took 1.05 GB where it needs 0.39. To map each large block on its own (MALLOC_MMAP_THRESHOLD_) keeps none,
and costs a third of the time, since the pages of each block are cleared anew.
"""

import ctypes
import resource
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATM = Path("/proc/self/statm")  # pages: of the address space, resident, ...
MARGIN = 1.05  # of what a limit is raised above what is in use: else each layer would trim


@lru_cache
def allocator() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, whose `malloc_trim` gives back the pages of all free blocks; else None."""
    library = ctypes.CDLL(None)
    return library if STATM.exists() and hasattr(library, "malloc_trim") else None


def give_back() -> None:
    """Give the pages of all free blocks back to the system, if the heap is glibc's."""
    if library := allocator():
        library.malloc_trim(0)


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not say so in a file."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize() if STATM.exists() else 0


class HeapLimit:
    """Limit of a training's memory on a CPU, kept to between layers and around the head, forward and backward.

    before: bytes that this process held before it loaded the network; need: those that it may hold beside. Nothing is
    done as long as it holds less; a pass that is in need of more raises the limit.
    """

    def __init__(self, network: "PreTrainedModel", layers: Iterable[Module], before: float, need: float) -> None:
        self.before, self.limit = before, before + need
        self.trims = 0
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, args: self._check_both_ways(args[0] if args else None))
        network.base_model.register_forward_hook(
            lambda _, args, output: self._check_both_ways(getattr(output, "last_hidden_state", None))
        )

    def check(self) -> None:
        """Give free blocks back if this process holds more than the limit."""
        if allocator() is None or resident_bytes() <= self.limit:
            return
        give_back()
        self.trims += 1
        self.limit = max(self.limit, self.before + MARGIN * (resident_bytes() - self.before))

    def _check_both_ways(self, states: Any) -> None:
        """Check now, and when the backward pass has the gradient of these states."""
        self.check()
        if isinstance(states, Tensor) and states.requires_grad:
            states.register_hook(lambda gradient: self.check())

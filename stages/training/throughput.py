"""What a step of training costs. What the machine did, and may do otherwise next time, begins with `speed/`."""

import resource
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.training.data import Group
from stages.training.distributed import Distributed
from stages.training.optimize import SPEED

PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16 flop/s, dense


class TokenCounter:
    """Counts every token that goes through a network, padding too, from the moment that it is made."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.tokens = 0
        self.learnt = 0  # of them, those with gradients
        self._hook = network.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = [*args[:1], kwargs.get("input_ids"), kwargs.get("decoder_input_ids")]
        tokens = sum(each.numel() for each in ids if each is not None)
        self.tokens += tokens
        self.learnt += tokens * torch.is_grad_enabled()

    def close(self) -> None:
        self._hook.remove()


class ThroughputMeter:
    """What each step of a network's training takes, on all ranks together."""

    def __init__(self, network: PreTrainedModel, ranks: Distributed, gradient_checkpointing: bool = False) -> None:
        self.network, self.ranks, self.gradient_checkpointing = network, ranks, gradient_checkpointing
        self.reads = TokenCounter(network)

    def start(self) -> None:
        """A step begins."""
        self._since, self._before = time.perf_counter(), (self.reads.tokens, self.reads.learnt)

    def entry(self, groups: list[Group], tokens_per_pass: int) -> dict[str, float]:
        """What became of a step's groups since `start`.

        `tokens/saved` is against reading prompt and response again for each side of each pair, without padding.
        """
        seconds = time.perf_counter() - self._since
        own = {"read": float(self.reads.tokens - self._before[0]), "learnt": float(self.reads.learnt - self._before[1])}
        read, learnt = self.ranks.total(own).values()
        entry: dict[str, float] = {
            "tokens/read": read,
            "tokens/saved": 1 - read / sum(group.tokens_alone for group in groups),
            "tokens_per_second": read / seconds,
            "peak_memory_gb": self.ranks.most(self._peak_memory() / 1e9),
            "tokens_per_pass": tokens_per_pass,
            "gradient_checkpointing": self.gradient_checkpointing,
            "world_size": self.ranks.of,
        }
        if pairs := sum(len(group.pairs) for group in groups):
            entry["pairs_per_second"] = pairs / seconds
        if peak := self._peak_flops():
            entry["flop_utilisation"] = self.flops(read, learnt) / seconds / peak / self.ranks.of
        return {SPEED + name: float(value) for name, value in entry.items()}

    def flops(self, read: float, learnt: float) -> float:
        """What so many tokens take, `learnt` of them with gradients.

        2 a weight forward, 2 for the gradient of what goes into it, and 2 for its own if it is trained (6 N in
        arXiv:2001.08361, section 2.1); layers that run again go forward twice. Attention is not counted.
        """
        every, trained = (int(self.network.num_parameters(only)) for only in (False, True))
        return 2.0 * every * read + 2.0 * (every + trained + every * self.gradient_checkpointing) * learnt

    def _peak_memory(self) -> int:
        """Bytes that this rank has held at most: of its device since the run began, or of its process."""
        if self.network.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.network.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _peak_flops(self) -> float | None:
        """What the device could do a second in bfloat16, where that is known."""
        if self.network.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.network.device)
        return next((flops for known, flops in PEAK.items() if known in name), None)

"""What a step of training costs. What the machine did, and may do otherwise next time, begins with `speed/`."""

import resource
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.legs import Leg
from stages.optimize import SPEED
from stages.ranks import Ranks
from stages.training_data import Group

PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16 flop/s, dense


class Meter:
    """Counts every token that goes through a network, padding too, from the moment that it is made."""

    def __init__(self, network: PreTrainedModel, ranks: Ranks) -> None:
        self.network, self.ranks = network, ranks
        self.tokens = 0
        self._weights = sum(weight.numel() for weight in network.parameters())
        network.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += (args[0] if args else kwargs["input_ids"]).numel()

    def start(self) -> None:
        """A step begins."""
        self._since, self._before = time.perf_counter(), self.tokens

    def total(self, since: int = 0) -> int:
        """Tokens of all ranks, after the first `since` of each."""
        return round(self.ranks.total({"tokens": float(self.tokens - since)})["tokens"])

    def entry(self, batches: list[tuple[Leg, list[Group]]], micro_tokens: int) -> dict[str, float]:
        """What became of a step's batches since `start`.

        `tokens/saved` is against reading prompt and response again for each side of each pair, without padding.
        """
        seconds, read = time.perf_counter() - self._since, self.total(self._before)
        groups = [group for _, batch in batches for group in batch]
        entry = {
            "tokens/read": float(read),
            "tokens/saved": 1 - read / sum(group.tokens_alone for group in groups),
            f"{SPEED}tokens_per_second": read / seconds,
            f"{SPEED}peak_memory_gb": self._peak_memory() / 1e9,
            f"{SPEED}micro_tokens": float(micro_tokens),
        }
        if pairs := sum(len(group.pairs) for group in groups):
            entry[f"{SPEED}pairs_per_second"] = pairs / seconds
        if peak := self._peak_flops():
            entry[f"{SPEED}flop_utilisation"] = 6 * self._weights * read / seconds / peak / self.ranks.of
        return entry

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

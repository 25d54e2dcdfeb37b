"""Cost of a training step: tokens, time, memory, model flop utilisation. Metrics of the machine begin with `speed/`."""

import resource
import time
from typing import Any

import torch
from torch.distributed import ReduceOp
from transformers import PreTrainedModel

from stages.training.config import SPEED
from stages.training.data import TrainingGroup
from stages.training.distributed import Distributed

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16, dense


class TokenCounter:
    """Counter of all tokens that go through a network, padding included, from its construction on."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.tokens = 0
        self.trained_tokens = 0  # of them, those with gradients
        self._hook = network.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("decoder_input_ids")]
        tokens = sum(ids.numel() for ids in inputs if ids is not None)
        self.tokens += tokens
        self.trained_tokens += tokens * torch.is_grad_enabled()

    def close(self) -> None:
        """Stop counting."""
        self._hook.remove()


class ThroughputMeter:
    """Meter of what each training step takes, over all ranks together."""

    def __init__(self, network: PreTrainedModel, dist: Distributed, gradient_checkpointing: bool = False) -> None:
        self.network, self.dist, self.gradient_checkpointing = network, dist, gradient_checkpointing
        self.counter = TokenCounter(network)

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()
        self._tokens, self._trained_tokens = self.counter.tokens, self.counter.trained_tokens

    def metrics(self, groups: list[TrainingGroup], tokens_per_pass: int) -> dict[str, float]:
        """Return the metrics of a step over these groups since `start`.

        `tokens/saved` is the fraction saved against prompt and response for each side of each pair, without padding.
        `mfu` is measured against bfloat16's peak, on devices whose peak is known.
        """
        seconds = time.perf_counter() - self._start
        counts = [self.counter.tokens - self._tokens, self.counter.trained_tokens - self._trained_tokens]
        forwarded, trained = self.dist.all_reduce_values([*map(float, counts)])
        device = self.network.device
        if device.type == "cuda":
            peak_memory = torch.cuda.max_memory_allocated(device)
            name = torch.cuda.get_device_name(device)
            peak_flops = next((flops for kind, flops in PEAK_FLOPS.items() if kind in name), None)
        else:
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak_flops = None
        metrics: dict[str, float] = {
            "tokens/read": forwarded,
            "tokens/saved": 1 - forwarded / sum(group.tokens_unshared for group in groups),
            "tokens_per_second": forwarded / seconds,
            "peak_memory_gb": self.dist.all_reduce_values([peak_memory / 1e9], ReduceOp.MAX)[0],
            "tokens_per_pass": tokens_per_pass,
            "gradient_checkpointing": self.gradient_checkpointing,
            "world_size": self.dist.world_size,
        }
        if pairs := sum(len(group.pairs) for group in groups):
            metrics["pairs_per_second"] = pairs / seconds
        if peak_flops:
            metrics["mfu"] = self.flops(forwarded, trained) / seconds / peak_flops / self.dist.world_size
        return {SPEED + name: float(value) for name, value in metrics.items()}

    def flops(self, forwarded: float, trained: float) -> float:
        """Return the flop of a forward pass over so many tokens, `trained` of them with gradients.

        2 per weight forward, 2 for the gradient of a layer's input, and 2 for the weight's own if it is trained (6 N in
        arXiv:2001.08361, section 2.1); checkpointed layers go forward twice. Attention is not counted.
        """
        weights, trained_weights = (int(self.network.num_parameters(only)) for only in (False, True))
        again = weights * self.gradient_checkpointing
        return 2.0 * weights * forwarded + 2.0 * (weights + trained_weights + again) * trained

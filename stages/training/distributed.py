"""Processes that train one network together (FSDP2): which micro-batches are whose, and sums over all of them."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

T = TypeVar("T")


class Distributed:
    """This process among those of torch.distributed; alone, rank 0 of 1, and every method does nothing.

    Every rank has all rows in the same order, so it knows without communication what the others do; weights,
    gradients and Adam's moments are each in one place only (FSDP2), but for the layer that is computed.
    """

    def __init__(self) -> None:
        self.world_size = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
        self.rank = torch_dist.get_rank() if torch_dist.is_initialized() else 0

    def shard(self, network: PreTrainedModel, device: torch.device | None = None) -> None:
        """Shard the network layer by layer; weights outside of layers stay together until the end of a step.

        device: where the shards of a network on the meta device will be.
        """
        if self.world_size == 1:
            return
        mesh = init_device_mesh((device or network.device).type, (self.world_size,))
        for layer in [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=mesh)
        # By default a root is not resharded after its forward pass, and checkpoints read its shards.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        # FSDP gathers weights around registered methods alone; our forward passes call the base model and the head.
        network.run = MethodType(lambda _, forward: forward(), network)
        register_fsdp_forward_method(network, "run")

    def run(self, network: PreTrainedModel, forward: Callable[[], T]) -> T:
        """Call `forward` with the weights that it uses gathered: a collective, so all ranks must, equally often."""
        return forward() if self.world_size == 1 else network.run(forward)

    def items_of_this_rank(self, items: list[T]) -> Iterator[T | None]:
        """Yield this rank's items; None where other ranks have one more, so that all yield as many."""
        for n in range(self.rank, -(-len(items) // self.world_size) * self.world_size, self.world_size):
            yield items[n] if n < len(items) else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor)
        return tensor

    def all_reduce_values(self, values: list[float], op: Any = torch_dist.ReduceOp.SUM) -> list[float]:
        """Return the sum (or `op`) of each value over all ranks, in float64."""
        if self.world_size == 1:
            return values
        device = "cuda" if torch_dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        torch_dist.all_reduce(tensor, op)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            torch_dist.barrier()

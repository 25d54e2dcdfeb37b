"""The processes that train one network together, as the loop sees them: who gets what, and what it adds up to."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

T = TypeVar("T")


class Ranks:
    """This process's number, of how many; alone, 0 of 1, and everything below does nothing.

    Every rank has all rows and the same order, so it knows without asking what the others do; weights, gradients
    and Adam's moments are each in one place only (FSDP2), but for the layer at work.
    """

    def __init__(self) -> None:
        self.of = dist.get_world_size() if dist.is_initialized() else 1
        self.number = dist.get_rank() if dist.is_initialized() else 0

    @property
    def first(self) -> bool:
        return self.number == 0

    def shard(self, network: PreTrainedModel) -> None:
        """Layer by layer; what is not in a layer stays together until a step's end."""
        if self.of == 1:
            return
        mesh = init_device_mesh(network.device.type, (self.of,))
        for layer in [each for each in network.modules() if isinstance(each, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # a root would not, and checkpoints read it
        network.run = MethodType(lambda _, work: work(), network)
        register_fsdp_forward_method(network, "run")

    def run(self, network: PreTrainedModel, work: Callable[[], T]) -> T:
        """`work` reads the network: all ranks must, as often as each other."""
        return work() if self.of == 1 else network.run(work)

    def deal(self, passes: list[T]) -> Iterator[tuple[T, float]]:
        """This rank's passes, and 1; where others have one more, one of theirs and 0, so that all do as many."""
        for n in range(self.number, -(-len(passes) // self.of) * self.of, self.of):
            yield (passes[n], 1.0) if n < len(passes) else (passes[0], 0.0)

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks."""
        if self.of == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        sums = sums.to("cuda") if dist.get_backend() == "nccl" else sums
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.of > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a piece; all ranks must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

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


class Distributed:
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

    def deal(self, passes: list[T]) -> Iterator[T | None]:
        """This rank's passes; None where others have one more, so that all do as many."""
        for n in range(self.number, -(-len(passes) // self.of) * self.of, self.of):
            yield passes[n] if n < len(passes) else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.of > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks."""
        return dict(zip(values, self.sum(self._tensor(list(values.values()))).tolist(), strict=True))

    def most(self, value: float) -> float:
        """The largest of all ranks."""
        values = self._tensor([value])
        if self.of > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return float(values)

    def _tensor(self, values: list[float]) -> Tensor:
        """Where the ranks can exchange it."""
        on_gpus = self.of > 1 and dist.get_backend() == "nccl"
        return torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpus else "cpu")

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.of > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a piece; all ranks must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

"""Checkpoints of a training run: written completely or not at all, restored bit for bit, by any number of ranks."""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.context import Mirror
from pipeline.store.storage import make_folder, named, replace, sync, sync_tree
from schemas import WinnowWarning
from stages.training.distributed import Distributed

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, beside its count of steps
CHECKPOINTS = 2  # so that there is one left where the last is incomplete


@dataclass
class TrainState:
    """Progress of a run beside weights and moments: JSON in a checkpoint.

    It does not hold the order of the data, which follows from the seed and the batches taken.
    """

    step: int = 0
    batches_taken: list[int] = field(default_factory=lambda: [0, 0])  # by each term
    excess_losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # each term's last loss minus its optimum
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per step


def trained_weights(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that a run changes, by name: with a LoRA, those of the adapter alone."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


class Checkpoints:
    """Last complete states of a run, in `checkpoint/step-...` of the stage's folder.

    Trained weights and Adam's moments are safetensors, each rank's its shards; the rest is JSON, which lists those
    files with their sizes and is written last.
    """

    def __init__(self, mirror: Mirror, dist: Distributed) -> None:
        self.mirror, self.dist, self.folder = mirror, dist, mirror.here / "checkpoint"
        # Torch warns of a run without other processes, which is what most runs are.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")

    def ran_out_of_memory(self, tokens_per_pass: int) -> bool:
        """Return whether this run, before it was restarted, was out of memory with as many tokens per pass."""
        try:
            return tokens_per_pass >= int((self.folder / "out_of_memory").read_text())
        except (OSError, ValueError):  # there is none, or it was cut off: this run finds out again
            return False

    def note_out_of_memory(self, tokens_per_pass: int) -> None:
        """Record for a restart that so many tokens per pass are too many."""
        replace(self.folder / "out_of_memory", str(tokens_per_pass).encode())
        self.mirror("checkpoint/out_of_memory")

    def save(self, state: TrainState, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of all ranks, and delete all but the last two."""
        scratch = self.folder / ".writing"
        if self.dist.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            make_folder(scratch)
        self.dist.barrier()
        writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        with named(scratch):
            save(_tensors(network, optimizer), storage_writer=writer, no_dist=self.dist.world_size == 1)
        if self.dist.rank == 0:
            files = {file.name: file.stat().st_size for file in scratch.iterdir()}
            (scratch / "state.json").write_text(json.dumps(asdict(state) | {"files": files}))
            target = self.folder / f"step-{state.step:08d}"
            shutil.rmtree(target, ignore_errors=True)  # an incomplete one
            sync_tree(scratch)
            scratch.rename(target)
            sync(self.folder)
            self.mirror(f"checkpoint/{target.name}")
            for old in sorted(self.folder.glob("step-*"))[:-CHECKPOINTS]:
                self.mirror.drop(f"checkpoint/{old.name}")
        self.dist.barrier()

    def restore(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        """Return the state of the newest complete checkpoint, with weights and moments filled in place; else a new one.

        An incomplete checkpoint is passed over with a warning.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                state = json.loads((folder / "state.json").read_text())
                complete = all((folder / name).stat().st_size == size for name, size in state.pop("files").items())
                progress = TrainState(**state)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                complete = False
            if complete:
                break
            message = f"{folder.name}: this checkpoint is incomplete, and the one before it is taken"
            warnings.warn(message, WinnowWarning, stacklevel=2)
        else:
            return TrainState()
        for weight in trained_weights(network).values():  # what Adam makes at its first step, to be filled
            count = torch.zeros((), dtype=torch.float32, device=weight.device)
            optimizer.state[weight] = {"step": count} | {name: torch.zeros_like(weight) for name in MOMENTS}
        with torch.no_grad():
            reader = HuggingFaceStorageReader(str(folder))
            load(_tensors(network, optimizer), storage_reader=reader, no_dist=self.dist.world_size == 1)
        return progress


def _tensors(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and moments by name: the tensors themselves, so that loading fills them."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trained_weights(network).items():
        tensors[f"weights.{name}"] = weight.detach()
        for kind, value in optimizer.state[weight].items():
            tensors[f"moments.{name}.{kind}"] = value
    return tensors

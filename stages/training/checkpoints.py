"""Checkpoints of a training run: written whole or not at all, restored bit for bit, by any number of ranks."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.context import Mirror
from schemas import WinnowWarning
from stages.training.distributed import Distributed

STATE = ("done", "drawn", "gaps", "tokens", "history")
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, beside its count of steps
KEPT = 2  # so that there is one left where the last is torn


class Run(Protocol):
    """What of a trainer makes up its state; the data order follows from its seed and what was drawn."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Distributed
    done: int
    drawn: list[int]
    gaps: list[float]
    tokens: int
    history: list[dict[str, float]]


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that a run moves, by name: with a LoRA, those of the adapter alone."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


class Checkpoints:
    """The last whole states of a run.

    The weights that it moves and Adam's moments are safetensors, each rank's what it holds; the rest is JSON, which
    lists those files and is written last.
    """

    def __init__(self, keep: Mirror) -> None:
        self.keep, self.folder = keep, keep.here / "checkpoint"

    def too_large(self, tokens_per_pass: int) -> bool:
        """Has a run here been out of memory with as many tokens a pass?"""
        note = self.folder / "out_of_memory"
        return note.exists() and tokens_per_pass >= int(note.read_text())

    def remember(self, tokens_per_pass: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "out_of_memory").write_text(str(tokens_per_pass))
        self.keep("checkpoint/out_of_memory")

    def save(self, trainer: Run) -> None:
        scratch = self.folder / ".writing"
        if trainer.ranks.first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        trainer.ranks.wait()
        with _alone_or_not():
            writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
            save(_tensors(trainer), storage_writer=writer, no_dist=trainer.ranks.of == 1)
        if trainer.ranks.first:
            self._seal(scratch, trainer)
        trainer.ranks.wait()

    def _seal(self, scratch: Path, trainer: Run) -> None:
        files = {file.name: file.stat().st_size for file in scratch.iterdir()}
        state = {name: getattr(trainer, name) for name in STATE}
        (scratch / "state.json").write_text(json.dumps(state | {"files": files}))
        target = self.folder / f"step-{trainer.done:08d}"
        shutil.rmtree(target, ignore_errors=True)  # a torn one
        scratch.rename(target)
        self.keep(f"checkpoint/{target.name}")
        for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
            self.keep.drop(f"checkpoint/{old.name}")

    def restore(self, trainer: Run) -> None:
        """Go on from the newest whole state, if there is one; a torn one is passed over with a warning."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            if _is_whole(folder):
                break
            said = f"{folder.name}: this checkpoint is torn, and the one before it is taken"
            warnings.warn(said, WinnowWarning, stacklevel=2)
        else:
            return
        _start_moments(trainer)
        with torch.no_grad(), _alone_or_not():
            reader = HuggingFaceStorageReader(str(folder))
            load(_tensors(trainer), storage_reader=reader, no_dist=trainer.ranks.of == 1)
        state = json.loads((folder / "state.json").read_text())
        for name in STATE:
            setattr(trainer, name, state[name])


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """torch warns of a run without other processes, which is what most runs are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _tensors(trainer: Run) -> dict[str, Tensor]:
    """Weights and moments by name: the very tensors, so that loading fills them."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trained(trainer.network).items():
        tensors[f"weights.{name}"] = weight.detach()
        for kind, value in trainer.optimizer.state[weight].items():
            tensors[f"moments.{name}.{kind}"] = value
    return tensors


def _start_moments(trainer: Run) -> None:
    """What Adam makes at its first step, to be filled."""
    for weight in trained(trainer.network).values():
        count = torch.zeros((), dtype=torch.float32, device=weight.device)
        trainer.optimizer.state[weight] = {"step": count} | {kind: torch.zeros_like(weight) for kind in MOMENTS}

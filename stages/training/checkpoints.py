"""Checkpoints of a training run: written completely or not at all, restored bit for bit, by any number of ranks."""

import json
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.context import Mirror
from pipeline.store.storage import make_folder, named, replace, sync, sync_tree
from pipeline.store.weights import damage
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
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per step, and one per evaluation
    # With `keep: best`: the best evaluation so far, the tokens until then, and its proxy win rate.
    best_step: int = 0
    best_tokens: int = 0
    best_win: float = -1.0


STATE = TypeAdapter(TrainState)


def trained_weights(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that a run changes, by name: with a LoRA, those of the adapter alone."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


class Checkpoints:
    """Last complete states of a run, in `checkpoint/step-...` of the stage's folder; best weights in `best-...` there.

    Trained weights and Adam's moments are safetensors, each rank's its shards; the rest is JSON, which lists those
    files with their sizes and is written last. The best weights are there before a state that names them, and are
    dropped after the last one that does.
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
        """Write a checkpoint of all ranks; delete all but the last two, and best weights that none of these names."""
        self._write(f"step-{state.step:08d}", _tensors(network, optimizer), asdict(state))
        if self.dist.rank == 0:
            steps = sorted(self.folder.glob("step-*"))
            best = {f"best-{(_read_state(step) or {}).get('best_step', 0):08d}" for step in steps[-CHECKPOINTS:]}
            olds = [old for old in sorted(self.folder.glob("best-*")) if old.name not in best]
            for old in (*steps[:-CHECKPOINTS], *olds):
                self.mirror.drop(f"checkpoint/{old.name}")
        self.dist.barrier()

    def save_best(self, step: int, network: torch.nn.Module) -> None:
        """Write the trained weights as those of the best evaluation so far, before the checkpoint that says so."""
        self._write(f"best-{step:08d}", _weights(network), {})

    def load_best(self, step: int, network: torch.nn.Module) -> None:
        """Fill the network with the weights that `save_best` wrote after this step."""
        with torch.no_grad():
            reader = HuggingFaceStorageReader(str(self.folder / f"best-{step:08d}"))
            load(_weights(network), storage_reader=reader, no_dist=self.dist.world_size == 1)

    def _write(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        scratch = self.folder / ".writing"
        if self.dist.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            make_folder(scratch)
        self.dist.barrier()
        writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        with named(scratch):
            save(tensors, storage_writer=writer, no_dist=self.dist.world_size == 1)
        if self.dist.rank == 0:
            files = {file.name: file.stat().st_size for file in scratch.iterdir()}
            (scratch / "state.json").write_text(json.dumps(record | {"files": files}))
            target = self.folder / name
            shutil.rmtree(target, ignore_errors=True)  # an incomplete one
            sync_tree(scratch)
            scratch.rename(target)
            sync(self.folder)
            self.mirror(f"checkpoint/{name}")
        self.dist.barrier()

    def restore(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        """Return the state of the newest complete checkpoint, with weights and moments filled in place; else a new one.

        An incomplete checkpoint, or one whose best weights are, is passed over with a warning.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            record, state = _read_state(folder), None
            with suppress(TypeError, ValidationError):  # fields of another version, or of another type
                if record:
                    STATE.validate_json(json.dumps(record), strict=True)
                    state = TrainState(**record)
            if state and (not state.best_step or _read_state(self.folder / f"best-{state.best_step:08d}") is not None):
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
        return state


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Return what was written beside the tensors of a folder; None if one of its files is missing, cut or emptied.

    A power cut may leave zeros in a file's place, as long as it was, where the disk does not sync.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "state.json").read_text())
        complete = all((folder / name).stat().st_size == size for name, size in record.pop("files").items())
        complete = complete and not any(damage(file) for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if complete else None


def _weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return trained weights by name: the tensors themselves, so that loading fills them."""
    return {f"weights.{name}": weight.detach() for name, weight in trained_weights(network).items()}


def _tensors(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and moments, as `_weights` does."""
    tensors = _weights(network)
    for name, weight in trained_weights(network).items():
        for kind, value in optimizer.state[weight].items():
            tensors[f"moments.{name}.{kind}"] = value
    return tensors

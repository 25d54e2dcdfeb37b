"""Checkpoints of a training run: written whole or not at all, restored bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Run(Protocol):
    """What of a trainer makes up its state; the data order follows from its seed and what was drawn."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    done: int
    drawn: list[int]
    gaps: list[float]
    tokens: int
    history: list[dict[str, float]]


STATE = ("done", "drawn", "gaps", "tokens", "history")


class Checkpoints:
    """The last whole state of a run: weights and Adam's moments as safetensors, the rest as JSON, written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Run) -> None:
        scratch = self.folder / ".writing"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        weights = {name: value.contiguous() for name, value in trainer.network.named_parameters()}
        save_file(weights, scratch / "weights.safetensors")
        save_file(_moments(trainer.optimizer), scratch / "moments.safetensors")
        (scratch / "state.json").write_text(json.dumps({name: getattr(trainer, name) for name in STATE}))
        scratch.rename(self.folder / f"step-{trainer.done:08d}")
        for old in self._whole()[:-1]:
            shutil.rmtree(old)

    def restore(self, trainer: Run) -> None:
        if not self._whole():
            return
        folder = self._whole()[-1]
        state = json.loads((folder / "state.json").read_text())
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, value in trainer.network.named_parameters():
                value.copy_(weights[name])
        _set_moments(trainer.optimizer, load_file(folder / "moments.safetensors"))
        for name in STATE:
            setattr(trainer, name, state[name])

    def _whole(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.contiguous() for index, state in states.items() for name, value in state.items()}


def _set_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        index, _, moment = name.partition(".")
        state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

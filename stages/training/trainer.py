"""The loop of `optimize`: one network, one or two objectives, steps, checkpoints. It knows no method's name."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipeline import Bound
from pipeline.context import Mirror, ProgressCallback
from schemas import Model, WinnowError, WinnowWarning
from stages.network.load import checkpoint_layers, load_network, save_network
from stages.training.checkpoints import Checkpoints, trained
from stages.training.data import Group, groups_of
from stages.training.distributed import Distributed, whole
from stages.training.mixing import MixState
from stages.training.terms import ObjectiveTerm
from stages.training.throughput import ThroughputMeter

LEGS = ("", "imitation/")  # what their metrics' names begin with
Side = tuple[pa.Table | None, pa.Table | None, Bound, float]  # rows, held-out rows, objective, nll_weight


def train(
    init: Model,
    sides: list[Side],
    keep: Mirror,
    tell: ProgressCallback,
    *,
    reference: str,
    of_leg: dict[str, Any],
    of_run: dict[str, Any],
    seed: int,
    checkpoint_every: int,
) -> dict[str, Any]:
    """A whole run, by this process or by each of its ranks: `model` in `keep.here`, and what became of it."""
    ranks = Distributed()
    legs, held = [], {}
    for n, (rows, held_rows, loss, weight) in enumerate(sides):
        if rows is not None:
            groups = groups_of(rows, loss, weight, init, of_leg["dtype"], reference)
            legs.append(ObjectiveTerm(groups, loss, weight, seed=seed, number=n, ranks=ranks, **of_leg))
        if held_rows is not None:
            held[n] = groups_of(held_rows, loss, weight, init, of_leg["dtype"], reference)
    check_ranks(ranks.of, legs)
    trainer = Trainer(init=init, legs=legs, seed=seed, ranks=ranks, **of_run)
    trainer.fit(Checkpoints(keep), tell, checkpoint_every)
    for n, groups in held.items():
        entry = legs[n].evaluate(trainer.network, groups)
        prefix = f"heldout/{LEGS[n]}"
        trainer.history.append({"step": float(trainer.done)} | {prefix + name: v for name, v in entry.items()})
    weights = trainer.save(keep.here / "model")
    return {"parameters": weights, "steps": trainer.done, "tokens": trainer.tokens, "history": trainer.history}


def check_ranks(ranks: int, legs: list[ObjectiveTerm]) -> None:
    """They share a step's groups: where there are fewer, some would only wait."""
    for leg in legs:
        groups = int(median(len(leg.batch(n)) for n in range(leg.steps(1))))
        if groups < ranks:
            raise WinnowError(
                f"optimize.world_size: {ranks}, and half of the steps have {groups} prompts or fewer, which are what "
                f"ranks share; set world_size to {groups}, or raise batch_size"
            )


@dataclass
class Trainer:
    """One run. `history` has one entry a step; `done` counts steps, `drawn` the batches that each leg has taken.

    legs: the objective's, and, where a `mix` says how they share the steps, that of the demonstrations.
    `gaps` are the legs' last known losses minus `optima`, which only a mix that watches them needs.
    """

    init: Model
    adapt: Callable[[PreTrainedModel], None] | None  # what is put into the network: a LoRA, which is trained alone
    gradient_checkpointing: bool
    legs: list[ObjectiveTerm]
    mix: Bound | None
    optima: list[float]
    gated: bool  # does the first objective's cached reference belong to `init`, which step 0 must show?
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    epochs: int
    max_grad_norm: float
    weight_decay: float
    seed: int
    ranks: Distributed
    network: PreTrainedModel = field(init=False)
    meter: ThroughputMeter = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    parameters: list[torch.nn.Parameter] = field(init=False)  # those that are trained
    optimizer: torch.optim.Optimizer = field(init=False)
    done: int = 0
    drawn: list[int] = field(default_factory=lambda: [0, 0])
    gaps: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tokens: int = 0
    halved: bool = False  # has `tokens_per_pass` been halved, for want of memory?
    history: list[dict[str, float]] = field(default_factory=list)

    def fit(self, checkpoints: Checkpoints, tell: ProgressCallback, checkpoint_every: int) -> None:
        """Train `network`. Interrupted work goes on from the last of the checkpoints."""
        self.checkpoints = checkpoints
        if self.checkpoints.too_large(self.legs[0].tokens_per_pass):
            self._halve()
        self.network = load_network(self.init, train=True, adapt=self.adapt)
        if self.gradient_checkpointing:
            checkpoint_layers(self.network)
        self.ranks.shard(self.network)
        self.parameters = list(trained(self.network).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        steps = self.legs[0].steps(self.epochs)
        self.checkpoints.restore(self)
        self.meter = ThroughputMeter(self.network, self.ranks, self.gradient_checkpointing)
        if self.done == 0:
            self._begin()
        while self.done < steps:
            self._step(steps)
            tell(self.done, steps, "steps")
            if self.done % checkpoint_every == 0 and self.done < steps:
                self.checkpoints.save(self)

    def save(self, folder: Path) -> int:
        """The trained policy, by the first rank, which then holds all of it; the number of its weights."""
        if self.ranks.of == 1:
            save_network(self.network, self.init, folder)
            return int(self.network.num_parameters())
        pieces = {}
        for name, value in self.network.named_parameters():
            piece = whole(value.detach())
            if self.ranks.first:
                pieces[name] = piece.cpu()
        size = 0
        if self.ranks.first:
            network = load_network(self.init, train=True, adapt=self.adapt)
            with torch.no_grad():
                for name, value in network.named_parameters():
                    value.copy_(pieces[name])
            save_network(network, self.init, folder)
            size = int(network.num_parameters())
        self.ranks.wait()
        return size

    def _begin(self) -> None:
        if self.gated:
            self.legs[0].gate(self.network)
        if self.watches:
            for n in range(len(self.legs)):
                self._look(n)

    @property
    def watches(self) -> bool:
        return self.mix is not None and bool(self.mix.metadata["watches"])

    def _step(self, steps: int) -> None:
        for setting in self.optimizer.param_groups:
            setting["lr"] = self.learning_rate * self._scale(self.done, steps)
        weights = self._weights(steps)
        self.meter.start()
        entry = self._in_memory(weights)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        entry |= {"grad_norm": float(whole(norm)), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if len(weights) > 1:
            entry["preference_weight"] = weights[0]
        self._check_finite(entry, weights)
        groups = [group for _, batch in self._batches(weights) for group in batch]
        entry |= self.meter.entry(groups, self.legs[0].tokens_per_pass)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.tokens += sum(group.tokens for group in groups)
        self.drawn = [drawn + (weight > 0) for drawn, weight in zip(self.drawn, [*weights, 0.0], strict=False)]
        self.history.append({"step": float(self.done)} | entry)
        if self.watches and self.done % self.mix.options["refresh"] == 0:  # type: ignore[union-attr]
            for n, weight in enumerate(weights):
                if not weight:
                    self._look(n)

    def _weights(self, steps: int) -> list[float]:
        if self.mix is None:
            return [1.0]
        preference = self.mix(MixState(self.done, steps, self.seed, *self.gaps))
        return [preference, 1.0 - preference]

    def _in_memory(self, weights: list[float]) -> dict[str, float]:
        """All gradients of a step. Out of memory once, it goes on with half of the tokens a pass; twice, it stops."""
        try:
            return self._gradients(weights)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        if self.halved:
            halved = self.legs[0].tokens_per_pass
            fits = min(max(leg.largest for leg in self.legs) or halved, halved // 2)
            raise WinnowError(
                f"step {self.done}: out of memory again, with tokens_per_pass halved to {halved}; "
                f"set `tokens_per_pass` to {fits}, or `gradient_checkpointing: true` if one row alone is too long"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoints.remember(self.legs[0].tokens_per_pass)
        self._halve()
        if self.ranks.of > 1:
            raise RuntimeError("out of memory")  # the others wait for this rank: all start again, with half
        return self._in_memory(weights)

    def _halve(self) -> None:
        for leg in self.legs:
            leg.tokens_per_pass = max(1, leg.tokens_per_pass // 2)
        self.halved = True
        said = f"out of memory: tokens_per_pass is {self.legs[0].tokens_per_pass} from now on"
        warnings.warn(said, WinnowWarning, stacklevel=3)

    def _gradients(self, weights: list[float]) -> dict[str, float]:
        entry: dict[str, float] = {}
        for n, weight in enumerate(weights):
            if weight:
                entry |= {LEGS[n] + name: value for name, value in self._backward(n, weight).items()}
        return entry

    def _backward(self, n: int, weight: float) -> dict[str, float]:
        """Gradients of one leg's loss on its next batch; its metrics."""
        leg = self.legs[n]
        batch = leg.batch(self.drawn[n])
        panel = leg.panel(batch)
        for loss in leg.losses(self.network, batch, panel):
            (weight * loss * self.ranks.of).backward()  # gradients of ranks are averaged
        entry = panel.entry()
        self.gaps[n] = entry["loss"] - self.optima[n]
        return entry

    def _look(self, n: int) -> None:
        """What the leg's loss is by now, on the batch that it would take next."""
        leg = self.legs[n]
        batch = leg.batch(self.drawn[n])
        self.gaps[n] = leg.evaluate(self.network, batch)["loss"] - self.optima[n]

    def _check_finite(self, entry: dict[str, float], weights: list[float]) -> None:
        losses = [entry[prefix + "loss"] for prefix, weight in zip(LEGS, weights, strict=False) if weight]
        if all(map(math.isfinite, [*losses, entry["grad_norm"]])):
            return
        rows = "; ".join(leg.culprits(self.network, batch) for leg, batch in self._batches(weights))
        raise WinnowError(
            f"step {self.done}: the loss or its gradient is not finite; rows (prompt/candidate): {rows}; "
            "try a lower learning_rate, or look at these rows in the store"
        )

    def _batches(self, weights: list[float]) -> list[tuple[ObjectiveTerm, list[Group]]]:
        """The legs that this step takes, and what of."""
        each = zip(self.legs, self.drawn, weights, strict=False)
        return [(leg, leg.batch(n)) for leg, n, weight in each if weight]

    def _scale(self, step: int, steps: int) -> float:
        """Linear warm-up, then constant, linear or cosine decay to zero."""
        warm = round(self.warmup_ratio * steps)
        if step < warm:
            return (step + 1) / warm
        left = (steps - step) / max(1, steps - warm)
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.lr_scheduler_type]


def _out_of_memory(error: RuntimeError) -> bool:
    """On a GPU there is a class for it; a CPU's allocator has only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

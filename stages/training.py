"""The machinery of `optimize`: batches of groups, losses over a whole step, the step-0 gate, checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import Bound, Workspace
from schemas import Model, WinnowError
from stages.checkpoints import Checkpoints
from stages.limits import check_ids, context_length
from stages.objectives import Batch, nll
from stages.policy import completion_logp, load_network, save_network

TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}  # step-0 loss: of the mean; of a pair, on average
EVEN = 1e-4  # nats: below this, rounding decides which of a pair is ahead


@dataclass(frozen=True)
class Group:
    """One prompt's training group: N responses, P pairs of indices into them."""

    prompt_id: str
    prompt: list[int]
    responses: list[list[int]]
    weight: list[float]
    ref: list[float] | None
    pairs: list[tuple[int, int]]

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def weighted_tokens(self) -> float:
        return sum(weight * len(ids) for weight, ids in zip(self.weight, self.responses, strict=True))


def groups_of(examples: pa.Table, objective: Bound, nll_weight: float, init: Model, dtype: str) -> list[Group]:
    """Training groups in order of prompt id; refuses what cannot be trained on, before any weight is loaded."""
    rows = sorted(examples.to_pylist(), key=lambda row: (row["prompt_id"], row["prompt_ids"]))
    groups = [_group(row, objective.facts["reference"]) for row in rows]
    check_ids(init, "examples", [ids for group in groups for ids in (group.prompt, *group.responses)])
    longest = max((group.width for group in groups), default=0)
    if longest > context_length(init.folder):
        raise WinnowError(f"examples have rows of {longest} tokens, and the model takes {context_length(init.folder)}")
    if objective.facts["reference"]:
        _check_reference(rows, init, dtype)
    if objective.facts["per"] == "pairs" and not any(group.pairs for group in groups):
        raise WinnowError(f"objective {objective.name} reads pairs, and the examples have none; wire `pairs`")
    if (nll_weight or objective.name == "nll") and not any(group.weighted_tokens for group in groups):
        raise WinnowError("nll reads responses with a weight, and the examples have none; set `imitate` in `examples`")
    return groups


def _group(row: dict[str, Any], needs_reference: bool) -> Group:
    """Only responses of pairs are shifted by a reference; one that is merely imitated may have none."""
    responses = row["responses"]
    pairs = [(pair["chosen"], pair["rejected"]) for pair in row["pairs"]]
    refs = [response["ref_logp"] for response in responses]
    if needs_reference and None in [refs[n] for pair in pairs for n in pair]:
        raise WinnowError("the objective reads a reference, and the examples have none; wire `reference` in `examples`")
    return Group(
        row["prompt_id"],
        row["prompt_ids"],
        [response["token_ids"] for response in responses],
        [response["weight"] for response in responses],
        [ref or 0.0 for ref in refs] if needs_reference else None,
        pairs,
    )


def _check_reference(rows: list[dict[str, Any]], init: Model, dtype: str) -> None:
    other = sorted(str(model)[:12] for model in {row["ref_model"] for row in rows} - {init.digest})
    if other:
        raise WinnowError(
            f"the cached reference was scored by weights {', '.join(other)}, and training starts from "
            f"{init.digest[:12]}: wire `reference.policy` and `optimize.init` to the same step"
        )
    other = sorted(map(str, {row["ref_dtype"] for row in rows} - {dtype}))
    if other:
        raise WinnowError(
            f"the cached reference was scored in {', '.join(other)}, and training runs in {dtype}: "
            "set `dtype` of `reference` and `optimize` to the same"
        )


@dataclass
class Trainer:
    """One run of the loop. `history` has one entry a step; `done` counts optimizer steps."""

    init: Model
    objective: Bound
    nll_weight: float
    lr: float
    schedule: str
    warmup: float
    batch_size: int
    epochs: int
    clip: float
    weight_decay: float
    dtype: str
    micro_tokens: int
    seed: int
    network: PreTrainedModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def fit(self, groups: list[Group], heldout: list[Group], ws: Workspace, checkpoint_every: int) -> Model:
        """Train, and save to the workspace's folder. Interrupted work goes on from its last checkpoint."""
        checkpoints = Checkpoints(ws.folder / "checkpoint")
        self.network = load_network(self.init, train=True)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        batches = list(self._batches(groups))
        steps = len(batches)
        checkpoints.restore(self)
        if self.done == 0 and self.objective.facts["reference"]:
            self._gate(batches[0])
        ws.count(tokens=sum(map(_tokens, batches)))
        for step, batch in enumerate(batches[self.done :], self.done):
            self._step(batch, step, steps)
            ws.progress(self.done, steps, "steps")
            if self.done % checkpoint_every == 0 and self.done < steps:
                checkpoints.save(self)
        if heldout:
            self.history.append({"step": float(self.done)} | self._evaluate(heldout))
        return save_network(self.network, self.init, ws.folder / "model")

    def _batches(self, groups: list[Group]) -> Iterator[list[Group]]:
        """The batches of all epochs, from the seed alone: a resumed run draws the same."""
        for epoch in range(self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
            yield from self._filled([groups[n] for n in order])

    def _filled(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Whole groups until they hold batch_size of what the objective counts: pairs, or weighted responses."""
        batch: list[Group] = []
        size, left = 0, sum(map(self._size, groups))
        for group in groups:
            batch.append(group)
            size, left = size + self._size(group), left - self._size(group)
            if size >= self.batch_size and left:
                yield batch
                batch, size = [], 0
        yield batch  # with the groups at the end that do not count, such as those that are only imitated

    def _size(self, group: Group) -> int:
        return len(group.pairs) if self.objective.facts["per"] == "pairs" else sum(w > 0 for w in group.weight)

    def _step(self, batch: list[Group], step: int, steps: int) -> None:
        for setting in self.optimizer.param_groups:
            setting["lr"] = self.lr * self._scale(step, steps)
        panel = Panel(batch, self.objective)
        for micro in self._micro(batch):
            loss = self._loss(micro, panel)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        entry = panel.entry() | {"grad_norm": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}
        if not all(map(math.isfinite, (entry["loss"], entry["grad_norm"]))):
            names = ", ".join(group.prompt_id for group in batch[:8])
            raise WinnowError(f"step {step}: the loss or its gradient is not finite; prompts of this step: {names}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step + 1
        self.history.append({"step": float(self.done)} | entry)

    def _scale(self, step: int, steps: int) -> float:
        """Linear warm-up, then constant, linear or cosine decay to zero."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        left = (steps - step) / max(1, steps - warm)
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]

    def _micro(self, batch: list[Group]) -> Iterator[list[Group]]:
        """Whole groups of similar length, up to micro_tokens padded tokens a forward pass."""
        micro: list[Group] = []
        rows = 0
        for group in sorted(batch, key=lambda group: (group.width, group.prompt_id)):
            if micro and (rows + len(group.responses)) * group.width > self.micro_tokens:
                yield micro
                micro, rows = [], 0
            micro.append(group)
            rows += len(group.responses)
        yield micro

    def _forward(self, groups: list[Group]) -> tuple[Batch, Tensor]:
        rows = [(group.prompt, ids) for group in groups for ids in group.responses]
        logp, hits = completion_logp(self.network, rows, self.dtype)
        starts = np.cumsum([0, *(len(group.responses) for group in groups)])
        pairs = [
            (start + chosen, start + rejected)
            for start, group in zip(starts, groups, strict=False)
            for chosen, rejected in group.pairs
        ]
        index = torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2), device=logp.device)
        refs = [ref for group in groups for ref in group.ref or []]
        vector = logp.new_tensor
        return Batch(
            logp=logp,
            length=vector([len(ids) for _, ids in rows]),
            weight=vector([weight for group in groups for weight in group.weight]),
            chosen=index[:, 0],
            rejected=index[:, 1],
            ref=vector(refs) if refs else None,
        ), hits

    def _loss(self, micro: list[Group], panel: "Panel") -> Tensor:
        """This micro-batch's share of the step's loss."""
        batch, hits = self._forward(micro)
        total: Tensor = self.objective(batch).sum() / panel.counts[self.objective.facts["per"]]
        if self.nll_weight:
            total = total + self.nll_weight * nll(batch).sum() / panel.counts["tokens"]
        panel.add(batch, hits, total)
        return total

    @torch.no_grad()
    def _gate(self, batch: list[Group]) -> None:
        """Refuse to start unless the cached reference gives, pair by pair, the loss of policy = reference."""
        found, expected = torch.zeros(0), torch.zeros(0)
        for micro in self._micro(batch):
            own, _ = self._forward(micro)
            found = torch.cat([found, self.objective(own).cpu()])
            expected = torch.cat([expected, self.objective(replace(own, ref=own.logp)).cpu()])
        drift, scale = found - expected, max(1.0, float(expected.abs().mean()))
        mean, each = (bound * scale for bound in TOLERANCE[self.dtype])
        if not (abs(float(drift.mean())) <= mean and float(drift.abs().mean()) <= each):
            raise WinnowError(
                f"step 0: the loss with the cached reference is {found.mean():.6f} ({drift.abs().mean():.6f} off a "
                f"pair), and policy = reference must give {expected.mean():.6f}: the cache is stale (other weights, "
                "chat template, truncation or dtype); run `reference` again with the weights that training starts from"
            )

    @torch.no_grad()
    def _evaluate(self, heldout: list[Group]) -> dict[str, float]:
        panel = Panel(heldout, self.objective)
        for micro in self._micro(heldout):
            self._loss(micro, panel)
        return {f"heldout/{name}": value for name, value in panel.entry().items()}


class Panel:
    """The same metrics for every method, summed over a step's micro-batches."""

    def __init__(self, batch: list[Group], objective: Bound) -> None:
        pairs = sum(len(group.pairs) for group in batch)
        self.counts = {
            "pairs": max(1, pairs),
            "tokens": max(1.0, sum(group.weighted_tokens for group in batch)),
        }
        self.pairs, self.sums = (
            pairs,
            dict.fromkeys(("loss", "hits", "nll", "chosen", "rejected", "right", "gap"), 0.0),
        )

    @torch.no_grad()
    def add(self, batch: Batch, hits: Tensor, total: Tensor) -> None:
        score = batch.logp if batch.ref is None else batch.shift
        gap = batch.gap(score)
        for name, value in (
            ("loss", total),
            ("hits", (hits * (batch.weight > 0)).sum()),
            ("nll", nll(batch).sum()),
            ("chosen", batch.logp[batch.chosen].sum()),
            ("rejected", batch.logp[batch.rejected].sum()),
            ("right", torch.where(gap.abs() < EVEN, 0.5, (gap > 0).float()).sum()),
            ("gap", gap.sum()),
        ):
            self.sums[name] += float(value)

    def entry(self) -> dict[str, float]:
        """Means; those that the batch has no rows for are left out."""
        entry = {"loss": self.sums["loss"]}
        if self.pairs:
            entry["pairs"] = self.pairs
            for name, of in (("logp/chosen", "chosen"), ("logp/rejected", "rejected"), ("margin", "gap")):
                entry[name] = self.sums[of] / self.pairs
            entry["accuracy"] = self.sums["right"] / self.pairs
        if self.sums["nll"]:
            entry["nll"] = self.sums["nll"] / self.counts["tokens"]
            entry["token_accuracy"] = self.sums["hits"] / self.counts["tokens"]
        return entry


def _tokens(batch: list[Group]) -> int:
    """Tokens that a forward pass reads, padding not counted."""
    return sum(len(group.prompt) + len(ids) for group in batch for ids in group.responses)

"""One objective on one table of examples: its batches, its share of a step's loss, its metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import Bound
from schemas import WinnowError
from stages.network.forward import Row, completion_logp, completion_scores, read_rows, shares
from stages.network.load import is_reward_model
from stages.network.packing import PassSize, PromptGroup, PromptResponses, fill, split
from stages.training.data import Group
from stages.training.distributed import Distributed
from stages.training.objectives import Batch, nll

TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}  # step-0 loss: of the mean; of a pair, on average
EVEN = 1e-4  # nats: below this, rounding decides which of a pair is ahead
IDLE = PromptGroup([0], [[0]])  # what a rank reads while others have one pass more


@dataclass
class ObjectiveTerm:
    """`loss` is what the optimizer sees; everything else says on which rows, and what became of them."""

    groups: list[Group]
    objective: Bound
    nll_weight: float
    nll_per: Literal["token", "response"]
    batch_size: int
    dtype: str
    tokens_per_pass: int
    seed: int
    number: int  # which leg of the run: legs draw their batches apart
    ranks: Distributed = field(default_factory=Distributed)
    largest: int = 0  # tokens of the largest pass that has gone through, backward too
    _drawn: list[list[Group]] = field(default_factory=list)
    _epochs: int = 0

    def steps(self, epochs: int) -> int:
        """Batches in so many passes over the groups."""
        while self._epochs < epochs:
            self._draw_epoch()
        return len(self._drawn)

    def batch(self, n: int) -> list[Group]:
        """The n-th batch, from the seed alone: a resumed run draws the same. There is always another epoch."""
        while len(self._drawn) <= n:
            self._draw_epoch()
        return self._drawn[n]

    def _draw_epoch(self) -> None:
        order = np.random.default_rng([self.seed, self._epochs, self.number]).permutation(len(self.groups))
        self._drawn += self._filled([self.groups[n] for n in order])
        self._epochs += 1

    def _filled(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Whole groups until they hold batch_size of what the objective counts: pairs, labels or weighted responses."""
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
        sizes = {
            "pairs": len(group.pairs),
            "rows": group.labelled,
            "likelihood": len(group.imitated),
        }
        return sizes[self.objective.metadata["per"]]

    def losses(self, network: PreTrainedModel, batch: list[Group], panel: "StepMetrics") -> Iterator[Tensor]:
        """The step's loss in shares, one forward pass each, of this rank; `panel` collects the metrics of all."""
        kl = self._kl(network, batch) if "kl" in self.objective.metadata["reads"] else None
        shared = shares(network, batch)
        passes = self.micro(network, batch)
        parts = {n: split(each[0], self.tokens_per_pass, shared) for n, each in enumerate(passes) if len(each) == 1}
        large = [n for n, each in parts.items() if len(each) > 1]
        for micro in self.ranks.deal([each for n, each in enumerate(passes) if n not in large]):
            if micro is None:
                yield self._idle(network)
                continue
            logp, hits = self._read(network, micro)
            yield self._loss(micro, logp, hits, kl, panel)
            self.largest = max(self.largest, PassSize.of(micro, shared).size)
        for n in large:  # apart, since ranks must read the network as often as each other: they share its parts
            yield from self._parts(network, passes[n][0], parts[n], kl, panel)
        panel.sums = self.ranks.total(panel.sums)

    def _loss(
        self,
        groups: list[Group],
        logp: Tensor,
        hits: Tensor,
        kl: Tensor | None,
        panel: "StepMetrics",
        share: float = 1.0,
    ) -> Tensor:
        own = self._batch(groups, logp, kl)
        weight = own.logp.new_tensor([weight for group in groups for weight in group.pair_weight])
        values = self.objective(own) * (weight if self.objective.metadata["per"] == "pairs" else 1.0)
        total: Tensor = values.sum() / panel.counts[self.objective.metadata["per"]]
        if self.nll_weight:
            total = total + self.nll_weight * nll(own).sum() / panel.counts["likelihood"]
        panel.add(own, hits, total, share)
        return total

    def _parts(
        self, network: PreTrainedModel, group: Group, parts: list[list[int]], kl: Tensor | None, panel: "StepMetrics"
    ) -> Iterator[Tensor]:
        """A group in several passes: all log-probs first, then each part's with d loss / d log-prob as its weight."""
        pieces = [PromptGroup(group.prompt, [group.responses[n] for n in part]) for part in parts]
        logp, hits = self._read_parts(network, pieces)
        with torch.enable_grad():
            loss = self._loss([group], logp.requires_grad_(), hits, kl, panel, 1 / self.ranks.of)
            (slope,) = torch.autograd.grad(loss, logp)
        if not torch.is_grad_enabled():
            yield loss.detach()
            return
        slopes = slope.split([len(part) for part in parts])
        for each in self.ranks.deal(list(zip(pieces, slopes, strict=True))):
            if each is None:
                yield self._idle(network)
                continue
            piece, weight = each
            share = (self._read(network, [piece])[0] * weight).sum()
            yield share - share.detach() + loss.detach() / len(pieces)

    @torch.no_grad()
    def _read_parts(self, network: PreTrainedModel, pieces: list[PromptGroup]) -> tuple[Tensor, Tensor]:
        """Log-probs and hits of all responses, each piece read by one of the ranks."""
        sizes = [len(piece.responses) for piece in pieces]
        found = torch.zeros(2, sum(sizes), device=network.device)
        for each in self.ranks.deal(list(zip(pieces, found.split(sizes, dim=1), strict=True))):
            if each is None:
                self._idle(network)
                continue
            piece, place = each
            place[:] = torch.stack(self._read(network, [piece]))
        logp, hits = self.ranks.sum(found)
        return logp, hits

    def _idle(self, network: PreTrainedModel) -> Tensor:
        """0, and a token read: all ranks must read the network as often as each other."""
        return 0.0 * self._read(network, [IDLE])[0].sum()

    def panel(self, batch: list[Group]) -> "StepMetrics":
        return StepMetrics(batch, self.nll_per)

    @torch.no_grad()
    def evaluate(self, network: PreTrainedModel, batch: list[Group]) -> dict[str, float]:
        """Metrics without a gradient; raises WinnowError where the loss is not finite."""
        panel = self.panel(batch)
        for _ in self.losses(network, batch, panel):
            pass
        entry = panel.entry()
        if not np.isfinite(entry["loss"]):
            raise WinnowError(f"a loss that is looked at is not finite; rows: {self.culprits(network, batch)}")
        return entry

    def micro(self, network: PreTrainedModel, batch: list[Group]) -> list[list[Group]]:
        """Whole groups of similar length, up to tokens_per_pass, and a pass for every rank if they suffice.

        Passes of similar size stand together, for ranks wait for each other.
        """
        shared = shares(network, batch)
        ordered = sorted(batch, key=lambda group: (PassSize.of([group], shared).width, group.prompt_id))
        dealt = [ordered[n :: self.ranks.of] for n in range(self.ranks.of)]
        passes = [[own[n] for n in chosen] for own in dealt for chosen in fill(own, self.tokens_per_pass, shared)]
        return sorted(passes, key=lambda groups: PassSize.of(groups, shared).size)

    def _read(self, network: PreTrainedModel, groups: Sequence[PromptResponses]) -> tuple[Tensor, Tensor]:
        """Log-prob (or score) of every response, and how many of its tokens are the likeliest."""
        if is_reward_model(network):
            scores = self.ranks.run(network, lambda: completion_scores(network, groups, self.dtype))
            return scores, torch.zeros_like(scores)
        return self.ranks.run(network, lambda: completion_logp(network, groups, self.dtype))

    @torch.no_grad()
    def _logp(self, network: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
        """Log-prob (or score) of each response to its prompt, in passes that each one of the ranks reads."""
        turn = count()

        def in_turn(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
            if next(turn) % self.ranks.of == self.ranks.number:
                return self._read(network, groups)[0]
            return torch.zeros(sum(len(group.responses) for group in groups))

        found = read_rows(in_turn, network, rows, self.dtype, self.tokens_per_pass)
        if 0 < next(turn) % self.ranks.of <= self.ranks.number:
            self._idle(network)
        return self.ranks.sum(torch.from_numpy(found).to(network.device))

    def _batch(self, groups: list[Group], logp: Tensor, kl: Tensor | None) -> Batch:
        """What the objective is a function of."""
        vector = logp.new_tensor
        chosen, rejected = _indices(groups, logp.device)
        reads = self.objective.metadata["reads"]
        return Batch(
            logp=logp,
            length=vector([len(ids) for group in groups for ids in group.responses]),
            weight=vector([weight for group in groups for weight in group.weight]),
            chosen=chosen,
            rejected=rejected,
            ref=vector([ref for group in groups for ref in group.ref or []]) if "ref" in reads else None,
            label=vector([label for group in groups for label in group.label]) if "label" in reads else None,
            desirable=vector(_signs(groups)) if "desirable" in reads else None,
            kl=kl,
        )

    @torch.no_grad()
    def _kl(self, network: PreTrainedModel, batch: list[Group]) -> Tensor:
        """Mean shift of the step's mismatched rows, before any gradient: micro-batches do not change it."""
        groups = [group for group in batch if group.mismatched]
        rows = [(group.prompt, ids) for group in groups for ids, _ in group.mismatched]
        if not rows:
            return torch.zeros((), device=network.device)
        logp = self._logp(network, rows)
        return (logp - logp.new_tensor([ref for group in groups for _, ref in group.mismatched])).mean()

    @torch.no_grad()
    def gate(self, network: PreTrainedModel) -> None:
        """Refuse to start unless the cached reference gives, row by row, the loss of policy = reference."""
        first = self.batch(0)
        kl = self._kl(network, first)
        rows = [(group.prompt, ids) for group in first for ids in group.responses]
        own = self._batch(first, self._logp(network, rows), kl)
        found = self.objective(own)
        expected = self.objective(replace(own, ref=own.logp, kl=torch.zeros_like(kl)))
        drift, scale = found - expected, max(1.0, float(expected.abs().mean()))
        mean, each = (bound * scale for bound in TOLERANCE[self.dtype])
        if not (abs(float(drift.mean())) <= mean and float(drift.abs().mean()) <= each):
            raise WinnowError(
                f"step 0: the loss with the cached reference is {found.mean():.6f} ({drift.abs().mean():.6f} off a "
                f"pair), and policy = reference must give {expected.mean():.6f}: the cache is stale (other weights, "
                "chat template, truncation or dtype); run `reference` again with the weights that training starts from"
            )

    @torch.no_grad()
    def culprits(self, network: PreTrainedModel, batch: list[Group]) -> str:
        """The rows (prompt/candidate) whose log-prob is not finite; if none is, those of the whole step. 8 at most."""
        bad = [
            f"{group.prompt_id}/{name}"
            for group in batch
            for name, value in zip(group.names, self._read(network, [group])[0].tolist(), strict=True)
            if not np.isfinite(value)
        ]
        names = bad or [f"{group.prompt_id}/{name}" for group in batch for name in group.names]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _indices(groups: list[Group], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs as indices into the flat batch."""
    starts = np.cumsum([0, *(len(group.responses) for group in groups)])
    pairs = [(start + w, start + r) for start, group in zip(starts, groups, strict=False) for w, r in group.pairs]
    index = torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2), device=device)
    return index[:, 0], index[:, 1]


def _signs(groups: list[Group]) -> list[int]:
    return [sign for group in groups for sign in group.desirable or [0] * len(group.responses)]


class StepMetrics:
    """The same metrics for every method, summed over a step's micro-batches.

    `counts` are what losses divide by: numbers of pairs, labels, tokens or responses, whatever their weights. A
    sum of weights would take out again what a prompt's weights say beside another's.
    """

    def __init__(self, batch: list[Group], nll_per: str) -> None:
        imitated = [length for group in batch for length in group.imitated]
        self.pairs = sum(len(group.pairs) for group in batch)
        self.tokens = sum(imitated)
        self.counts = {
            "pairs": max(1, self.pairs),
            "rows": max(1, sum(group.labelled for group in batch)),
            "likelihood": max(1, self.tokens if nll_per == "token" else len(imitated)),
        }
        self.sums = dict.fromkeys(("loss", "hits", "nll", "chosen", "rejected", "right", "gap", "good", "bad"), 0.0)
        self.good = sum(sign > 0 for group in batch for sign in group.desirable or [])
        self.bad = sum(sign < 0 for group in batch for sign in group.desirable or [])
        self.kl: float | None = None

    @torch.no_grad()
    def add(self, batch: Batch, hits: Tensor, total: Tensor, share: float) -> None:
        """share: of rows that several ranks count."""
        gap = batch.gap(batch.logp if batch.ref is None else batch.shift)
        for name, value in (
            ("loss", total),
            ("hits", (hits * (batch.weight > 0)).sum()),
            ("nll", nll(batch).sum()),
            ("chosen", batch.logp[batch.chosen].sum()),
            ("rejected", batch.logp[batch.rejected].sum()),
            ("right", torch.where(gap.abs() < EVEN, 0.5, (gap > 0).float()).sum()),
            ("gap", gap.sum()),
        ):
            self.sums[name] += share * float(value)
        if batch.desirable is not None:
            self.sums["good"] += share * float(batch.shift[batch.desirable > 0].sum())
            self.sums["bad"] += share * float(batch.shift[batch.desirable < 0].sum())
        self.kl = None if batch.kl is None else float(batch.kl)

    def entry(self) -> dict[str, float]:
        """Means; those that the batch has no rows for are left out."""
        entry = {"loss": self.sums["loss"]}
        if self.pairs:
            entry["pairs"] = self.pairs
            for name, of in (("logp/chosen", "chosen"), ("logp/rejected", "rejected"), ("margin", "gap")):
                entry[name] = self.sums[of] / self.pairs
            entry["accuracy"] = self.sums["right"] / self.pairs
        if self.tokens:
            entry["nll"] = self.sums["nll"] / self.tokens
            entry["token_accuracy"] = self.sums["hits"] / self.tokens
        if self.kl is not None:
            entry |= {"shift/desirable": self.sums["good"] / max(1, self.good), "kl": self.kl}
            entry["shift/undesirable"] = self.sums["bad"] / max(1, self.bad)
        return entry

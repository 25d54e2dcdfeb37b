"""Loss term: one objective on one table of examples, with its batches, its share of a step's loss, its metrics."""

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
from stages.network.packing import PassSize, PromptGroup, PromptResponses, batch_by_tokens, split_responses
from stages.training.data import TrainingGroup
from stages.training.distributed import Distributed
from stages.training.objectives import Batch, nll

TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}  # step-0 loss: of the mean; of a pair, on average
TIE = 1e-4  # nats: below this, rounding decides which of a pair is ahead
ONE_TOKEN = PromptGroup([0], [[0]])  # what a rank reads while others have one pass more


@dataclass
class ObjectiveTerm:
    """`objective` + `nll_weight` * nll on `groups`. The objective is a formula; everything else is here."""

    groups: list[TrainingGroup]
    objective: Bound
    nll_weight: float
    nll_per: Literal["token", "response"]
    batch_size: int
    dtype: str
    tokens_per_pass: int
    seed: int
    index: int  # of the term in its run: terms draw their batches from different streams
    dist: Distributed = field(default_factory=Distributed)
    largest_pass: int = 0  # tokens of the largest pass that has gone through, backward too
    _batches: list[list[TrainingGroup]] = field(default_factory=list)
    _epochs: int = 0

    def steps(self, epochs: int) -> int:
        """Return the number of batches in so many passes over the groups."""
        while self._epochs < epochs:
            self._draw_epoch()
        return len(self._batches)

    def batch(self, n: int) -> list[TrainingGroup]:
        """Return the n-th batch, from the seed alone: a resumed run draws the same. There is always another epoch."""
        while len(self._batches) <= n:
            self._draw_epoch()
        return self._batches[n]

    def _draw_epoch(self) -> None:
        """Shuffle, and cut into batches of whole groups that hold batch_size of what the objective counts."""
        per = self.objective.metadata["per"]
        order = np.random.default_rng([self.seed, self._epochs, self.index]).permutation(len(self.groups))
        groups = [self.groups[n] for n in order]
        sizes = [
            len(group.pairs) if per == "pairs" else group.labelled if per == "rows" else len(group.imitated)
            for group in groups
        ]
        batch: list[TrainingGroup] = []
        size, remaining = 0, sum(sizes)
        for group, amount in zip(groups, sizes, strict=True):
            batch.append(group)
            size, remaining = size + amount, remaining - amount
            if size >= self.batch_size and remaining:
                self._batches.append(batch)
                batch, size = [], 0
        self._batches.append(batch)  # with the groups at the end that do not count, such as those only imitated
        self._epochs += 1

    # Loss of a step

    def losses(self, network: PreTrainedModel, batch: list[TrainingGroup], metrics: "StepMetrics") -> Iterator[Tensor]:
        """Yield the step's loss in shares, one forward pass of this rank each; their sum over ranks is the loss.

        `metrics` collects the metrics of all ranks.
        """
        kl = self._kl(network, batch) if "kl" in self.objective.metadata["reads"] else None
        passes, shared = self.passes(network, batch), shares(network, batch)
        parts = {
            n: split_responses(groups[0], self.tokens_per_pass, shared)
            for n, groups in enumerate(passes)
            if len(groups) == 1
        }
        too_large = [n for n, part in parts.items() if len(part) > 1]
        for groups in self.dist.passes_of_this_rank([groups for n, groups in enumerate(passes) if n not in too_large]):
            if groups is None:
                yield self._read_one_token(network)
                continue
            logp, hits = self._logp_and_hits(network, groups)
            yield self._loss(groups, logp, hits, kl, metrics)
            self.largest_pass = max(self.largest_pass, PassSize.of(groups, shared).size)
        # Apart, since ranks must read the network equally often: they share the parts of one group.
        for n in too_large:
            yield from self._losses_of_large_group(network, passes[n][0], parts[n], kl, metrics)
        metrics.sums = self.dist.all_reduce_sums(metrics.sums)

    def _loss(
        self,
        groups: list[TrainingGroup],
        logp: Tensor,
        hits: Tensor,
        kl: Tensor | None,
        metrics: "StepMetrics",
        share: float = 1.0,
    ) -> Tensor:
        """Return the groups' summed loss over the count of the whole step, so that accumulation changes nothing."""
        batch, per = self._objective_batch(groups, logp, kl), self.objective.metadata["per"]
        losses = self.objective(batch)
        if per == "pairs":
            losses = losses * logp.new_tensor([weight for group in groups for weight in group.pair_weight])
        total: Tensor = losses.sum() / metrics.counts[per]
        if self.nll_weight:
            total = total + self.nll_weight * nll(batch).sum() / metrics.counts["likelihood"]
        metrics.add(batch, hits, total, share)
        return total

    def _losses_of_large_group(
        self,
        network: PreTrainedModel,
        group: TrainingGroup,
        parts: list[list[int]],
        kl: Tensor | None,
        metrics: "StepMetrics",
    ) -> Iterator[Tensor]:
        """Yield shares of the loss of a group that takes several passes.

        Its loss is a function of all of its log-probs: those are read first, without gradient; then each part is read
        again with gradient, its log-probs weighted by d loss / d log-prob.
        """
        pieces = [PromptGroup(group.prompt, [group.responses[n] for n in part]) for part in parts]
        sizes = [len(part) for part in parts]
        with torch.no_grad():
            values = torch.zeros(2, sum(sizes), device=network.device)
            tasks = list(zip(pieces, values.split(sizes, dim=1), strict=True))
            for task in self.dist.passes_of_this_rank(tasks):
                if task is None:
                    self._read_one_token(network)
                    continue
                piece, values_of_piece = task
                values_of_piece[:] = torch.stack(self._logp_and_hits(network, [piece]))
            logp, hits = self.dist.all_reduce(values)
        with torch.enable_grad():
            loss = self._loss([group], logp.requires_grad_(), hits, kl, metrics, 1 / self.dist.world_size)
            (slope,) = torch.autograd.grad(loss, logp)
        if not torch.is_grad_enabled():
            yield loss.detach()
            return
        for task in self.dist.passes_of_this_rank(list(zip(pieces, slope.split(sizes), strict=True))):
            if task is None:
                yield self._read_one_token(network)
                continue
            piece, slope_of_piece = task
            weighted = (self._logp_and_hits(network, [piece])[0] * slope_of_piece).sum()
            yield weighted - weighted.detach() + loss.detach() / len(pieces)

    def passes(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> list[list[TrainingGroup]]:
        """Return micro-batches: whole groups of similar length, up to tokens_per_pass, and a pass for every rank.

        Passes of similar size are neighbours, for ranks wait for each other.
        """
        shared, ranks = shares(network, batch), self.dist.world_size
        ordered = sorted(batch, key=lambda group: (PassSize.of([group], shared).width, group.prompt_id))
        passes = [
            [groups[n] for n in indices]
            for groups in (ordered[rank::ranks] for rank in range(ranks))
            for indices in batch_by_tokens(groups, self.tokens_per_pass, shared)
        ]
        return sorted(passes, key=lambda groups: PassSize.of(groups, shared).size)

    def _logp_and_hits(self, network: PreTrainedModel, groups: Sequence[PromptResponses]) -> tuple[Tensor, Tensor]:
        """Return log-prob (or score) of every response, and how many of its tokens are the likeliest."""
        if is_reward_model(network):
            scores = self.dist.run(network, lambda: completion_scores(network, groups, self.dtype))
            return scores, torch.zeros_like(scores)
        return self.dist.run(network, lambda: completion_logp(network, groups, self.dtype))

    def _read_one_token(self, network: PreTrainedModel) -> Tensor:
        """Return 0 after reading one token: all ranks must read the network equally often."""
        return 0.0 * self._logp_and_hits(network, [ONE_TOKEN])[0].sum()

    @torch.no_grad()
    def _logp_by_ranks(self, network: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
        """Return log-prob (or score) of each response to its prompt, in passes that the ranks share."""
        turns = count()

        def read_in_turn(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
            if next(turns) % self.dist.world_size == self.dist.rank:
                return self._logp_and_hits(network, groups)[0]
            return torch.zeros(sum(len(group.responses) for group in groups))

        logp = read_rows(read_in_turn, network, rows, self.dtype, self.tokens_per_pass)
        if 0 < next(turns) % self.dist.world_size <= self.dist.rank:
            self._read_one_token(network)
        return self.dist.all_reduce(torch.from_numpy(logp).to(network.device))

    @torch.no_grad()
    def _kl(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> Tensor:
        """Return the mean shift of the step's mismatched rows, before any gradient: micro-batches do not change it."""
        rows = [(group.prompt, ids) for group in batch for ids, _ in group.mismatched]
        if not rows:
            return torch.zeros((), device=network.device)
        logp = self._logp_by_ranks(network, rows)
        return (logp - logp.new_tensor([ref for group in batch for _, ref in group.mismatched])).mean()

    def _objective_batch(self, groups: list[TrainingGroup], logp: Tensor, kl: Tensor | None) -> Batch:
        """Return what the objective is a function of: the groups' rows and pairs, flat."""
        fields, vector = self.objective.metadata["reads"], logp.new_tensor
        starts = np.cumsum([0, *(len(group.responses) for group in groups)])
        pairs = [(start + w, start + r) for start, group in zip(starts, groups, strict=False) for w, r in group.pairs]
        index = torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2), device=logp.device)
        signs = [sign for group in groups for sign in group.desirable or [0] * len(group.responses)]
        return Batch(
            logp=logp,
            length=vector([len(ids) for group in groups for ids in group.responses]),
            weight=vector([weight for group in groups for weight in group.weight]),
            chosen=index[:, 0],
            rejected=index[:, 1],
            ref=vector([ref for group in groups for ref in group.ref or []]) if "ref" in fields else None,
            label=vector([label for group in groups for label in group.label]) if "label" in fields else None,
            desirable=vector(signs) if "desirable" in fields else None,
            kl=kl,
        )

    # Without gradients

    @torch.no_grad()
    def evaluate(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> dict[str, float]:
        """Return the metrics of a batch; raises WinnowError where the loss is not finite."""
        metrics = StepMetrics(batch, self.nll_per)
        for _ in self.losses(network, batch, metrics):
            pass
        means = metrics.means()
        if not np.isfinite(means["loss"]):
            rows = self.rows_not_finite(network, batch)
            raise WinnowError(f"a loss measured without training is not finite; rows (prompt/candidate): {rows}")
        return means

    @torch.no_grad()
    def check_reference(self, network: PreTrainedModel) -> None:
        """Raise WinnowError unless the cached reference gives, row by row, the loss of policy = reference.

        A stale cache would train another objective without any sign of it.
        """
        batch = self.batch(0)
        kl = self._kl(network, batch)
        rows = [(group.prompt, ids) for group in batch for ids in group.responses]
        cached = self._objective_batch(batch, self._logp_by_ranks(network, rows), kl)
        loss = self.objective(cached)
        expected = self.objective(replace(cached, ref=cached.logp, kl=torch.zeros_like(kl)))
        drift, scale = loss - expected, max(1.0, float(expected.abs().mean()))
        tolerance, tolerance_per_pair = (bound * scale for bound in TOLERANCE[self.dtype])
        # A NaN compares false with any bound, so the test must be for agreement and not for its opposite.
        if not (abs(float(drift.mean())) <= tolerance and float(drift.abs().mean()) <= tolerance_per_pair):
            raise WinnowError(
                f"step 0: the loss with the cached reference is {loss.mean():.6f} ({drift.abs().mean():.6f} off per "
                f"pair), and policy = reference must give {expected.mean():.6f}: the cache is stale (other weights, "
                "chat template, truncation or dtype); run `reference` again with the weights that training starts from"
            )

    @torch.no_grad()
    def rows_not_finite(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> str:
        """Return rows (prompt/candidate) whose log-prob is not finite, all of the batch if none is; 8 at most."""
        names = [f"{group.prompt_id}/{name}" for group in batch for name in group.names]
        logp = [value for group in batch for value in self._logp_and_hits(network, [group])[0].tolist()]
        names = [name for name, value in zip(names, logp, strict=True) if not np.isfinite(value)] or names
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class StepMetrics:
    """Metrics, the same for every method, summed over a step's micro-batches.

    `counts` are what losses divide by: numbers of pairs, labels, tokens or responses, whatever their weights. A
    sum of weights would cancel what one prompt's weights say beside another's.
    """

    def __init__(self, batch: list[TrainingGroup], nll_per: str) -> None:
        imitated = [length for group in batch for length in group.imitated]
        signs = [sign for group in batch for sign in group.desirable or []]
        self.pairs = sum(len(group.pairs) for group in batch)
        self.tokens = sum(imitated)
        self.desirable, self.undesirable = signs.count(1), signs.count(-1)
        self.counts = {
            "pairs": max(1, self.pairs),
            "rows": max(1, sum(group.labelled for group in batch)),
            "likelihood": max(1, self.tokens if nll_per == "token" else len(imitated)),
        }
        names = ("loss", "hits", "nll", "chosen", "rejected", "right", "gap", "desirable", "undesirable")
        self.sums = dict.fromkeys(names, 0.0)
        self.kl: float | None = None

    @torch.no_grad()
    def add(self, batch: Batch, hits: Tensor, total: Tensor, share: float) -> None:
        """Add a micro-batch. share: 1, or one over the number of ranks that all add the same rows."""
        gap = batch.gap(batch.logp if batch.ref is None else batch.shift)
        values = {
            "loss": total,
            "hits": (hits * (batch.weight > 0)).sum(),
            "nll": nll(batch).sum(),
            "chosen": batch.logp[batch.chosen].sum(),
            "rejected": batch.logp[batch.rejected].sum(),
            "right": torch.where(gap.abs() < TIE, 0.5, (gap > 0).float()).sum(),
            "gap": gap.sum(),
        }
        if batch.desirable is not None:
            values["desirable"] = batch.shift[batch.desirable > 0].sum()
            values["undesirable"] = batch.shift[batch.desirable < 0].sum()
        for name, value in values.items():
            self.sums[name] += share * float(value)
        self.kl = None if batch.kl is None else float(batch.kl)

    def means(self) -> dict[str, float]:
        """Return means by metric; without those that the batch has no rows for."""
        means = {"loss": self.sums["loss"]}
        if self.pairs:
            means["pairs"] = self.pairs
            means["logp/chosen"] = self.sums["chosen"] / self.pairs
            means["logp/rejected"] = self.sums["rejected"] / self.pairs
            means["margin"] = self.sums["gap"] / self.pairs
            means["accuracy"] = self.sums["right"] / self.pairs
        if self.tokens:
            means["nll"] = self.sums["nll"] / self.tokens
            means["token_accuracy"] = self.sums["hits"] / self.tokens
        if self.kl is not None:
            means["shift/desirable"] = self.sums["desirable"] / max(1, self.desirable)
            means["kl"] = self.kl
            means["shift/undesirable"] = self.sums["undesirable"] / max(1, self.undesirable)
        return means

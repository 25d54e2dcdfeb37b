"""Loss term: one objective on one table of examples. A step: micro-batches, forward pass, objective, loss, metrics."""

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import count

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas import Model, WinnowError
from stages.network.forward import Row, completion_logp, completion_scores, forward_rows, uses_shared_prefix
from stages.network.load import is_reward_model
from stages.network.packing import PromptGroup, batch_by_tokens, forward_tokens, longest_row, split_responses
from stages.network.router import RouterLoss, has_router_loss
from stages.training.config import TermData, TrainConfig
from stages.training.data import BatchSampler, TrainingGroup, groups_of
from stages.training.distributed import Distributed
from stages.training.objectives import Batch, nll

TIE = 1e-4  # nats: below this, rounding decides which of a pair is ahead
ONE_TOKEN = PromptGroup([0], [[0]])


class ObjectiveTerm:
    """`objective` + `nll_weight` * nll on the groups of one table. The objective is a formula; all else is here.

    Raises WinnowError for data that do not fit the objective or the model.
    """

    def __init__(
        self, data: TermData, init: Model, config: TrainConfig, index: int = 0, dist: Distributed | None = None
    ) -> None:
        self.objective, self.nll_weight, self.optimum = data.objective, data.nll_weight, data.optimum
        self.init = init
        self.nll_per, self.dtype, self.tokens_per_pass = config.nll_per, config.dtype, config.tokens_per_pass
        requirements = (data.objective, data.nll_weight, init, config.dtype, config.reference)
        self.groups = groups_of(data.examples, *requirements)
        self.heldout = None if data.heldout is None else list(groups_of(data.heldout, *requirements))
        self.batches = BatchSampler(self.groups, self.objective.metadata["per"], config.batch_size, config.seed, index)
        self.dist = dist or Distributed()
        self.largest_micro_batch = 0  # tokens of the largest that has gone forward and backward

    def micro_batch_losses(
        self, network: PreTrainedModel, batch: list[TrainingGroup], metrics: "StepMetrics"
    ) -> Iterator[Tensor]:
        """Yield the losses of this rank's micro-batches; their sum over all ranks is the loss of the step.

        `metrics` collects the metrics of all ranks.
        """
        kl = self.kl_estimate(network, batch) if "kl" in self.objective.metadata["reads"] else None
        shared_prefix = uses_shared_prefix(network, batch)
        micro_batches: list[list[TrainingGroup]] = []
        oversized: list[tuple[TrainingGroup, list[list[int]]]] = []
        for micro_batch in self.micro_batches(network, batch):
            parts = split_responses(micro_batch[0], self.tokens_per_pass, shared_prefix)
            if len(parts) > 1:  # such a group is a micro-batch alone
                oversized.append((micro_batch[0], parts))
            else:
                micro_batches.append(micro_batch)
        router = None
        if has_router_loss(network) and not is_reward_model(network):
            router = self._count_routes(network, micro_batches, oversized)
            metrics.has_router_loss = True
        for groups in self.dist.items_of_this_rank(micro_batches):
            if groups is None:
                yield self._dummy_forward(network)
                continue
            logp, n_correct = self._forward(network, groups, router)
            yield self._loss(groups, logp, n_correct, kl, metrics) + metrics.router_loss(router)
            self.largest_micro_batch = max(self.largest_micro_batch, forward_tokens(groups, shared_prefix))
        # Apart, because ranks must do equally many forward passes: they divide the parts of one group among them.
        for group, parts in oversized:
            yield from self._losses_of_oversized_group(network, group, parts, kl, metrics, router)
        metrics.sums = dict(zip(metrics.sums, self.dist.all_reduce_values([*metrics.sums.values()]), strict=True))

    def micro_batches(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> list[list[TrainingGroup]]:
        """Return whole groups of similar length, up to tokens_per_pass together, and a micro-batch for every rank.

        Micro-batches of similar size are neighbours, for ranks wait for each other.
        """
        shared_prefix, ranks = uses_shared_prefix(network, batch), self.dist.world_size
        ordered = sorted(batch, key=lambda group: (longest_row(group), group.prompt_id))
        micro_batches = [
            [groups[n] for n in indices]
            for groups in (ordered[rank::ranks] for rank in range(ranks))
            for indices in batch_by_tokens(groups, self.tokens_per_pass, shared_prefix)
        ]
        return sorted(micro_batches, key=lambda groups: forward_tokens(groups, shared_prefix))

    @torch.no_grad()
    def _count_routes(
        self,
        network: PreTrainedModel,
        micro_batches: list[list[TrainingGroup]],
        oversized: list[tuple[TrainingGroup, list[list[int]]]],
    ) -> RouterLoss:
        """Return the step's router loss with all of its tokens counted, by forward passes without gradients."""
        router = RouterLoss(network)
        passes: list[Sequence[PromptGroup]] = [*micro_batches]
        passes += [[piece] for group, parts in oversized for piece in pieces_of(group, parts)]
        for groups in self.dist.items_of_this_rank(passes):
            if groups is None:
                self._dummy_forward(network)
            else:
                self._forward(network, groups, router)
        self.dist.all_reduce(router.counts)
        router.counting = False
        return router

    def _forward(
        self, network: PreTrainedModel, groups: Sequence[PromptGroup], router: RouterLoss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-prob (or score) of every response, and how many of its tokens greedy decoding would give."""
        if is_reward_model(network):
            scores = self.dist.run(network, lambda: completion_scores(network, groups, self.dtype))
            return scores, torch.zeros_like(scores)
        return self.dist.run(network, lambda: completion_logp(network, groups, self.dtype, router))

    def _dummy_forward(self, network: PreTrainedModel) -> Tensor:
        """Return 0 after a forward pass over one token, so that every rank issues the same FSDP collectives."""
        return 0.0 * self._forward(network, [ONE_TOKEN])[0].sum()

    def objective_batch(self, groups: list[TrainingGroup], logp: Tensor, kl: Tensor | None) -> Batch:
        """Return what the objective is a function of: the groups' rows and pairs, flat."""
        fields, vector = self.objective.metadata["reads"], logp.new_tensor
        starts = np.cumsum([0, *(len(group.responses) for group in groups)])
        pairs = [(start + w, start + r) for start, group in zip(starts, groups, strict=False) for w, r in group.pairs]
        index = torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2), device=logp.device)
        signs = [sign for group in groups for sign in group.desirable or [0] * len(group.responses)]
        return Batch(
            logp=logp,
            length=vector([length for group in groups for length in group.counted]),
            weight=vector([weight for group in groups for weight in group.weight]),
            chosen=index[:, 0],
            rejected=index[:, 1],
            ref=vector([ref for group in groups for ref in group.ref or []]) if "ref" in fields else None,
            label=vector([label for group in groups for label in group.label]) if "label" in fields else None,
            desirable=vector(signs) if "desirable" in fields else None,
            kl=kl,
        )

    def checked(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return what the objective returned for a batch; raise WinnowError unless it is one loss per pair, or per row.

        Another shape would be broadcast against the weights of pairs, or divided by the wrong count.
        """
        axis = "pair" if self.objective.metadata["per"] == "pairs" else "row"
        shape = batch.chosen.shape if axis == "pair" else batch.logp.shape
        expected = f"a tensor of floats of shape {list(shape)}, one per {axis}"
        if not isinstance(losses, Tensor):
            raise self.objective.wrong_result(losses, expected)
        if losses.shape != shape or not losses.is_floating_point():
            raise self.objective.wrong_result(losses, expected)
        if torch.is_grad_enabled() and batch.logp.requires_grad and not losses.requires_grad:
            raise self.objective.wrong_result(losses, f"{expected}, with the gradient of `logp`")
        return losses

    def _loss(
        self,
        groups: list[TrainingGroup],
        logp: Tensor,
        n_correct: Tensor,
        kl: Tensor | None,
        metrics: "StepMetrics",
        rank_scale: float = 1.0,
    ) -> Tensor:
        """Return the groups' summed loss over the count of the whole step, so that accumulation changes nothing."""
        batch, per = self.objective_batch(groups, logp, kl), self.objective.metadata["per"]
        losses = self.checked(self.objective(batch), batch)
        if per == "pairs":
            losses = losses * logp.new_tensor([weight for group in groups for weight in group.pair_weight])
        total: Tensor = losses.sum() / metrics.counts[per]
        if self.nll_weight:
            total = total + self.nll_weight * nll(batch).sum() / metrics.counts["likelihood"]
        metrics.add(batch, n_correct, total, rank_scale)
        return total

    def _losses_of_oversized_group(
        self,
        network: PreTrainedModel,
        group: TrainingGroup,
        parts: list[list[int]],
        kl: Tensor | None,
        metrics: "StepMetrics",
        router: RouterLoss | None,
    ) -> Iterator[Tensor]:
        """Yield losses whose gradients add up to that of a group which takes several forward passes.

        Its loss is a function of all of its log-probs: those are computed first, without gradient; then each part goes
        forward again with gradient, its log-probs weighted by d loss / d log-prob.
        """
        pieces = pieces_of(group, parts)
        sizes, training = [len(part) for part in parts], torch.is_grad_enabled()
        with torch.no_grad():
            values = torch.zeros(2, sum(sizes), device=network.device)
            for task in self.dist.items_of_this_rank(list(zip(pieces, values.split(sizes, dim=1), strict=True))):
                if task is None:
                    self._dummy_forward(network)
                    continue
                piece, values_of_piece = task
                values_of_piece[:] = torch.stack(self._forward(network, [piece], None if training else router))
            logp, n_correct = self.dist.all_reduce(values)
        with torch.enable_grad():
            # Every rank adds the same rows to the metrics.
            loss = self._loss([group], logp.requires_grad_(), n_correct, kl, metrics, 1 / self.dist.world_size)
            (slope,) = torch.autograd.grad(loss, logp)
        if not training:
            yield loss.detach() + metrics.router_loss(router)
            return
        for task in self.dist.items_of_this_rank(list(zip(pieces, slope.split(sizes), strict=True))):
            if task is None:
                yield self._dummy_forward(network)
                continue
            piece, slope_of_piece = task
            weighted = (self._forward(network, [piece], router)[0] * slope_of_piece).sum()
            yield weighted - weighted.detach() + loss.detach() / len(pieces) + metrics.router_loss(router)

    @torch.no_grad()
    def kl_estimate(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> Tensor:
        """Return KTO's KL estimate z0 (before its clamp at 0), the mean logratio of the step's mismatched rows.

        Computed before any gradient, so that micro-batches do not change it.
        """
        rows = [(group.prompt, ids, mask) for group in batch for ids, _, mask in group.mismatched]
        if not rows:
            return torch.zeros((), device=network.device)
        logp = self.logp_by_ranks(network, rows)
        return (logp - logp.new_tensor([ref for group in batch for _, ref, _ in group.mismatched])).mean()

    @torch.no_grad()
    def logp_by_ranks(self, network: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
        """Return log-prob (or score) of each response to its prompt; the ranks divide the forward passes among them."""
        turns = count()

        def forward_in_turn(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
            if next(turns) % self.dist.world_size == self.dist.rank:
                return self._forward(network, groups)[0]
            return torch.zeros(sum(len(group.responses) for group in groups))

        logp = forward_rows(forward_in_turn, network, rows, self.dtype, self.tokens_per_pass, may_halve=False)
        if 0 < next(turns) % self.dist.world_size <= self.dist.rank:
            self._dummy_forward(network)
        return self.dist.all_reduce(torch.from_numpy(logp).to(network.device))

    def margins(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> Tensor:
        """Return by how much each chosen response of a batch is ahead, in nats (or in units of a score), float64 [P].

        Of unpaired labels: each log-prob, negative for undesirable ones; of imitation: the log-prob of each response.
        Without the reference, which cancels in the difference of two networks. In fp32 whatever training runs in:
        bfloat16's rounding of activations would hide what rounding did to weights.
        """
        in_fp32 = copy(self)
        in_fp32.dtype = "float32"
        logp = in_fp32.logp_by_ranks(network, [row for group in batch for row in group.rows])
        rows = self.objective_batch(batch, logp, None)
        if self.objective.metadata["per"] == "pairs":
            margins = rows.margin(logp)
        else:
            signs = rows.weight.sign() if rows.desirable is None else rows.desirable
            margins = (signs * logp)[signs != 0]
        return margins.detach().cpu().double()

    @torch.no_grad()
    def evaluate(self, network: PreTrainedModel, batch: list[TrainingGroup]) -> dict[str, float]:
        """Return the metrics of a batch, without gradients; raises WinnowError where the loss is not finite."""
        metrics = StepMetrics(batch, self.nll_per)
        for _ in self.micro_batch_losses(network, batch, metrics):
            pass
        means = metrics.means()
        if not np.isfinite(means["loss"]):
            raise WinnowError(
                f"a loss measured without training is not finite; {self.culprit(network, batch, means['loss'])}"
            )
        return means

    @torch.no_grad()
    def culprit(self, network: PreTrainedModel, batch: list[TrainingGroup], loss: float) -> str:
        """Return the rows (prompt/candidate) whose log-prob is not finite, 8 at most.

        If none is, all of the batch; and the objective, where its loss is not finite of finite log-probs.
        """
        names = [f"{group.prompt_id}/{name}" for group in batch for name in group.names]
        logp = [value for group in batch for value in self._forward(network, [group])[0].tolist()]
        not_finite = [name for name, value in zip(names, logp, strict=True) if not np.isfinite(value)]
        names = not_finite or names
        rows = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        objective = f"{self.objective.entry.location()} of finite log-probs is {loss}; "
        return f"{'' if not_finite or np.isfinite(loss) else objective}rows (prompt/candidate): {rows}"


def pieces_of(group: TrainingGroup, parts: list[list[int]]) -> list[PromptGroup]:
    """Return the prompt with the responses of each part."""
    return [group.part(part) for part in parts]


class StepMetrics:
    """Metrics, the same for every method, summed over a step's micro-batches.

    `counts` are what losses are divided by: numbers of pairs, labels, tokens or responses, whatever their weights. A
    sum of weights would cancel what one prompt's weights say beside another's.
    """

    def __init__(self, batch: list[TrainingGroup], nll_per: str) -> None:
        imitated = [length for group in batch for length in group.imitated]
        signs = [sign for group in batch for sign in group.desirable or []]
        self.pairs, tokens = sum(len(group.pairs) for group in batch), sum(imitated)
        self.counts = {
            "pairs": max(1, self.pairs),
            "rows": max(1, sum(group.labelled for group in batch)),
            "likelihood": max(1, tokens if nll_per == "token" else len(imitated)),
        }
        self.divisors = dict.fromkeys(("logp/chosen", "logp/rejected", "margin", "accuracy"), self.pairs)
        self.divisors |= dict.fromkeys(("nll", "token_accuracy"), tokens)
        self.desirable, self.undesirable = max(1, signs.count(1)), max(1, signs.count(-1))
        self.sums = dict.fromkeys(("loss", *self.divisors, "shift/desirable", "shift/undesirable", "aux_loss"), 0.0)
        self.kl: float | None = None
        self.has_router_loss = False

    @torch.no_grad()
    def add(self, batch: Batch, n_correct: Tensor, total: Tensor, rank_scale: float) -> None:
        """Add a micro-batch. rank_scale: 1, or 1 / world_size where all ranks add the same rows."""
        margin = batch.margin(batch.logp if batch.ref is None else batch.logratio)
        values = {
            "loss": total,
            "logp/chosen": batch.logp[batch.chosen].sum(),
            "logp/rejected": batch.logp[batch.rejected].sum(),
            "margin": margin.sum(),
            "accuracy": torch.where(margin.abs() < TIE, 0.5, (margin > 0).float()).sum(),
            "nll": nll(batch).sum(),
            "token_accuracy": (n_correct * (batch.weight > 0)).sum(),
        }
        if batch.desirable is not None:
            values["shift/desirable"] = batch.logratio[batch.desirable > 0].sum()
            values["shift/undesirable"] = batch.logratio[batch.desirable < 0].sum()
        for name, value in values.items():
            self.sums[name] += rank_scale * float(value)
        self.kl = None if batch.kl is None else float(batch.kl)

    def router_loss(self, router: RouterLoss | None) -> Tensor | float:
        """Return, and add to the loss, the weighted router loss of the last forward pass; 0 without a router."""
        if router is None:
            return 0.0
        loss = router.take()
        self.sums["aux_loss"] += float(loss.detach())
        self.sums["loss"] += router.coefficient * float(loss.detach())
        return router.coefficient * loss

    def means(self) -> dict[str, float]:
        """Return means by metric; without those that the batch has no rows for."""
        means = {"loss": self.sums["loss"]} | ({"pairs": self.pairs} if self.pairs else {})
        means |= {"aux_loss": self.sums["aux_loss"]} if self.has_router_loss else {}
        means |= {name: self.sums[name] / count for name, count in self.divisors.items() if count}
        if self.kl is not None:
            means["shift/desirable"] = self.sums["shift/desirable"] / self.desirable
            means["kl"] = self.kl
            means["shift/undesirable"] = self.sums["shift/undesirable"] / self.undesirable
        return means

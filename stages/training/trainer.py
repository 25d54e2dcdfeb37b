"""Training loop of `optimize`: one network, one or two loss terms, steps, checkpoints. It knows no method's name."""

import math
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.context import Mirror, ProgressCallback
from schemas import Model, WinnowError, WinnowWarning
from stages.network.load import Adapt, checkpoint_layers, load_network, save_network
from stages.training.checkpoints import Checkpoints, trained_weights
from stages.training.config import TermData, TrainConfig
from stages.training.data import groups_of
from stages.training.distributed import Distributed, full_tensor
from stages.training.mixing import MixState, measure_now
from stages.training.terms import ObjectiveTerm, StepMetrics
from stages.training.throughput import ThroughputMeter

PREFIXES = ("", "imitation/")  # of the metrics of each term


def train(
    init: Model, data: list[TermData], config: TrainConfig, mirror: Mirror, report_progress: ProgressCallback
) -> dict[str, Any]:
    """Train `init` on one or two terms and save the policy in `mirror.here / "model"`.

    Called by one process or by every rank. An interrupted run goes on from its last checkpoint, bit for bit on the same
    machine. Returns the policy's number of parameters, the steps, the tokens of its data, and the history: metrics per
    step. Raises WinnowError for data that do not fit the objective, a stale reference, a loss that is not finite, and a
    second lack of memory.
    """
    # Data first: what cannot be trained on is refused before a weight is loaded.
    dist = Distributed()
    terms: list[ObjectiveTerm] = []
    heldout = []
    for index, rows in enumerate(data):
        requirements = (rows.objective, rows.nll_weight, init, config.dtype, config.reference)
        term = ObjectiveTerm(
            groups_of(rows.examples, *requirements),
            rows.objective,
            rows.nll_weight,
            nll_per=config.nll_per,
            batch_size=config.batch_size,
            dtype=config.dtype,
            tokens_per_pass=config.tokens_per_pass,
            seed=config.seed,
            index=index,
            dist=dist,
        )
        terms.append(term)
        heldout.append(None if rows.heldout is None else groups_of(rows.heldout, *requirements))
    check_world_size(dist.world_size, terms)
    steps = terms[0].steps(config.epochs)
    checkpoints = Checkpoints(mirror, dist)
    halved = checkpoints.ran_out_of_memory(config.tokens_per_pass)
    if halved:
        _halve_passes(terms)

    # One network and its optimizer, filled from the last checkpoint if there is one.
    adapt: Adapt | None = None
    if config.lora_r:
        from stages.network.lora import add_adapter

        rank, alpha, targets = config.lora_r, config.lora_alpha, config.lora_target_modules
        adapt = partial(add_adapter, rank=rank, alpha=alpha, targets=targets, seed=config.seed)
    network = load_network(init, train=True, adapt=adapt)
    if config.gradient_checkpointing:
        checkpoint_layers(network)
    dist.shard(network)
    parameters = list(trained_weights(network).values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    state = checkpoints.restore(network, optimizer)
    meter = ThroughputMeter(network, dist, config.gradient_checkpointing)

    def measure_gap(n: int) -> None:
        """Measure a term's loss on the batch that it would take next, which is not counted as taken."""
        loss = terms[n].evaluate(network, terms[n].batch(state.batches[n]))["loss"]
        state.gaps[n] = loss - config.optima[n]

    if state.step == 0:
        if "ref" in data[0].objective.metadata["reads"] and config.reference == "init":
            terms[0].check_reference(network)
        if config.mix and config.mix.metadata["uses_losses"]:
            for n in range(len(terms)):
                measure_gap(n)

    while state.step < steps:
        # Learning rate and batches of this step. A term of weight 0 is neither drawn nor forwarded.
        learning_rate = config.learning_rate * learning_rate_factor(state.step, steps, config)
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate
        weights = [1.0]
        if config.mix:
            weight = config.mix(MixState(state.step, steps, config.seed, *state.gaps))
            weights = [weight, 1.0 - weight]
        active = [n for n, weight in enumerate(weights) if weight]
        batches = {n: terms[n].batch(state.batches[n]) for n in active}

        # Forward and backward, a pass at a time; loss and metrics are those of the whole step on all ranks.
        meter.start()
        means = {}
        try:
            for n, batch in batches.items():
                metrics = StepMetrics(batch, config.nll_per)
                for loss in terms[n].losses(network, batch, metrics):
                    (weights[n] * loss * dist.world_size).backward()  # FSDP averages gradients over ranks
                means[n] = metrics.means()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            optimizer.zero_grad(set_to_none=True)
            _note_out_of_memory(state.step, terms, checkpoints, halved)
            if dist.world_size > 1:
                raise RuntimeError("out of memory") from error  # other ranks wait for this one: all start again
            halved = True
            _halve_passes(terms)
            continue  # the same step, once more

        # Clip, refuse what is not finite, step. The optimizer's time is not the passes' and so not metered.
        grad_norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
        if not all(map(math.isfinite, [grad_norm, *(means[n]["loss"] for n in active)])):
            culprits = "; ".join(terms[n].rows_not_finite(network, batch) for n, batch in batches.items())
            raise WinnowError(
                f"step {state.step}: the loss or its gradient is not finite; rows (prompt/candidate): {culprits}; "
                "try a lower learning_rate, or look at these rows in the store"
            )
        groups = [group for batch in batches.values() for group in batch]
        speeds = meter.metrics(groups, terms[0].tokens_per_pass)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Metrics and progress.
        state.step += 1
        state.tokens += sum(group.tokens for group in groups)
        entry = {"step": float(state.step)}
        for n in active:
            state.batches[n] += 1
            state.gaps[n] = means[n]["loss"] - config.optima[n]
            entry |= {PREFIXES[n] + name: value for name, value in means[n].items()}
        entry |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if config.mix:
            entry["preference_weight"] = weights[0]
        state.history.append(entry | speeds)
        if measure_now(config.mix, state.step):
            for n in set(range(len(terms))) - set(active):
                measure_gap(n)
        report_progress(state.step, steps, "steps")
        if state.step % config.checkpoint_every == 0 and state.step < steps:
            checkpoints.save(state, network, optimizer)

    for term, held, prefix in zip(terms, heldout, PREFIXES, strict=False):
        if held is not None:
            means_of_heldout = {f"heldout/{prefix}{name}": v for name, v in term.evaluate(network, held).items()}
            state.history.append({"step": float(state.step)} | means_of_heldout)
    size = _save_policy(network, init, mirror.here / "model", dist, adapt)
    return {"parameters": size, "steps": state.step, "tokens": state.tokens, "history": state.history}


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return the share of the learning rate at this step: linear warm-up, then constant or decay to zero."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    remaining = (steps - step) / max(1, steps - warmup)
    factors = {"constant": 1.0, "linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2}
    return factors[config.lr_scheduler_type]


def check_world_size(world_size: int, terms: list[ObjectiveTerm]) -> None:
    """Raise WinnowError where most steps have fewer groups than there are ranks: some would only wait."""
    for term in terms:
        groups = int(median(len(term.batch(n)) for n in range(term.steps(1))))
        if groups < world_size:
            raise WinnowError(
                f"optimize.world_size: {world_size}, and half of the steps have {groups} prompts or fewer, which are "
                f"what ranks share; set world_size to {groups}, or raise batch_size"
            )


def _note_out_of_memory(step: int, terms: list[ObjectiveTerm], checkpoints: Checkpoints, halved: bool) -> None:
    """Record it for a restart; raise WinnowError with what would fit if the passes were halved before."""
    tokens_per_pass = terms[0].tokens_per_pass
    if halved:
        fits = min(max(term.largest_pass for term in terms) or tokens_per_pass, tokens_per_pass // 2)
        raise WinnowError(
            f"step {step}: out of memory again, with tokens_per_pass halved to {tokens_per_pass}; set "
            f"`tokens_per_pass` to {fits}, or `gradient_checkpointing: true` if one row alone is too long"
        )
    checkpoints.note_out_of_memory(tokens_per_pass)


def _halve_passes(terms: list[ObjectiveTerm]) -> None:
    for term in terms:
        term.tokens_per_pass = max(1, term.tokens_per_pass // 2)
    message = f"out of memory: tokens_per_pass is {terms[0].tokens_per_pass} from now on"
    warnings.warn(message, WinnowWarning, stacklevel=3)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU there is a class for it; a CPU's allocator has only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _save_policy(network: PreTrainedModel, init: Model, folder: Path, dist: Distributed, adapt: Adapt | None) -> int:
    """Save the trained policy from the first rank, which then holds all of it; return its number of weights."""
    if dist.world_size == 1:
        save_network(network, init, folder)
        return int(network.num_parameters())
    weights = {}
    for name, shard in network.named_parameters():
        weight = full_tensor(shard.detach())
        if dist.rank == 0:
            weights[name] = weight.cpu()
    size = 0
    if dist.rank == 0:
        unsharded = load_network(init, train=True, adapt=adapt)
        with torch.no_grad():
            for name, parameter in unsharded.named_parameters():
                parameter.copy_(weights[name])
        save_network(unsharded, init, folder)
        size = int(unsharded.num_parameters())
    dist.barrier()
    return size

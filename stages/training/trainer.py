"""Training loop of `optimize`: one network, one or two loss terms, steps, checkpoints. Method-agnostic."""

import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.context import Mirror, ProgressCallback
from pipeline.costs import Device, NotEstimatedError
from pipeline.resources import Resources
from pipeline.store.fingerprints import ADAPTER
from schemas import Model, WinnowError, WinnowWarning
from stages.model_config import ModelConfig
from stages.network.device import REFERENCE_TOLERANCE, is_out_of_memory, memory_of
from stages.network.heap import HeapLimit, give_back, resident_bytes
from stages.network.load import (
    Adapt,
    checkpoint_layers,
    compile_layers,
    free,
    layers_to_checkpoint,
    load_network,
    round_weights,
    save_network,
)
from stages.network.memory import NetworkShape, shape_of
from stages.network.working_weights import WorkingWeights
from stages.options import Precision, Rounding
from stages.results import number
from stages.training.agreement import DIFFERENCE, LARGEST_DIFFERENCE, check_first_batches
from stages.training.checkpoints import Checkpoints, TrainState, trained_weights
from stages.training.config import PROXY_WIN, TermData, TrainConfig
from stages.training.data import TrainingGroup
from stages.training.distributed import Distributed
from stages.training.live import LiveMetrics
from stages.training.memory import checkpoints_layers, network_need
from stages.training.mixing import MixState
from stages.training.sharded import can_read_shards, load_for_training, save_shards
from stages.training.terms import ObjectiveTerm, StepMetrics
from stages.training.throughput import ThroughputMeter

if TYPE_CHECKING:  # which reads texts, and a machine that trains alone need not
    from stages.training.validation import Validation

PREFIXES = ("", "imitation/")  # of the metrics of each term
UNMOVED = 1e-4  # nats per pair, root mean square: a change below is rounding, of which no fraction is given
LOST = 0.1  # fraction of a change by which a saved policy may be off without a warning


def train_policy(
    init: Model,
    data: list[TermData],
    config: TrainConfig,
    resources: Resources,
    mirror: Mirror,
    live: LiveMetrics,
    validation: "Validation | None",
    report_progress: ProgressCallback,
) -> dict[str, Any]:
    """Train `init` on one or two terms and save the policy in `mirror.here / "model"`.

    Called by one process or by every rank; with a validation, by one. An interrupted run resumes from its last
    checkpoint, bit for bit on the same machine (on a GPU, to rounding). Returns the policy's number of parameters, its
    steps and the tokens of their data, the tokens since the checkpoint, and the history: metrics per step. Raises
    WinnowError for data that do not fit the objective, a stale reference, a loss that is not finite, and out of memory
    again after halving.
    """
    # Data first: what cannot be trained on is refused before a weight is loaded.
    dist = Distributed()
    terms = [ObjectiveTerm(term_data, init, config, index, dist) for index, term_data in enumerate(data)]
    check_world_size(dist.world_size, terms)
    steps = terms[0].batches.steps(config.epochs)
    if validation and config.evaluate_every > steps:
        message = f"evaluate_every: {config.evaluate_every}, and the training has {steps} steps: it is evaluated once"
        warnings.warn(f"{message}, at its end; set it lower", WinnowWarning, stacklevel=2)
    checkpoints = Checkpoints(mirror, dist)
    halved = checkpoints.ran_out_of_memory(config.tokens_per_pass)
    if halved:
        _halve_tokens_per_pass(terms)

    # One network and its optimizer, filled from the last checkpoint if there is one.
    adapt: Adapt | None = None
    if config.lora_r or (init.folder / ADAPTER).exists():
        from stages.network.lora import train_adapter

        rank, alpha, targets = config.lora_r, config.lora_alpha, config.lora_target_modules
        adapt = partial(train_adapter, rank=rank, alpha=alpha, targets=targets, seed=config.seed)
    give_back()  # what steps before left in the heap of this process
    resident = resident_bytes()
    network = load_for_training(init, config.dtype, dist, adapt)
    # Without its new adapter, the network is `init`, and so the reference of the objective.
    base_is_reference = bool(config.lora_r) and not (init.folder / ADAPTER).exists() and config.reference == "init"
    working = WorkingWeights(network) if config.dtype == "bfloat16" and dist.world_size == 1 else None
    if config.compile_layers:
        compile_layers(network)
    if checkpointed := _checkpoints_layers(network, init, config, resources, dist):
        checkpoint_layers(network)
    heap = _limit_heap(network, init, config, checkpointed, resident, dist)
    parameters = list(trained_weights(network).values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    state = checkpoints.restore(network, optimizer)
    restored_tokens = state.tokens
    live.open(state.history, dist.rank)
    meter = ThroughputMeter(network, dist, checkpointed)
    if state.step == 0 and "ref" in terms[0].objective.metadata["reads"] and config.reference == "init":
        check_reference(terms[0], network)
    if state.step == 0 and (difference := check_first_batches(terms, network, config.engine_tolerance)):
        mean = difference["total"] / difference["count"]
        state.history.append({"step": 0.0, DIFFERENCE: mean, LARGEST_DIFFERENCE: difference["largest"]})

    mix = config.mix
    if state.step == 0 and mix and mix.metadata["uses_losses"]:
        _measure_excess_losses(range(len(terms)), terms, network, state)
    measure_every = mix.options[mix.metadata["measure_every"]] if mix and "measure_every" in mix.metadata else 0

    evaluated = [past[PROXY_WIN] for past in state.history if PROXY_WIN in past]
    latest = {PROXY_WIN: evaluated[-1]} if evaluated else {}  # for people who watch

    while state.step < steps:
        # Learning rate and batches of this step. A term of weight 0 is neither drawn nor forwarded.
        learning_rate = config.learning_rate * learning_rate_factor(state.step, steps, config)
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate
        weights = [1.0]
        if mix:
            mix_state = MixState(state.step, steps, config.seed, *state.excess_losses)
            weight = number(mix, mix(mix_state), low=0, high=1, of=f"step {state.step}")
            weights = [weight, 1.0 - weight]
        active = [n for n, weight in enumerate(weights) if weight]
        batches = {n: terms[n].batches[state.batches_taken[n]] for n in active}

        # Forward and backward, a micro-batch at a time; loss and metrics are those of the whole step on all ranks.
        meter.start()
        means = {}
        try:
            with working.passes() if working else nullcontext():
                for n, batch in batches.items():
                    metrics = StepMetrics(batch, config.nll_per)
                    for loss in terms[n].micro_batch_losses(network, batch, metrics):
                        (weights[n] * loss * dist.world_size).backward()  # FSDP averages gradients over ranks
                    means[n] = metrics.means()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            optimizer.zero_grad(set_to_none=True)
            tokens_per_pass = terms[0].tokens_per_pass
            if halved:
                largest = max(term.largest_micro_batch for term in terms) or tokens_per_pass
                raise WinnowError(
                    f"step {state.step}: out of memory again, with tokens_per_pass halved to {tokens_per_pass}; set "
                    f"`tokens_per_pass` to {min(largest, tokens_per_pass // 2)}, or `gradient_checkpointing: true` if "
                    "one row alone is too long"
                ) from error
            checkpoints.note_out_of_memory(tokens_per_pass)
            if dist.world_size > 1:
                raise RuntimeError("out of memory") from error  # other ranks wait for this one: all start again
            halved = True
            _halve_tokens_per_pass(terms)
            continue  # the same step, once more

        # Clip, refuse what is not finite, step. The optimizer's time is not metered: it is not the micro-batches'.
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not all(map(math.isfinite, [grad_norm, *(means[n]["loss"] for n in active)])):
            culprits = "; ".join(terms[n].culprit(network, batch, means[n]["loss"]) for n, batch in batches.items())
            raise WinnowError(
                f"step {state.step}: the loss or its gradient is not finite; {culprits}; "
                "try a lower learning_rate, or look at these rows in the store"
            )
        groups = [group for batch in batches.values() for group in batch]
        speeds = meter.metrics(groups, terms[0].tokens_per_pass)
        if heap:
            heap.check()  # before AdamW's moments come, in the first step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Metrics and progress.
        state.step += 1
        state.tokens += sum(group.tokens for group in groups)
        entry = {"step": float(state.step)}
        for n in active:
            state.batches_taken[n] += 1
            state.excess_losses[n] = means[n]["loss"] - terms[n].optimum
            entry |= {PREFIXES[n] + name: value for name, value in means[n].items()}
        entry |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if mix:
            entry["preference_weight"] = weights[0]
        state.history.append(entry | speeds)
        if measure_every and state.step % measure_every == 0:
            _measure_excess_losses(set(range(len(terms))) - set(active), terms, network, state)

        # Evaluation, while there are neither gradients nor activations: the ranker takes their place.
        is_best = False
        if validation and (state.step % config.evaluate_every == 0 or state.step == steps):
            figures = _heldout_metrics(terms, network)
            with working.passes() if working else nullcontext():
                arguments = (state.step, terms[0].tokens_per_pass, base_is_reference)
                figures |= validation.measure(network, config.dtype, *arguments)
            state.history.append({"step": float(state.step)} | figures)
            latest = {PROXY_WIN: figures[PROXY_WIN]}
            is_best = config.keep == "best" and figures[PROXY_WIN] > state.best_win  # of equal ones, the first
            if is_best:
                state.best_step, state.best_tokens, state.best_win = state.step, state.tokens, figures[PROXY_WIN]
        live.update(state.history)
        report_progress(state.step, steps, "steps", entry | latest)
        if state.step < steps:
            if is_best:
                checkpoints.save_best(state.step, network)
            if is_best or state.step % config.checkpoint_every == 0:
                checkpoints.save(state, network, optimizer)

    # The policy: that of the last step, or of the best evaluation.
    kept_step, tokens = state.step, state.tokens
    if config.keep == "best":
        kept_step, tokens = state.best_step, state.best_tokens
    if kept_step < state.step:
        checkpoints.load_best(kept_step, network)

    # Save, and measure what was saved: the folder, loaded again, is what later stages read. One network in memory.
    term, batch = next((terms[n], batches[n]) for n in active)  # of the last step
    trained = term.margins(network, batch)
    folder = mirror.here / "model"
    size = _save_policy(network, init, folder, dist, adapt, config)
    del optimizer, parameters, meter, param_group, loss, working
    _free(network, dist)
    network = load_for_training(Model(folder, ""), config.dtype, dist)
    heldout = _heldout_metrics(terms, network)
    for past in state.history:  # the same policy, in memory: a metric has one value per step
        if past["step"] == kept_step and PROXY_WIN in past:
            for name in heldout:
                del past[name]
    if heldout:
        state.history.append({"step": float(kept_step)} | heldout)
    saved = _margins(term, batch, network)
    _free(network, dist)
    network = load_for_training(init, config.dtype, dist)
    initial = _margins(term, batch, network)
    _free(network, dist)
    moved = trained - initial["float32"]
    if (size_moved := float(moved.square().mean().sqrt())) > UNMOVED:
        fraction = {dtype: kept_fraction(moved, saved[dtype] - initial[dtype]) for dtype in saved}
        if dist.rank == 0:
            warn_of_lost_margin(fraction, size_moved, config.save_dtype, config.save_rounding)
        figures = {"saved/margin_kept": fraction["float32"], "saved/margin_kept_bfloat16": fraction["bfloat16"]}
        state.history.append({"step": float(kept_step)} | figures)
    live.update(state.history)
    live.close()
    outcome = {"parameters": size, "steps": kept_step, "tokens": tokens, "history": state.history}
    return outcome | {"tokens_since_restore": state.tokens - restored_tokens}


def _need_options(init: Model, config: TrainConfig, dist: Distributed) -> tuple[NetworkShape | None, dict[str, Any]]:
    """Return what the memory of this training is estimated from: the network's shape, None if it is not counted."""
    options = {option.name: getattr(config, option.name) for option in fields(config)} | {"world_size": dist.world_size}
    try:
        return shape_of(ModelConfig(init.folder)), options
    except NotEstimatedError:
        return None, options


def _checkpoints_layers(
    network: PreTrainedModel, init: Model, config: TrainConfig, resources: Resources, dist: Distributed
) -> bool:
    """Return whether layers store their inputs alone: what the option says, of `auto` what the device's memory says."""
    shape, options = _need_options(init, config, dist)
    if config.gradient_checkpointing != "auto" or shape is None or not layers_to_checkpoint(network):
        return config.gradient_checkpointing is True
    needed = checkpoints_layers(shape, options, memory_of(network.device, resources))
    # The same on all ranks, whatever their devices: layers that run again gather their weights again.
    return bool(dist.all_reduce_values([float(needed)], ReduceOp.MAX)[0])


def _limit_heap(
    network: PreTrainedModel, init: Model, config: TrainConfig, checkpointed: bool, resident: int, dist: Distributed
) -> HeapLimit | None:
    """Return the limit of a CPU's heap, what the plan estimates above the `resident` bytes before; None for a GPU."""
    shape, options = _need_options(init, config, dist)
    if network.device.type != "cpu" or shape is None:
        return None
    need = network_need(shape, options | {"gradient_checkpointing": checkpointed}, Device())
    return HeapLimit(network, layers_to_checkpoint(network), resident, need.total)


def _heldout_metrics(terms: list[ObjectiveTerm], network: PreTrainedModel) -> dict[str, float]:
    """Return the metrics of each term's held-out rows by this network."""
    return {
        f"heldout/{prefix}{name}": value
        for term, prefix in zip(terms, PREFIXES, strict=False)
        if term.heldout is not None
        for name, value in term.evaluate(network, term.heldout).items()
    }


def _free(network: PreTrainedModel, dist: Distributed) -> None:
    """Free a network that this process has alone; ranks end with their step, and their shards with them."""
    if dist.world_size == 1:
        free(network)


def _margins(term: ObjectiveTerm, batch: list[TrainingGroup], network: PreTrainedModel) -> dict[str, Tensor]:
    """Return the margins by these weights, and by what engines in bfloat16 read of them; the network ends rounded."""
    margins = term.margins(network, batch)
    round_weights(network, "nearest")
    return {"float32": margins, "bfloat16": term.margins(network, batch)}


def kept_fraction(moved: Tensor, kept: Tensor) -> float:
    """Return the fraction of each pair's move that was kept, by least squares over pairs. moved, kept: [P], nats.

    Of their means, to which some pairs add what others take away, the fraction may be anything.
    """
    return float(kept @ moved / (moved @ moved))


def warn_of_lost_margin(
    fraction: dict[str, float], moved: float, save_dtype: Precision, save_rounding: Rounding
) -> None:
    """Warn where the saved policy, or what an engine in bfloat16 reads of it, is not the one that was trained.

    Only cures that are not set are named.
    """
    settings = (("save_dtype", "bfloat16", save_dtype), ("save_rounding", "stochastic", save_rounding))
    to_set = [f"`{name}: {value}`" for name, value, current in settings if value != current]
    cures, reason = [f"set {' and '.join(to_set)}"] if to_set else ["train for more steps"], ""
    if not abs(fraction["float32"] - 1) <= LOST:
        dtype, policy = "float32", "the saved policy"
        if save_dtype != "float32":
            cures.insert(0, "set `save_dtype: float32`")
        if not to_set:
            reason = "; on average stochastic rounding keeps it, and on few small steps this is its noise"
    elif save_dtype == "float32" and not fraction["bfloat16"] >= 0.5:  # of weights that bfloat16 lacks: else noise
        dtype, policy = "bfloat16", "what `sample` with `dtype: bfloat16` reads of the saved policy"
        cures.insert(0, "sample in float32")
    else:
        return
    warnings.warn(
        f"{policy} has {fraction[dtype]:.1%} of what training changed (of {moved:.4g} nats per pair, the root of their "
        f"mean square over the last batch){reason}: {', or '.join(cures)}, or raise learning_rate",
        WinnowWarning,
        stacklevel=3,
    )


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return the fraction of the learning rate at this step: linear warm-up, then constant or decay to zero."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    remaining = (steps - step) / max(1, steps - warmup)
    factors = {"constant": 1.0, "linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2}
    return factors[config.lr_scheduler_type]


def check_world_size(world_size: int, terms: list[ObjectiveTerm]) -> None:
    """Raise WinnowError where most steps have fewer groups than there are ranks: some would only wait."""
    for term in terms:
        groups = int(median(len(term.batches.indices(n)) for n in range(term.batches.steps(1))))
        if groups < world_size:
            raise WinnowError(
                f"optimize.world_size: {world_size}, and half of the steps have {groups} prompts or fewer, which are "
                f"what ranks share; set world_size to {groups}, or raise batch_size"
            )


@torch.no_grad()
def check_reference(term: ObjectiveTerm, network: PreTrainedModel) -> None:
    """Raise WinnowError unless the cached reference gives, row by row, the loss of policy = reference.

    A stale cache would train another objective without any sign of it.
    """
    batch = term.batches[0]
    kl = term.kl_estimate(network, batch)
    rows = [row for group in batch for row in group.rows]
    cached = term.objective_batch(batch, term.logp_by_ranks(network, rows), kl)
    loss = term.checked(term.objective(cached), cached)
    fresh = replace(cached, ref=cached.logp, kl=torch.zeros_like(kl))
    expected = term.checked(term.objective(fresh), fresh)
    if cached.logp.isfinite().all() and not expected.isfinite().all():  # no reference can be the cause
        raise WinnowError(
            f"step 0: {term.objective.entry.location()}: its loss is not finite where the policy is the reference, and "
            "the log-probs are; correct the objective"
        )
    drift, scale = loss - expected, max(1.0, float(expected.abs().mean()))
    tolerance, tolerance_per_pair = (bound * scale for bound in REFERENCE_TOLERANCE[term.dtype])
    # A NaN compares false with any bound, so the test must be for agreement and not for its opposite.
    if not (abs(float(drift.mean())) <= tolerance and float(drift.abs().mean()) <= tolerance_per_pair):
        raise WinnowError(
            f"step 0: the loss with the cached reference is {loss.mean():.6f} ({drift.abs().mean():.6f} off per "
            f"pair), and policy = reference must give {expected.mean():.6f}: the cache is stale (other weights, "
            "chat template, truncation or dtype); run `reference` again with the weights that training starts from"
        )


def _measure_excess_losses(
    indices: Iterable[int], terms: list[ObjectiveTerm], network: PreTrainedModel, state: TrainState
) -> None:
    """Measure the loss of some terms on the batch that each takes next, without counting it as taken."""
    for n in indices:
        loss = terms[n].evaluate(network, terms[n].batches[state.batches_taken[n]])["loss"]
        state.excess_losses[n] = loss - terms[n].optimum


def _halve_tokens_per_pass(terms: list[ObjectiveTerm]) -> None:
    for term in terms:
        term.tokens_per_pass = max(1, term.tokens_per_pass // 2)
    message = f"out of memory: tokens_per_pass is {terms[0].tokens_per_pass} from now on"
    warnings.warn(message, WinnowWarning, stacklevel=3)


def _save_policy(
    network: PreTrainedModel, init: Model, folder: Path, dist: Distributed, adapt: Adapt | None, config: TrainConfig
) -> int:
    """Save the trained policy from the first rank, which then holds all of it; return its number of weights."""

    def save(network: PreTrainedModel) -> None:
        rounding = config.save_rounding
        save_network(
            network, init, folder, dtype=config.save_dtype, rounding=rounding, seed=config.seed, merge=config.merge_lora
        )

    if dist.world_size == 1:
        save(network)
        return int(network.num_parameters())
    if adapt is None and can_read_shards(init.folder):
        rounding = config.save_rounding
        save_shards(network, init, folder, dist, dtype=config.save_dtype, rounding=rounding, seed=config.seed)
        return int(network.num_parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)  # empty on other ranks
    size = 0
    if dist.rank == 0:
        unsharded = load_network(init, config.dtype, train=True, adapt=adapt)
        unsharded.load_state_dict(weights)
        save(unsharded)
        size = int(unsharded.num_parameters())
    dist.barrier()
    return size

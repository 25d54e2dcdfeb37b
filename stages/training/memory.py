"""Memory of stage `optimize`: weights, gradients, AdamW's moments, what is kept for the backward pass, the head."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline import InputStep
from pipeline.costs import MODEL_ERROR, Change, Device, Need
from stages.limits import KEPT_FRACTION
from stages.network.memory import BF16, FP32, NetworkShape, code_part, fewer_tokens, logits_bytes, planned_shape
from stages.ranking.memory import ranker_need

MOMENTS = 2 * FP32  # AdamW's two means of a weight's gradient, in fp32
# Of all that a training needs, what it may hold in free blocks on a CPU before they go back (stages/network/heap.py):
# that costs time, and at 0 in place of 0.1 a step of a network of 26M weights took 6 % longer, not 1 or 2.
HEAP_SLACK = 0.1
MAX_RANKS = 64
ADAPTER_RANK = 16  # of the LoRA that is named where nothing else would fit


def training_need(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> Need | None:
    """Return the memory of each process of a training at its widest moment, the backward pass of a full step's last.

    None where no network is known yet. Raises NotEstimatedError where its memory is not counted
    (stages/network/memory.py). Weights are fp32 whatever is computed in; with several processes these, gradients and
    moments are divided, and gathered a layer at a time.
    """
    shape = planned_shape(inputs.get("init"))
    if shape is None:
        return None
    need = network_need(shape, options, device)
    if not options.get("evaluate_every") or options["by"] is None:
        return need
    # An evaluation keeps weights and moments, and has the ranker beside them. Draws take less than a pass of training:
    # their batches are of as many tokens, and keep keys and values alone.
    ranker = ranker_need(options, inputs, device)
    low = options["dtype"] == "bfloat16"
    held = need.parts["weights"] + need.parts["optimizer"] + (BF16 * shape.linear if low else 0)
    more = held + (ranker.total if ranker else 0.0) - need.total
    return replace(need, parts={**need.parts, "evaluation": more}) if more > 0 else need


def checkpoints_layers(shape: NetworkShape, options: Mapping[str, Any], device: Device) -> bool:
    """Return what `gradient_checkpointing` says; of `auto`, whether the training may not fit the device without.

    An estimate may be off by MODEL_ERROR: what needs almost all of a device's memory counts as more.
    """
    if options["gradient_checkpointing"] != "auto":
        return bool(options["gradient_checkpointing"])
    without = network_need(shape, {**options, "gradient_checkpointing": False}, device)
    return device.memory is not None and without.total * (1 + MODEL_ERROR) > device.memory


def network_need(shape: NetworkShape, options: Mapping[str, Any], device: Device) -> Need:
    """Return the memory of each process that trains a network of this shape (`training_need`)."""
    checkpointed = checkpoints_layers(shape, options, device)
    tokens, ranks, rank = int(options["tokens_per_pass"]), int(options["world_size"]), int(options["lora_r"])
    low = options["dtype"] == "bfloat16"
    added = rank * shape.adapted
    trained = added if rank else shape.parameters
    weights = FP32 * (shape.parameters + added)
    per_layer = shape.linear // max(1, shape.layers)
    outside = shape.parameters - shape.linear  # of layers: these stay gathered until a step ends

    # Kept for the backward pass; with checkpointing each layer's input, and one layer at a time. Autocast's copies of
    # the weights are part of it.
    saved = tokens * shape.kept_per_token(options["dtype"], rank)
    copies = BF16 * (shape.linear + added) if low else 0
    if checkpointed:
        activations: float = tokens * FP32 * shape.hidden * shape.layers
        once = saved + tokens * shape.passing_per_token() + copies / max(1, shape.layers)
    else:
        activations = saved * shape.layers + copies
        once = tokens * shape.passing_per_token()
    activations += tokens * FP32 * 4 * shape.hidden  # around the layers: the last norm, and states of the responses

    # The head runs backward before any layer does: its gradient (fp32) and its copy, or a layer's own, are held.
    head: float = logits_bytes(shape, device, tokens) + BF16 * shape.head * low
    if device.kind == "cuda":  # probabilities, kept for the backward pass
        kept_at_once = (device.memory or float("inf")) * KEPT_FRACTION
        head += min(kept_at_once, (BF16 if low else FP32) * float(tokens) * shape.vocabulary)
    if not rank:
        head += FP32 * shape.head
    parts = {
        "weights": weights / ranks + (FP32 * (2 * per_layer + outside) if ranks > 1 else 0),
        "gradients": FP32 * trained / ranks,
        "optimizer": MOMENTS * trained / ranks,
        "activations": activations + max(0.0, once - head),
        "logits": head,
    } | code_part(device)
    if device.kind == "cpu":
        parts["heap"] = HEAP_SLACK * sum(parts.values())
    # With a LoRA, the whole network is loaded on each device before it is divided, and again on the first to be saved.
    if (
        ranks > 1
        and rank
        and (at_save := weights + (FP32 * shape.parameters + MOMENTS * trained) / ranks) > sum(parts.values())
    ):
        parts["loading"] = at_save - sum(parts.values())
    note = "gradient_checkpointing: auto is on" if checkpointed and options["gradient_checkpointing"] == "auto" else ""
    return Need(shape.parameters + added, options["dtype"], parts, note)


def less_training_memory(options: Mapping[str, Any], device: Device) -> Iterator[Change]:
    """Yield changes that take less memory: those that leave the result as it is first, a LoRA last.

    Shorter passes down to a quarter, below which a device idles; checkpointing; both; more processes; a LoRA.
    """
    full = int(options["tokens_per_pass"])
    named = [] if options["gradient_checkpointing"] else ["`gradient_checkpointing: true`"]

    def change(tokens: int, *settings: str, **changes: Any) -> Change:
        shorter = [f"`tokens_per_pass: {tokens}`"] if tokens < full else []
        return " and ".join([*settings, *shorter]), {**options, "tokens_per_pass": tokens, **changes}, device

    for tokens in fewer_tokens(options)[:2]:
        yield change(tokens)
    checkpointed = [tokens for tokens in (full, *fewer_tokens(options)) if named or tokens < full]
    for tokens in checkpointed:
        yield change(tokens, *named, gradient_checkpointing=True)
    ranks = 2 * int(options["world_size"])
    while ranks <= min(MAX_RANKS, int(options["batch_size"])) and device.kind == "cuda":
        for tokens in (full, *fewer_tokens(options)):
            yield change(tokens, f"`world_size: {ranks}`", *named, gradient_checkpointing=True, world_size=ranks)
        ranks *= 2
    if not options["lora_r"]:
        for tokens in (full, *fewer_tokens(options)):
            settings = (f"a LoRA (`lora_r: {ADAPTER_RANK}`)", *named)
            yield change(tokens, *settings, gradient_checkpointing=True, lora_r=ADAPTER_RANK)

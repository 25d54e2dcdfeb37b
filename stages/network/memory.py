"""Memory of a network from its config and the headers of its weights: nothing is loaded, and torch is not imported.

Counted are the tensors that are held at once, as a GPU's allocator counts them; a training on a CPU keeps near them by
heap.py. stages/training/README.md compares the counts with peaks that tests/bench/memory.py measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pipeline import InputStep
from pipeline.costs import Device, Need, NotEstimatedError
from stages.limits import LOGITS_AT_ONCE, SCORING_TOKENS_PER_PASS
from stages.model_config import HEAD_COUNTS, HIDDEN_SIZES, ModelConfig, planned_config

FP32, BF16 = 4, 2  # bytes of a number
CODE = 40e6  # bytes of a process on a CPU: pages of torch's code that are read when it computes, Python's objects
SLICES = 3  # of logits that are held at once: logits, their softmax or gradient, and a temporary
NAMES = {  # of the numbers of a network, in the configs of its families
    "hidden": HIDDEN_SIZES,
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": HEAD_COUNTS,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class NetworkShape:
    """Numbers of a network, by which its memory grows. All counts are of weights or of numbers per token.

    linear: weights of matrices but embeddings, which autocast copies. norms: per layer, `saved_per_norm` numbers each.
    """

    parameters: int
    linear: int
    adapted: int  # sum of inputs and outputs of all linear layers: a LoRA of rank r has r times as many weights
    vocabulary: int  # 0 for a reward model, which ends in a score
    tied: bool
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    gated: bool = True
    norms: int = 2
    rms: bool = True
    qk_norms: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def head(self) -> int:
        """Return the weights of the output layer."""
        return self.vocabulary * self.hidden

    def kept_per_token(self, dtype: str, lora_r: int) -> float:
        """Return the bytes that one layer keeps of a token for the backward pass.

        Norms keep their input and, if their own weight is trained, the normalised one; linear layers their input, which
        autocast copies for each of them; attention its queries, keys, values, output and log-sum-exps; a gated MLP four
        vectors of its width, any other two.
        """
        linears = 5 if self.gated else 2  # that read a norm's output
        if dtype == "bfloat16":
            low = linears * self.hidden + 2 * self.queries + 2 * self.keys
            low += (4 if self.gated else 2) * self.intermediate
            saved = BF16 * low
        else:
            saved = FP32 * (2 * self.hidden + 2 * self.queries + 2 * self.keys)
            saved += FP32 * (4 if self.gated else 2) * self.intermediate
        per_norm = 2 if self.rms and not lora_r else 1
        saved += FP32 * (self.norms * per_norm * self.hidden + self.heads)
        if self.qk_norms:
            saved += FP32 * 2 * (self.queries + self.keys)
        adapters = 7 if self.gated else 6
        return saved + adapters * lora_r * (BF16 if dtype == "bfloat16" else FP32)

    def passing_per_token(self) -> float:
        """Return the bytes of a token in the layer that is computed, beyond what is kept: the widest moment."""
        wide = 4 if self.gated else 2
        attention = 3 * self.hidden + 4 * self.queries + 2 * self.keys
        return FP32 * max(2 * self.hidden + wide * self.intermediate, attention)


def shape_of(config: ModelConfig) -> NetworkShape:
    """Return the shape of the network in a folder; raise NotEstimatedError for kinds whose memory is not counted here.

    Those are encoder-decoders, mixtures of experts, quantised weights, and networks without heads of attention.
    """
    text = config.text
    numbers = {name: next((text[key] for key in keys if text.get(key)), None) for name, keys in NAMES.items()}
    lacking = [name for name, number in numbers.items() if not isinstance(number, int)]
    kinds = {
        "an encoder-decoder": config.content.get("is_encoder_decoder"),
        f"quantised weights ({config.quantization})": config.quantization,
        "a mixture of experts": any(map(text.get, EXPERTS)),
        f"a network whose config.json has no number of {' and '.join(lacking)}": lacking,
        "a folder whose weights have no readable header": not config.shapes,
    }
    for kind, applies in kinds.items():
        if applies:
            raise NotEstimatedError(f"{config.folder} is {kind}")
    hidden, heads = int(numbers["hidden"] or 0), int(numbers["heads"] or 0)
    vocabulary = config.vocabulary or 0
    tied = bool(text.get("tie_word_embeddings", config.content.get("tie_word_embeddings", True)))
    shapes = {name: shape for name, shape in config.shapes.items() if not (tied and name.startswith("lm_head."))}
    embeddings = {name for name, shape in shapes.items() if len(shape) == 2 and vocabulary in shape}
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in embeddings]
    layer = [name for name in shapes if ".0." in name]
    return NetworkShape(
        parameters=sum(map(prod, shapes.values())),
        linear=sum(map(prod, linear)),
        adapted=sum(map(sum, linear)),
        vocabulary=0 if config.output == "score" else vocabulary,
        tied=tied,
        layers=int(numbers["layers"] or 0),
        hidden=hidden,
        intermediate=int(text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim") or 4 * hidden),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_size=int(text.get("head_dim") or hidden // heads),
        gated=any("gate" in name for name in layer),
        norms=sum(
            shapes[name] == [hidden] and ("norm" in name or "ln_" in name) for name in layer if "bias" not in name
        ),
        rms=not any(name.endswith(("norm.bias", "ln_1.bias")) for name in layer),
        qk_norms=any("q_norm" in name for name in layer),
    )


def planned_shape(step: InputStep | None) -> NetworkShape | None:
    """Return the shape of the network of a step, None if a plan cannot know it yet; raise as `shape_of` does."""
    if step is None:
        return None
    if (config := planned_config(step)) is not None:
        return shape_of(config)
    for name in ("init", "policy"):
        if name in step.inputs:
            return planned_shape(step.inputs[name])
    if step.stage != "untrained" or not step.options:
        return None
    vocabulary, hidden, layers, heads = (
        int(step.options[name]) for name in ("vocabulary", "hidden", "layers", "heads")
    )
    wide = 3 * hidden  # as stages/network/models.py makes it
    linear = layers * (4 * hidden * hidden + 3 * hidden * wide)
    parameters = vocabulary * hidden + linear + (2 * layers + 1) * hidden
    adapted = layers * (8 * hidden + 3 * (hidden + wide))
    return NetworkShape(
        parameters, linear, adapted, vocabulary, True, layers, hidden, wide, heads, heads, hidden // heads
    )


def logits_bytes(shape: NetworkShape, device: Device, tokens: int) -> float:
    """Return the bytes of the logits that the head holds at once, of a pass of so many tokens."""
    if not shape.vocabulary:
        return 0.0
    rows = max(1, min(tokens, LOGITS_AT_ONCE[device.kind] // shape.vocabulary))
    return float(SLICES * FP32 * rows * shape.vocabulary)


def code_part(device: Device) -> dict[str, float]:
    """Return what a process takes on a CPU beside its tensors, as a part of a `Need`; nothing is on a GPU."""
    return {"code": CODE} if device.kind == "cpu" else {}


def scoring_need(
    step: InputStep | None, dtype: str, device: Device, tokens: int = SCORING_TOKENS_PER_PASS
) -> Need | None:
    """Return what scoring by the network of a step takes: fp32 weights, and the widest layer of a pass."""
    shape = planned_shape(step)
    if shape is None:
        return None
    # Autocast keeps its copies of weights for the whole pass; states of all tokens leave the last layer.
    copies = BF16 * (shape.linear + shape.head) if dtype == "bfloat16" else 0.0
    return Need(shape.parameters, dtype, {
        "weights": FP32 * shape.parameters + copies,
        "activations": tokens * (shape.passing_per_token() + FP32 * shape.hidden),
        "logits": logits_bytes(shape, device, tokens),
    } | code_part(device))  # fmt: skip


def policy_need(options: Mapping[str, Any], inputs: Mapping[str, InputStep], device: Device) -> Need | None:
    """Return the memory of a stage that scores by its input `policy`."""
    return scoring_need(inputs.get("policy"), options["dtype"], device)


def fewer_tokens(options: Mapping[str, Any]) -> list[int]:
    """Return halves of `tokens_per_pass`, down to 256."""
    sizes = [int(options["tokens_per_pass"])]
    while sizes[-1] >= 512:
        sizes.append(sizes[-1] // 2)
    return sizes[1:]

"""Networks in memory: load one from a model's folder, save it to another."""

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.logging import disable_progress_bar

from pipeline.store.fingerprints import ADAPTER, CARD, policy_of_copy
from pipeline.store.storage import named
from pipeline.store.weights import let_others_read, weight_files
from schemas import Model, WinnowError
from stages.model_config import CLASSIFIER, FROM_FOLDER, SCORED_AT_END, ModelConfig
from stages.network.device import THREADS, can_compile, check_free_memory, default_device, say_precision
from stages.network.forward import share_prefixes
from stages.network.heap import give_back
from stages.network.prefix_attention import NAME, shared_prefix_attention
from stages.network.working_weights import round_linear_layers
from stages.options import Precision, Rounding

Adapt = Callable[[PreTrainedModel], None]
disable_progress_bar()  # of loading weights: a step has its own
WEIGHTS = (".safetensors", ".safetensors.index.json")


def load_network(
    model: Model, dtype: Precision = "float32", *, train: bool = False, adapt: Adapt | None = None
) -> PreTrainedModel:
    """Return the network with dropout off (a policy that drops out does not equal its own reference).

    dtype: what its forward passes will run in. Weights are fp32; for scoring in bfloat16, those of linear layers are
    rounded here, once, as autocast would in every pass: the same numbers from half the memory.

    adapt: a change to the network, such as `add_adapter`, before the trial whether prompts can be shared.

    Scoring runs on one thread of a CPU, so that a number does not depend on how many workers share the
    machine: parallelism is workers. Training takes all threads. Raises WinnowError for a classifier that
    is no reward model.
    """
    torch.set_num_threads(THREADS if train else 1)
    say_precision()
    network = read_network(model.folder, torch.float32)
    if is_reward_model(network):
        check_head(network)
    if adapt:
        adapt(network)
    move_to(network, default_device())
    share_prefixes(network.eval(), dtype)
    if dtype == "bfloat16" and not train:
        round_linear_layers(network)
    network.close = partial(free, network)  # what a `WarmCache` calls
    return network


def move_to(network: PreTrainedModel, device: torch.device) -> None:
    """Move a network's weights to a device; raise MachineError, with who holds its memory, if they do not fit there."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    cure = "reserve a GPU for this step alone (`gpus: 1` in the profile, `--executor ray`)"
    check_free_memory(size, device, f"{type(network).__name__} (its weights alone)", cure)
    network.to(device)


def free(network: PreTrainedModel) -> None:
    """Free the memory of a network's weights and gradients now, whatever still refers to it.

    A network refers to itself, so that Python frees it some time later, and torch keeps a device's memory: an H100
    still lacked the 6.2 GB of a 1.5B when its worker had closed (tests/bench/h100.md), and vLLM wants a free device.
    """
    network.zero_grad(set_to_none=True)
    network.to("meta")
    if torch.cuda.is_available():
        gc.collect()  # activations, and the state of an optimizer; of a process with many objects, a second
        torch.cuda.empty_cache()
    give_back()


def read_network(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Return the network of a folder; `options` go to transformers' `from_pretrained`.

    Raises WinnowError, with the names of tensors, where the config and the weights are of two models, for quantised
    weights, and for weights that are not finite. transformers itself draws missing weights at random, and says so only
    in a log.
    """
    config = ModelConfig(folder)
    if config.quantization:
        raise WinnowError(
            f"model {folder}: its weights are quantised ({config.quantization}), and only vLLM samples from these; "
            "give the folder that they were quantised from"
        )
    auto = AutoModelForSeq2SeqLM if config.content.get("is_encoder_decoder") else AutoModelForCausalLM
    if config.output == "score":
        auto = AutoModelForSequenceClassification
        options["num_labels"] = config.labels  # a config without it would get two
    # transformers' fused attention ignores soft caps without a warning; its plain one does not.
    if config.text.get("attn_logit_softcapping"):
        options["attn_implementation"] = "eager"
    options |= {"dtype": dtype, **FROM_FOLDER}
    network: PreTrainedModel
    network, info = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if info["mismatched_keys"]:
        name, stored, expected = min(info["mismatched_keys"])
        raise WinnowError(
            f"model {folder}: {name} is {list(stored)}, and by config.json it would be {list(expected)} "
            f"({len(info['mismatched_keys'])} such tensors): config and weights are of two models"
        )
    for keys, what in (("missing_keys", "lack"), ("unexpected_keys", "have, and the network of config.json has not,")):
        if info[keys]:
            raise WinnowError(
                f"model {folder}: its weights {what} {min(info[keys])} ({len(info[keys])} such tensors): config and "
                "weights are of two models, or the weights of one that does something else"
            )
    check_finite(network.named_parameters(), folder)
    return network


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Raise WinnowError with the name of the first tensor that holds a number which is not finite.

    A sum is as fast as reading, and is finite where all its addends are, unless they are too large for a network.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.float().sum().isfinite():
            continue
        count = int((~tensor.float().isfinite()).sum())
        if count:
            raise WinnowError(
                f"model {folder}: {count:,} of {tensor.numel():,} weights of {name} are not finite (NaN or infinite): "
                "a training that failed, or a damaged copy; give a folder from before that"
            )


def check_weights(folder: Path) -> None:
    """Raise WinnowError where config and weights are of two models, or weights are not finite; no network is built."""
    if not ModelConfig(folder).quantization:
        read_network(folder, torch.float32, device_map="meta")
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            check_finite(((name, tensors.get_tensor(name)) for name in tensors.keys()), folder)  # noqa: SIM118


def is_reward_model(model: Model | PreTrainedModel) -> bool:
    """Return whether it ends in a score and not in a vocabulary; of a folder, by its config alone."""
    if isinstance(model, Model):
        return ModelConfig(model.folder).output == "score"
    return type(model).__name__.endswith(CLASSIFIER)


def check_head(network: PreTrainedModel) -> None:
    """Raise WinnowError for encoders and classifiers of several classes: one score is read off the last token."""
    if not hasattr(network, "score") or network.config.num_labels != 1:
        raise WinnowError(
            f"{type(network).__name__} with {network.config.num_labels} labels is no reward model: "
            "one label, given by a layer named `score` at the last token, is what can be read"
        )


def layers_to_checkpoint(network: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers that can be run again in the backward pass."""
    return [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]


def checkpoint_layers(network: PreTrainedModel) -> None:
    """Let each layer store its inputs alone from now on, and run again in the backward pass: the same gradients.

    transformers' own switch requires training mode, which would turn dropout on.
    """
    layers = layers_to_checkpoint(network)
    if not layers:
        raise WinnowError(
            f"gradient_checkpointing: {type(network).__name__} has no layers that can be run again; unset it"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def plain_layers(network: PreTrainedModel) -> Iterator[None]:
    """Let layers run inside as transformers has them: neither checkpointed nor compiled, which is for training."""
    layers = layers_to_checkpoint(network)
    wrapped = {layer: vars(layer).pop("forward") for layer in layers if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in wrapped.items():
            layer.forward = forward


def compile_layers(network: PreTrainedModel) -> None:
    """Let torch compile each layer: what is between its matrix products and its attention as few kernels.

    Attention stays a call of its own. Shapes are free from the start, so that a run which goes on where it was
    interrupted has the kernels that it had.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not can_compile(network.device):
        what = "Triton is not installed" if layers else f"{type(network).__name__} has no layers that can be compiled"
        raise WinnowError(f"compile_layers: {what}; unset it")
    AttentionInterface.register(NAME, torch.compiler.disable(shared_prefix_attention))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def save_network(
    network: PreTrainedModel,
    init: Model,
    folder: Path,
    *,
    dtype: Precision = "float32",
    rounding: Rounding = "nearest",
    seed: int = 0,
    merge: bool = True,
    weights: dict[str, Tensor] | None = None,
) -> Model:
    """Write a plain Hugging Face folder: safetensors, and init's tokenizer. In fp32 nothing is rounded.

    A LoRA is merged into its weights, and stored in the folder's `adapter/` as well, as peft reads it. Without `merge`,
    the folder has init's weights, unchanged, and the adapter beside them, as transformers and peft read it.
    weights: rounded and in `dtype`, of a network that is itself on the meta device.
    """
    scratch = folder.with_name(".model")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with named(folder):  # a full disk is an error of Rust in safetensors
            _write_network(network, init, scratch, weights, dtype=dtype, rounding=rounding, seed=seed, merge=merge)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return Model(folder, "")


def _write_network(
    network: PreTrainedModel,
    init: Model,
    scratch: Path,
    weights: dict[str, Tensor] | None,
    *,
    dtype: Precision,
    rounding: Rounding,
    seed: int,
    merge: bool,
) -> None:
    adapted = hasattr(network, "peft_config")
    if adapted:
        from stages.network.lora import merge_layers, save_adapter

        save_adapter(network, scratch / "adapter" if merge else scratch, policy_of_copy(init.folder) or init.digest)
        if merge:
            merge_layers(network)
    if adapted and not merge:
        _link_weights(init.folder, scratch)
    else:
        if dtype == "bfloat16" and weights is None:
            round_weights(network, rounding, seed)
        network.generation_config = GenerationConfig()  # init's is copied below; saving it would validate its sampling
        network.to(getattr(torch, dtype)).save_pretrained(scratch, state_dict=weights)
        let_others_read(scratch)
        (scratch / "generation_config.json").unlink(missing_ok=True)
    for file in init.folder.iterdir():
        # init's adapter is in the weights now, and its card is not about what was trained.
        written = (scratch / file.name).exists() or file.name in (ADAPTER, CARD)
        if file.is_file() and not file.name.endswith(WEIGHTS) and not written:
            shutil.copyfile(file, scratch / file.name)
    if (templates := init.folder / "additional_chat_templates").is_dir():
        shutil.copytree(templates, scratch / templates.name)
    if is_reward_model(network):
        _set_pad_token(scratch)
        if ModelConfig(init.folder).output != "score":  # what it began as says where else it is scored
            file = scratch / "config.json"
            config = json.loads(file.read_text()) | {SCORED_AT_END: True}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _set_pad_token(folder: Path) -> None:
    """Give a reward model's config and tokenizer one pad token, other than EOS, if they have none.

    transformers reads a score at the last token that is no padding: with EOS for it, one before the response's end.
    """
    config = AutoConfig.from_pretrained(folder, **FROM_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(folder, **FROM_FOLDER)
    eos, pad = tokenizer.eos_token_id, config.get_text_config().pad_token_id
    if pad is None or pad == eos:
        special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
        pad = next(token for token in (*special, 0, 1) if token not in (None, eos))
        config.get_text_config().pad_token_id = pad
        config.save_pretrained(folder)
    if tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.save_pretrained(folder)


def _link_weights(source: Path, folder: Path) -> None:
    """Give a folder the weights of another, as hard links where the file system has them, and an index of them.

    vLLM reads every safetensors file that no index leaves out, an adapter's too.
    """
    index = source / INDEX
    if index.exists():
        text = index.read_text()
    else:
        with safe_open(source / SAFE_WEIGHTS_NAME, "pt") as file:
            names = sorted(file.keys())
        text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SAFE_WEIGHTS_NAME)})
    (folder / INDEX).write_text(text)
    for name in sorted(set(json.loads(text)["weight_map"].values())):
        try:
            (folder / name).hardlink_to(source / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


@torch.no_grad()
def round_weights(network: PreTrainedModel, rounding: Rounding, seed: int = 0) -> None:
    """Round fp32 weights to numbers that bfloat16 has, in place; they stay fp32.

    `nearest` undoes every move of less than half a step of bfloat16, 2^-9 to 2^-8 of a weight, from a weight that
    bfloat16 has, however many weights moved together. `stochastic` rounds up with the probability of the remainder, so
    that the mean of each weight is the trained one (arXiv:1502.02551; Adam in bfloat16: arXiv:2010.06192); a weight
    that did not move stays.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        round_weight(weight, rounding, generator)


def round_weight(weight: Tensor, rounding: Rounding, generator: torch.Generator) -> None:
    """Round one weight of `round_weights`, in place."""
    if rounding == "nearest":
        weight.copy_(weight.bfloat16())
        return
    # The last 16 bits are what bfloat16 lacks: a random number below 2^16 carries into the others in as many of
    # 2^16 cases as they say. Drawn on the CPU, whose numbers are the same on every machine.
    noise = torch.randint(1 << 16, weight.shape, generator=generator, dtype=torch.int32).to(weight.device)
    weight.copy_(((weight.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))

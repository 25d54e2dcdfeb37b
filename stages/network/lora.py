"""LoRA (arXiv:2106.09685), by peft: beside a frozen W is alpha / rank B A, and B and A alone are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.registry import nearest
from pipeline.store.fingerprints import ADAPTER_WEIGHTS, BASE
from pipeline.store.weights import let_others_read
from schemas import WinnowError
from stages.network.device import TRIAL_TOLERANCE
from stages.network.load import is_reward_model

ADAPTER = "default"  # peft's name for the one adapter of a network
PREFIX = "base_model.model."  # what peft's own wrapper puts before the names in a file
PROBE = [[3, 1, 4, 1, 5, 2, 6, 2]]  # ids that every vocabulary has


def add_adapter(network: PreTrainedModel, rank: int, alpha: float | None, targets: list[str], seed: int) -> None:
    """Add B = 0 and a random A beside each layer whose name ends in one of `targets`, and freeze all else.

    Without targets, every linear layer but the head, and without alpha, twice the rank. A reward model's score is
    trained in full. Raises WinnowError for a target that no linear layer has, or that shares the embedding's weights.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    problems = []
    for target in targets:
        matching = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            problems.append(
                f"optimize.lora_target_modules: no linear layer is named {target!r}; {nearest(target, ends)}"
            )
        if any(layer.weight is network.get_input_embeddings().weight for layer in matching):
            problems.append(
                f"optimize.lora_target_modules: {target} shares its weights with the embedding; remove it from the list"
            )
    if problems:
        raise WinnowError(*problems)
    has_score = is_reward_model(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        target_modules=targets or "all-linear",
        task_type=TaskType.SEQ_CLS if has_score else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if has_score else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, ADAPTER)


def train_adapter(network: PreTrainedModel, rank: int, alpha: float | None, targets: list[str], seed: int) -> None:
    """Prepare a network for training: of an adapter from here on, a new one or its own; without a rank, of all weights.

    A policy that is a base with an adapter, as `save_network` writes it, goes on with that adapter, or is merged in
    memory where all weights are trained. Raises WinnowError for options that are not its adapter's.
    """
    if not hasattr(network, "peft_config"):
        if rank:
            add_adapter(network, rank, alpha, targets, seed)
        return
    if not rank:
        merge_layers(network)
        network.requires_grad_(True)
        return
    config = network.peft_config[ADAPTER]
    adapted = {name for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    problems = []
    if rank != config.r:
        problems.append(f"optimize.lora_r: {rank}, and the policy's own adapter has rank {config.r}")
    if (alpha or 2 * rank) != config.lora_alpha:
        problems.append(
            f"optimize.lora_alpha: {alpha or 2 * rank}, and the policy's own adapter has {config.lora_alpha}"
        )
    if targets and {name for name in adapted if not any(f".{name}".endswith(f".{target}") for target in targets)}:
        problems.append(
            f"optimize.lora_target_modules: the policy's own adapter has {', '.join(config.target_modules)}"
        )
    if problems:
        cure = "; set the same, or `merge_lora: true` in the step that trained it"
        raise WinnowError(*(problem + cure for problem in problems))
    for name, weight in network.named_parameters():
        weight.requires_grad_(f".{ADAPTER}" in name)


@contextmanager
def without_adapter(network: PreTrainedModel) -> Iterator[None]:
    """Let the network be the one inside that its adapter was added to."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # and trainable again


def save_adapter(network: PreTrainedModel, folder: Path, base: str) -> None:
    """Save the adapter as peft reads it (`PeftModel.from_pretrained(base, folder)`).

    base: digest of the policy that it was trained from; it fits no other.
    """
    config = network.peft_config[ADAPTER]
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    if not str(config.base_model_name_or_path).startswith(BASE):  # else it was trained on from an earlier step's
        config.base_model_name_or_path = BASE + base
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    named = {PREFIX + name: value.contiguous() for name, value in weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    let_others_read(folder)


def merge_layers(network: PreTrainedModel) -> None:
    """Merge the adapter of a network, if it has one, into its layers, in place."""
    if not hasattr(network, "peft_config"):
        return
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            network.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            network.set_submodule(name, layer.modules_to_save[ADAPTER])
    del network.peft_config
    # What transformers remembers of an adapter that it loaded: it would save that alone, under peft's names.
    network._hf_peft_config_loaded = False
    network.__dict__.pop("_weight_conversions", None)


@torch.no_grad()
def merge_adapter(network: PreTrainedModel, folder: Path) -> None:
    """Merge the LoRA of a peft folder into the network.

    Raises WinnowError unless the adapter has exactly the weights that the network takes, in their shapes, and the
    merged network gives the logits of peft's own model.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = PeftModel(network, config, ADAPTER)

    # Shapes first, for torch's own error would name peft's modules.
    expected = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    off = [name for name, weight in expected.items() if shapes.get(name, list(weight.shape)) != list(weight.shape)]
    if off:
        raise WinnowError(
            f"adapter: {off[0]} is {shapes[off[0]]}, and its base takes {list(expected[off[0]].shape)} "
            f"({len(off)} such weights): was it trained on another base?"
        )
    loaded = adapted.load_adapter(str(folder), ADAPTER, torch_device=str(network.device))
    for names, what in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "has, and its base does not take,")):
        if names:
            raise WinnowError(
                f"adapter: it {what} {names[0]} ({len(names)} such weights): was it trained on another base?"
            )

    ids = torch.tensor(PROBE, device=network.device)
    logits: Tensor = network(input_ids=ids).logits
    adapted.merge_and_unload(safe_merge=True)
    difference = float((network(input_ids=ids).logits - logits).abs().max() / logits.abs().max())
    if not difference <= TRIAL_TOLERANCE["float32"]:
        raise WinnowError(
            f"adapter: merged, its logits are off by {difference:.1e} of the largest; it cannot be merged"
        )

"""LoRA (arXiv:2106.09685), by peft: beside a frozen W stands alpha / rank B A, and B and A alone are trained."""

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
from schemas import WinnowError
from stages.network.forward import CLOSE
from stages.network.load import is_reward_model

NAME = "default"  # peft's, of the one adapter of a network
PREFIX = "base_model.model."  # what peft's own wrapper puts before the names in a file
PROBE = [[3, 1, 4, 1, 5, 2, 6, 2]]  # ids that every vocabulary has


def add_adapter(network: PreTrainedModel, rank: int, alpha: float | None, targets: list[str], seed: int) -> None:
    """B = 0 and a random A beside each layer whose name ends in one of `targets`; all else is frozen.

    Without targets, every linear layer but the head, and without alpha, twice the rank. A reward model's score is
    trained whole. Raises WinnowError for a target that no linear layer has, or that is the embedding at once.
    """
    _check_targets(network, targets)
    scored = is_reward_model(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        target_modules=targets or "all-linear",
        task_type=TaskType.SEQ_CLS if scored else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scored else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, NAME)


def _check_targets(network: PreTrainedModel, targets: list[str]) -> None:
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    for target in targets:
        found = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise WinnowError(
                f"optimize.lora_target_modules: no linear layer is named {target!r}; {nearest(target, ends)}"
            )
        if any(layer.weight is network.get_input_embeddings().weight for layer in found):
            raise WinnowError(
                f"optimize.lora_target_modules: {target} has its weights in common with the embedding; leave it out"
            )


def unload_adapter(network: PreTrainedModel, folder: Path, base: str) -> None:
    """Save the adapter as peft reads it (`PeftModel.from_pretrained(base, folder)`), and merge it into its layers.

    base: digest of the policy that it was trained from, on which alone it belongs.
    """
    config = network.peft_config[NAME]
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    config.base_model_name_or_path = BASE + base
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(network, adapter_name=NAME, save_embedding_layers=False)
    named = {PREFIX + name: value.contiguous() for name, value in weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    _merge(network)


def _merge(network: PreTrainedModel) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            network.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            network.set_submodule(name, layer.modules_to_save[NAME])
    del network.peft_config


@torch.no_grad()
def merge_adapter(network: PreTrainedModel, folder: Path) -> None:
    """Merge the LoRA of a peft folder into the network.

    Raises WinnowError unless each of the adapter's weights has a place in the network, each place its weight, and
    the merged network gives the logits of peft's own model.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    beside = PeftModel(network, config, NAME)
    _check_shapes(beside, folder)
    found = beside.load_adapter(str(folder), NAME, torch_device=str(network.device))
    for names, what in ((found.missing_keys, "lacks"), (found.unexpected_keys, "has, and the base has no place for,")):
        if names:
            raise WinnowError(f"adapter: it {what} {names[0]} ({len(names)} such weights): is it of another base?")
    ids = torch.tensor(PROBE, device=network.device)
    expected: Tensor = network(input_ids=ids).logits
    beside.merge_and_unload(safe_merge=True)
    off = float((network(input_ids=ids).logits - expected).abs().max() / expected.abs().max())
    if not off <= CLOSE:
        raise WinnowError(f"adapter: merged, its logits are off by {off:.1e} of the largest; it cannot be merged")


def _check_shapes(beside: PeftModel, folder: Path) -> None:
    places = get_peft_model_state_dict(beside, adapter_name=NAME, save_embedding_layers=False)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    off = [name for name, place in places.items() if shapes.get(name, list(place.shape)) != list(place.shape)]
    if off:
        raise WinnowError(
            f"adapter: {off[0]} is {shapes[off[0]]}, and its base takes {list(places[off[0]].shape)} "
            f"({len(off)} such weights): is it of another base?"
        )

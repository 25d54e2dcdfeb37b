"""Networks in memory: load one from a model's folder, save it to another."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from schemas import Model, WinnowError
from stages.network.forward import share_prefixes

Adapt = Callable[[PreTrainedModel], None]
disable_progress_bar()  # of loading weights: a step has its own
THREADS = torch.get_num_threads()
CLASSIFIER = "ForSequenceClassification"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def load_network(model: Model, *, train: bool = False, adapt: Adapt | None = None) -> PreTrainedModel:
    """Return the network with fp32 weights and dropout off (a policy that drops out does not equal its own reference).

    adapt: a change to the network, such as `add_adapter`, before the trial whether prompts can be shared.

    Scoring runs on one thread of a CPU, so that a number does not depend on how many workers share the
    machine: parallelism is workers. Training takes all threads. Raises WinnowError for a classifier that
    is no reward model.
    """
    torch.set_num_threads(THREADS if train else 1)
    config = json.loads((model.folder / "config.json").read_text())
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    if is_reward_model(model):
        auto = AutoModelForSequenceClassification
    # transformers' fused attention ignores soft caps without a warning; its plain one does not.
    capped = (config.get("text_config") or config).get("attn_logit_softcapping")
    options = {"attn_implementation": "eager"} if capped else {}
    network: PreTrainedModel = auto.from_pretrained(model.folder, dtype=torch.float32, local_files_only=True, **options)
    if is_reward_model(network):
        check_head(network)
    if adapt:
        adapt(network)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    share_prefixes(network.eval())
    return network


def is_reward_model(model: Model | PreTrainedModel) -> bool:
    """Return whether it ends in a score and not in a vocabulary; of a folder, by its config alone."""
    if isinstance(model, Model):
        names = json.loads((model.folder / "config.json").read_text()).get("architectures") or [""]
        return str(names[0]).endswith(CLASSIFIER)
    return type(model).__name__.endswith(CLASSIFIER)


def check_head(network: PreTrainedModel) -> None:
    """Raise WinnowError for encoders and classifiers of several classes: one score is read off the last token."""
    if not hasattr(network, "score") or network.config.num_labels != 1:
        raise WinnowError(
            f"{type(network).__name__} with {network.config.num_labels} labels is no reward model: "
            "one label, given by a layer named `score` at the last token, is what can be read"
        )


def checkpoint_layers(network: PreTrainedModel) -> None:
    """Let each layer store its inputs alone from now on, and run again in the backward pass: the same gradients.

    transformers' own switch requires training mode, which would turn dropout on.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise WinnowError(
            f"gradient_checkpointing: {type(network).__name__} has no layers that can be run again; unset it"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def save_network(network: PreTrainedModel, init: Model, folder: Path) -> Model:
    """Write a plain Hugging Face folder: safetensors in the dtype of the initial weights, and init's tokenizer.

    A LoRA is merged into its weights, and stored in the folder's `adapter/` as well, as peft reads it.
    """
    scratch = folder.with_name(".model")
    shutil.rmtree(scratch, ignore_errors=True)
    if hasattr(network, "peft_config"):
        from stages.network.lora import unload_adapter

        unload_adapter(network, scratch / "adapter", init.digest)
    config = json.loads((init.folder / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    network.generation_config = GenerationConfig()  # init's is copied below; saving it would validate its sampling
    network.to(dtype).save_pretrained(scratch)
    (scratch / "generation_config.json").unlink(missing_ok=True)
    for file in init.folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and not (scratch / file.name).exists():
            shutil.copyfile(file, scratch / file.name)
    if (templates := init.folder / "additional_chat_templates").is_dir():
        shutil.copytree(templates, scratch / templates.name)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return Model(folder, "")

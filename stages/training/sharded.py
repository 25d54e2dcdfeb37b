"""A network that several ranks train together: from a model's folder into shards and back, and no rank holds all of it.

Each rank reads its shard of each tensor from the safetensors files. What is saved is gathered tensor by tensor into
files that the first rank maps, and written from there as one process writes it: the same bytes.

A network is read as a whole by each rank where its weights cannot be read as they lie in the files, or where its trial
is of the whole: with a LoRA, with weights that transformers converts when it loads them (experts of a layer in one
tensor), with a router's loss, and an encoder-decoder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.store.fingerprints import ADAPTER
from pipeline.store.weights import weight_files
from schemas import Model, WinnowError
from stages.network.device import THREADS, default_device, say_precision
from stages.network.forward import check_router_loss, share_prefixes
from stages.network.heap import give_back
from stages.network.load import (
    Adapt,
    check_head,
    is_reward_model,
    load_network,
    read_network,
    round_weight,
    save_network,
)
from stages.network.router import has_router_loss
from stages.options import Precision, Rounding
from stages.training.distributed import Distributed


def load_for_training(model: Model, dtype: Precision, dist: Distributed, adapt: Adapt | None = None) -> PreTrainedModel:
    """Return the network as `load_network` does for training; of several ranks, each with its shards of the weights.

    Raises WinnowError on all ranks, as `load_network` does, where config and weights are of two models or a weight is
    not finite.
    """
    if dist.world_size > 1 and adapt is None and can_read_shards(model.folder):
        return _load_shards(model.folder, dtype, dist)
    network = load_network(model, dtype, train=True, adapt=adapt)
    if not is_reward_model(network):
        check_router_loss(network)
    dist.shard(network)
    return network


def can_read_shards(folder: Path) -> bool:
    """Return whether each weight of the network lies in the folder's files under its own name."""
    if (folder / ADAPTER).exists():
        return False
    network = read_network(folder, torch.float32, device_map="meta")
    stored = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            stored |= set(tensors.keys())
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}  # tied ones under both names
    return (
        not network.config.is_encoder_decoder
        and not has_router_loss(network)
        and stored.issuperset(name for name, _ in network.named_parameters())
        and parameters.issuperset(network.state_dict())  # no buffer is in the files
    )


def _load_shards(folder: Path, dtype: Precision, dist: Distributed) -> PreTrainedModel:
    torch.set_num_threads(THREADS)
    say_precision()
    device = default_device()
    checked = read_network(folder, torch.float32, device_map="meta")
    if is_reward_model(checked):
        check_head(checked)
    # Buffers, such as the frequencies of rotary embeddings, are in no file: they are computed here, on this device.
    with parameters_on_meta():
        network = type(checked)(checked.config).eval()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    dist.shard(network, device)
    network.to_empty(device=device)
    network.tie_weights()  # which were emptied apart
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
        shards = {name: weight.detach() for name, weight in network.named_parameters()}
        with TemporaryDirectory() as links:  # a folder may have weights in other files, too, which no index names
            for file in weight_files(folder):
                os.symlink(file.resolve(), Path(links) / file.name)
            load(shards, storage_reader=HuggingFaceStorageReader(links))
    _check_finite(shards, folder, dist)
    share_prefixes(network, dtype, lambda forward: dist.run(network, forward))
    give_back()  # layers that were gathered, one after the other
    return network


def _check_finite(shards: dict[str, Tensor], folder: Path, dist: Distributed) -> None:
    """Raise WinnowError on all ranks with the name of the first tensor that holds a number which is not finite."""
    lacking = [float((~local(shard).isfinite()).sum()) for shard in shards.values()]
    for (name, shard), count in zip(shards.items(), dist.all_reduce_values(lacking), strict=True):
        if count:
            raise WinnowError(
                f"model {folder}: {count:,.0f} of {shard.numel():,} weights of {name} are not finite (NaN or "
                "infinite): a training that failed, or a damaged copy; give a folder from before that"
            )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are built here have parameters without memory, and buffers with their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied to it stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def save_shards(
    network: PreTrainedModel,
    init: Model,
    folder: Path,
    dist: Distributed,
    *,
    dtype: Precision,
    rounding: Rounding,
    seed: int,
) -> None:
    """Write what `save_network` writes, from the first rank: its memory holds one tensor at a time beside its shards.

    The others lie in files beside the folder, which take as much of the disk as the policy until it is written: a file
    each, since transformers copies what lies in one memory.
    """
    scratch = folder.with_name(".weights")
    generator = torch.Generator().manual_seed(seed)
    low: torch.dtype = getattr(torch, dtype)
    weights: dict[str, Tensor] = {}
    if dist.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    for name, weight in network.named_parameters():
        gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if dist.rank == 0:
            if dtype == "bfloat16":
                gathered = gathered.clone()
                round_weight(gathered, rounding, generator)
            file, size = scratch / name, gathered.numel()
            weights[name] = torch.from_file(str(file), shared=True, size=size, dtype=low).view(gathered.shape)
            weights[name].copy_(gathered)
        del gathered
    if dist.rank == 0:
        on_meta = read_network(init.folder, torch.float32, device_map="meta")
        save_network(on_meta, init, folder, dtype=dtype, weights=weights)
        del weights
        shutil.rmtree(scratch)
    dist.barrier()

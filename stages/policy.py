"""One network in memory: load it, score completions with it, save it.

`reference` and `optimize` share `completion_logp`, so a cached log-prob is the trainer's own number.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from schemas import Model

disable_progress_bar()  # of loading weights: a step has its own
Row = tuple[Sequence[int], Sequence[int]]
THREADS = torch.get_num_threads()
WEIGHTS = (".safetensors", ".safetensors.index.json")


def load_network(model: Model, *, train: bool = False) -> PreTrainedModel:
    """fp32 weights, dropout off either way (a policy that drops out does not equal its own reference).

    Scoring runs on one thread of a CPU, so that a number does not depend on how many workers share the
    machine: parallelism is workers. Training takes all threads.
    """
    torch.set_num_threads(THREADS if train else 1)
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32, local_files_only=True)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return network.eval()


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def completion_logp(network: PreTrainedModel, rows: Sequence[Row], dtype: str) -> tuple[Tensor, Tensor]:
    """Summed log-prob of each response given its prompt, and how many of its tokens are the argmax.

    rows: N of (prompt ids, response ids), neither empty. Returns two fp32 vectors [N]. Padding is on the
    right, where causal attention never sees it; the head runs on the window of response positions only;
    the softmax is in fp32 whatever the network runs in.
    """
    device = next(network.parameters()).device
    ids, target, window = _pad(rows)
    with autocast(dtype, device):
        logits = network(input_ids=ids.to(device), logits_to_keep=window.to(device), use_cache=False).logits
    target = target.to(device)
    flat = cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    hits = (logits.detach().argmax(-1) == target).sum(-1).float()
    return -flat.view(target.shape).sum(-1), hits


def _pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, L] right-padded; targets [N, W], -100 outside the response; the W positions that predict them."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    first = min(len(prompt) for prompt, _ in rows) - 1
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    target = np.full((len(rows), max(lengths) - 1 - first), -100, dtype=np.int64)
    for n, (prompt, response) in enumerate(rows):
        ids[n, : lengths[n]] = np.concatenate([prompt, response])
        start = len(prompt) - 1 - first
        target[n, start : start + len(response)] = response
    return torch.from_numpy(ids), torch.from_numpy(target), torch.arange(first, max(lengths) - 1)


def by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size stays within `budget` tokens (or one row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda n: (lengths[n], n)):
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score_rows(network: PreTrainedModel, rows: Sequence[Row], dtype: str, budget: int) -> np.ndarray:
    """`completion_logp` without gradients over any number of rows, fp32 [N] in the order given."""
    scores = np.zeros(len(rows), dtype=np.float32)
    for batch in by_tokens([len(prompt) + len(response) for prompt, response in rows], budget):
        logp, _ = completion_logp(network, [rows[n] for n in batch], dtype)
        scores[batch] = logp.cpu().numpy()
    return scores


def save_network(network: PreTrainedModel, init: Model, folder: Path) -> Model:
    """A plain Hugging Face folder: safetensors in the initial weights' dtype, and init's tokenizer."""
    scratch = folder.with_name(".model")
    shutil.rmtree(scratch, ignore_errors=True)
    stored = json.loads((init.folder / "config.json").read_text())
    dtype = getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")
    network.generation_config = GenerationConfig()  # init's own is copied below; saving would judge its sampling
    network.to(dtype).save_pretrained(scratch)
    (scratch / "generation_config.json").unlink(missing_ok=True)
    for file in init.folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and not (scratch / file.name).exists():
            shutil.copyfile(file, scratch / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return Model(folder, "")

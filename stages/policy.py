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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from schemas import Model, WinnowError

disable_progress_bar()  # of loading weights: a step has its own
Row = tuple[Sequence[int], Sequence[int]]
THREADS = torch.get_num_threads()
CLASSIFIER = "ForSequenceClassification"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def load_network(model: Model, *, train: bool = False) -> PreTrainedModel:
    """fp32 weights, dropout off either way (a policy that drops out does not equal its own reference).

    Scoring runs on one thread of a CPU, so that a number does not depend on how many workers share the
    machine: parallelism is workers. Training takes all threads. Raises WinnowError for a classifier that
    is no reward model.
    """
    torch.set_num_threads(THREADS if train else 1)
    auto = AutoModelForSequenceClassification if is_reward_model(model) else AutoModelForCausalLM
    network = auto.from_pretrained(model.folder, dtype=torch.float32, local_files_only=True)
    if is_reward_model(network):
        check_head(network)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return network.eval()


def is_reward_model(model: Model | PreTrainedModel) -> bool:
    """Does it end in a score and not in a vocabulary? Of a folder, by its config alone."""
    if isinstance(model, Model):
        names = json.loads((model.folder / "config.json").read_text()).get("architectures") or [""]
        return str(names[0]).endswith(CLASSIFIER)
    return type(model).__name__.endswith(CLASSIFIER)


def check_head(network: PreTrainedModel) -> None:
    """`completion_scores` reads one score off the last token: refuse encoders and classifiers of several classes."""
    if not hasattr(network, "score") or network.config.num_labels != 1:
        raise WinnowError(
            f"{type(network).__name__} with {network.config.num_labels} labels is no reward model: "
            "one label, given by a layer named `score` at the last token, is what can be read"
        )


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


def completion_scores(network: PreTrainedModel, rows: Sequence[Row], dtype: str) -> Tensor:
    """The reward model's score of each response to its prompt, fp32 [N], with gradient.

    Read at each row's own last token, which transformers would guess from the pad token's id. The head is
    in fp32 whatever the network runs in: bfloat16 would round a score of 10 to 1/16.
    """
    device = next(network.parameters()).device
    ids, _, _ = _pad(rows)
    last = torch.tensor([len(prompt) + len(response) - 1 for prompt, response in rows], device=device)
    with autocast(dtype, device):
        hidden = network.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    scores: Tensor = network.score(hidden[torch.arange(len(rows), device=device), last].float())
    return scores.squeeze(-1)


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

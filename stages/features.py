"""Responses as a frozen policy sees them: what a preference head reads."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Workspace, stage
from schemas import Candidates, Features, Model, Prompts
from schemas.tables import FEATURES
from stages.groups import column_by
from stages.limits import BUDGET, check_ids

Ids = tuple[Sequence[int], Sequence[int]]


@stage(version=1)
def features(
    prompts: Prompts,
    candidates: Candidates,
    policy: Model,
    ws: Workspace,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Features:
    """Mean over a response's tokens of the policy's last hidden states, after its final norm; fp32 [hidden].

    The prompt is in the context and not in the mean, and neither is padding (the code of arXiv:2605.23244
    counts both). Responses of equal tokens go through the network once.
    """
    from stages.policy import load_network

    prompt_ids = column_by(prompts, "prompt_id", "token_ids")
    rows = [row for row in candidates.to_pylist() if row["token_ids"] or _silent(row, ws)]
    check_ids(policy, "candidates", [*prompt_ids.values(), *(row["token_ids"] for row in rows)])
    inputs = [(row["prompt_id"], tuple(row["token_ids"])) for row in rows]
    unique = list(dict.fromkeys(inputs))
    ws.count(tokens=sum(len(prompt_ids[prompt]) + len(ids) for prompt, ids in unique))
    network = ws.hold(load_network, policy)
    means = response_means(network, [(prompt_ids[prompt], ids) for prompt, ids in unique], dtype, BUDGET)
    seen = dict(zip(unique, means, strict=True))
    made = [
        {"prompt_id": row["prompt_id"], "candidate_id": row["candidate_id"], "features": seen[name]}
        for row, name in zip(rows, inputs, strict=True)
    ]
    return pa.Table.from_pylist(made, schema=FEATURES)


def _silent(row: dict[str, Any], ws: Workspace) -> bool:
    """A response without tokens has no mean: left out, and False."""
    ws.reject("empty response", place="candidates", prompt=row["prompt_id"], candidate=row["candidate_id"])
    return False


def response_means(network: Any, rows: Sequence[Ids], dtype: str, budget: int) -> np.ndarray:
    """rows: N of (prompt ids, response ids), neither empty. Returns fp32 [N, hidden], in the order given.

    Padding is on the right, where causal attention never sees it, and outside every mean.
    """
    import torch

    from stages.policy import autocast, by_tokens

    device = network.device
    means = np.zeros((len(rows), network.config.hidden_size), dtype=np.float32)
    for batch in by_tokens([len(prompt) + len(response) for prompt, response in rows], budget):
        ids, said = (torch.from_numpy(array).to(device) for array in _padded([rows[n] for n in batch]))
        with torch.inference_mode(), autocast(dtype, device):
            hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        means[batch] = ((hidden * said[..., None]).sum(1) / said.sum(1, keepdim=True)).cpu().numpy()
    return means


def _padded(rows: Sequence[Ids]) -> tuple[np.ndarray, np.ndarray]:
    """ids [N, L], and 1 where a response's token stands, fp32 [N, L]."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    said = np.zeros((len(rows), longest), dtype=np.float32)
    for n, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[n, :end] = [*prompt, *response]
        said[n, len(prompt) : end] = 1
    return ids, said

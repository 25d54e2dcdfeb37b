"""Numbers of a folder's network on this machine's CPU: what a server computes is compared with them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stages.network.forward import Measure, Row, completion_logp, completion_scores
from stages.network.load import read_network
from stages.network.packing import PromptGroup


def logp_on_cpu(folder: Path, rows: Sequence[Row], dtype: str) -> list[float]:
    """Return the summed log-prob of each response given its prompt, by the folder's network in `dtype`."""
    return _measure_on_cpu(folder, rows, dtype, lambda *arguments: completion_logp(*arguments)[0])


def scores_on_cpu(folder: Path, rows: Sequence[Row], dtype: str) -> list[float]:
    """Return the score of each prompt and response, by the folder's reward model in `dtype`."""
    return _measure_on_cpu(folder, rows, dtype, completion_scores)


@torch.inference_mode()
def _measure_on_cpu(folder: Path, rows: Sequence[Row], dtype: str, measure: Measure) -> list[float]:
    # On a CPU, because a GPU may be full of the server's own memory; row by row, because few are asked for.
    network = read_network(folder, getattr(torch, dtype)).eval()
    if hasattr(network, "score"):
        network.score.float()  # which `completion_scores` gives states in fp32
    groups = [PromptGroup(prompt, [response], masks=mask) for prompt, response, *mask in rows]
    return [float(measure(network, [group], dtype)) for group in groups]

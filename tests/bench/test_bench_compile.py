"""Layers that torch compiled: the numbers are those of plain ones. Takes some minutes of a C++ compiler."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.context import StageContext, WarmCache
from schemas import Model
from stages.network.forward import completion_logp, share_prefixes
from stages.network.load import checkpoint_layers, compile_layers
from stages.network.models import reward_head
from stages.network.packing import PromptGroup
from stages.ranking.base import Response
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from tests.stages.network.test_prefix_attention import SHARING, enlarged


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_give_the_same_gradients(checkpointed):
    """In fp32, over passes of other lengths, with and without checkpoints: to 1e-5 of the largest."""
    network = enlarged(SHARING["qwen2"]())
    share_prefixes(network)
    passes = [
        [PromptGroup([5, 6, 7], [[8], [9, 10, 11]])],
        [PromptGroup([4] * 9, [[3, 7, 12, 30], [5]]), PromptGroup([8], [[6, 6]])],
    ]

    def gradients():
        network.zero_grad()
        for groups in passes:
            completion_logp(network, groups, "float32")[0].sum().backward()
        return [weight.grad.clone() for weight in network.parameters()]

    expected = gradients()
    compile_layers(network)
    if checkpointed:
        checkpoint_layers(network)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["pairwise", "pointwise"])
def test_a_compiled_ranker_has_the_numbers_of_a_plain_one(sharp: Model, tmp_path: Path, name: str):
    """In fp32, to 1e-5: texts of several lengths, for one prompt and for another."""
    model = sharp
    if name == "pointwise":
        model = reward_head(sharp, StageContext(tmp_path, WarmCache(), lambda *_: None))
    answers = []
    for compiled in (False, True):
        opened: Any = open_ranker(rankers.bind({"name": name, "compile_layers": compiled}), model)
        if name == "pointwise":
            torch.manual_seed(0)
            opened.network.score.weight.data.normal_()
        for context in ("Please book a boat.", "A car for two on Sunday in Oslo, please."):
            pair = [opened.read(context, Response(text)) for text in ("Gladly. I have booked a boat.", "No.")]
            answers.append(opened.logits(context, [(pair[0], pair[1]), (pair[1], pair[0]), (pair[0], pair[0])]))
    plain, ours = answers[:2], answers[2:]
    assert np.abs(plain).max() > 0.1
    assert np.allclose(ours, plain, rtol=1e-5, atol=1e-5)

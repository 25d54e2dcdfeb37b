"""Heap of a training on a CPU: freed blocks go back to the system beyond what the training needs."""

import os
import subprocess
import sys

import pytest
import torch

from stages.network.forward import completion_logp
from stages.network.heap import HeapLimit, allocator, resident_bytes
from stages.network.load import layers_to_checkpoint, load_network
from stages.network.packing import PromptGroup
from tests.runs import ROOT

GROUPS = [PromptGroup([0, 5, 9], [[20, 21, 1], [30, 1]])]
pytestmark = pytest.mark.skipif(allocator() is None, reason="a heap of glibc's")


def gradients(network):
    network.zero_grad()
    completion_logp(network, GROUPS, "float32")[0].sum().backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


FREED = """
from types import SimpleNamespace

import torch

from stages.network.heap import HeapLimit, resident_bytes

network = SimpleNamespace(base_model=torch.nn.Identity())
torch.empty(1 << 22)  # of 16 MiB: having freed it, glibc takes blocks of up to this size from its heap
blocks = [torch.ones(1 << 18) for _ in range(128)]
del blocks[::2]  # no two neighbours: a small block between them might lie in an older hole, and the free ones be one
before = resident_bytes()
HeapLimit(network, [], before, need=1 << 30).check()
assert resident_bytes() > before - (1 << 24)
HeapLimit(network, [], 0, need=0).check()
assert resident_bytes() < before - (1 << 25)
assert len(blocks) == 64
"""


def test_freed_blocks_between_others_go_back_beyond_the_limit():
    """64 MiB in blocks that others keep apart: below the limit they stay, beyond it they are the system's.

    In a process of its own: where glibc puts a block depends on all that was freed before.
    """
    # Without the variables that vLLM sets for its children, such as LD_PRELOAD: they lay the heap out otherwise.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_limit_is_kept_to_at_every_layer_and_the_head_and_changes_no_gradient(sharp, monkeypatch):
    """Forward and backward; a limit below what is in use is raised, so that not every layer trims."""
    network = load_network(sharp, train=True)
    expected = gradients(network)
    heap = HeapLimit(network, layers_to_checkpoint(network), 0, need=0)
    checks = []
    monkeypatch.setattr(heap, "check", lambda: checks.append(torch.is_grad_enabled()))
    layers = network.config.num_hidden_layers
    again = gradients(network)
    assert len(checks) == 2 * (layers + 1)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    monkeypatch.undo()
    heap.check()
    assert heap.trims == 1
    assert heap.limit > resident_bytes()

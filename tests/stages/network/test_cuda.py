"""On a GPU: the numbers of its kernels against fp32 on the CPU. `WINNOW_TEST_DEVICE=cuda pytest` runs them."""

import copy

import pytest
import torch
import transformers

from stages.network import prefix_attention
from stages.network.device import say_precision
from stages.network.forward import completion_logp, share_prefixes, uses_shared_prefix
from stages.network.packing import PromptGroup, pack
from stages.network.prefix_attention import VariableLengthAttention, masked_attention
from stages.network.working_weights import round_linear_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
VOCABULARY = 3000
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (3e-2, 3e-2)}  # nats per token; of the gradient's norm


def some_groups():
    """Ragged prompts and responses, some of one token, which packs none but its prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(least, most):
        size = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    groups = [PromptGroup(ids(20, 200), [ids(1, 90) for _ in range(5)]) for _ in range(4)]
    return [
        *groups,
        PromptGroup([5, 9, 11], [[7]]),
        PromptGroup(ids(70, 71), [[8], [9], [10, 11]]),
        PromptGroup([4], [[6]]),
    ]


@pytest.fixture(scope="module")
def networks():
    """The same network on the CPU and on the GPU."""
    say_precision()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        network.lm_head.weight.mul_(4)
    on_gpu = copy.deepcopy(network).cuda()
    share_prefixes(network)
    share_prefixes(on_gpu, "bfloat16")
    assert uses_shared_prefix(on_gpu)
    return network, on_gpu


def logp_and_gradient(network, dtype):
    network.zero_grad(set_to_none=True)
    logp, _ = completion_logp(network, some_groups(), dtype)
    (torch.linspace(-1, 1, len(logp), device=logp.device) * logp).sum().backward()
    return logp.detach().cpu(), torch.cat([weight.grad.flatten().cpu() for weight in network.parameters()])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kept", [None, 1 << 18])
def test_log_probs_and_gradients_are_those_of_a_cpu(networks, dtype, kept, monkeypatch):
    """In both precisions, with all of the head's probabilities kept, and with a few."""
    if kept:
        monkeypatch.setattr("stages.network.lm_head.kept_bytes", lambda _: kept)
    expected, expected_gradient = logp_and_gradient(networks[0], "float32")
    logp, gradient = logp_and_gradient(networks[1], dtype)
    lengths = torch.tensor([len(response) for group in some_groups() for response in group.responses])
    of_logp, of_gradient = TOLERANCE[dtype]
    assert ((logp - expected) / lengths).abs().max() <= of_logp
    assert (gradient - expected_gradient).norm() <= of_gradient * expected_gradient.norm()


@pytest.mark.parametrize("size", [64, 72, 80, 128, 256])
def test_flash_attention_is_the_masked_one(size):
    """Of heads of this size; output and gradients, bfloat16 against fp32."""
    say_precision()
    layout = pack(some_groups(), "cuda").layout
    assert layout
    tokens = len(layout.mask)
    results = []
    for attend, dtype in ((masked_attention, torch.float32), (VariableLengthAttention.apply, torch.bfloat16)):
        torch.manual_seed(0)
        parts = [torch.randn(tokens, heads, size, device="cuda") for heads in (8, 2, 2)]
        parts = [part.to(dtype).requires_grad_() for part in parts]
        q, k, v = parts
        out = attend(q, k, v, layout, size**-0.5)
        (out.float() * torch.randn(out.shape, device="cuda")).sum().backward()
        results.append([tensor.detach().float() for tensor in (out, *(part.grad for part in parts))])
    for expected, ours in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-2 * expected.norm()


def test_passes_in_bf16_take_flash_attention(networks, monkeypatch):
    """In each layer, and in fp32 in none."""
    layers = []

    class Spy(VariableLengthAttention):
        @staticmethod
        def forward(ctx, *args):
            layers.append(args[0].dtype)
            return VariableLengthAttention.forward(ctx, *args)

    monkeypatch.setattr(prefix_attention, "VariableLengthAttention", Spy)
    for dtype in TOLERANCE:
        completion_logp(networks[1], some_groups(), dtype)
    assert layers == [torch.bfloat16] * 4


def test_linear_layers_in_bf16_are_the_numbers_of_autocast(networks):
    """Bit for bit, from half the memory."""
    network = copy.deepcopy(networks[1])
    share_prefixes(network, "bfloat16")
    with torch.no_grad():
        expected = completion_logp(network, some_groups(), "bfloat16")[0]
        round_linear_layers(network)
        assert torch.equal(completion_logp(network, some_groups(), "bfloat16")[0], expected)
    assert network.lm_head.weight.dtype == torch.bfloat16

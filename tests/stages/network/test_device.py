"""What a GPU computes, without one: its algorithms on emulated kernels, and bytes and kernels of fake CUDA tensors."""

from collections import Counter as Counts
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schemas import WinnowError
from stages.limits import LOGITS_AT_ONCE
from stages.network import forward, lm_head, prefix_attention
from stages.network.forward import (
    completion_logp,
    hidden_states,
    logp_of,
    next_logits,
    response_means,
    share_prefixes,
)
from stages.network.lm_head import LMHead
from stages.network.load import compile_layers
from stages.network.packing import PromptGroup, pack
from stages.network.prefix_attention import VariableLengthAttention, masked_attention
from stages.network.working_weights import WorkingWeights, round_linear_layers
from tests.stages.network.test_prefix_attention import SHARING, enlarged, prompt_groups

BF16 = 2.0**-8  # a step of bfloat16, as a fraction


def spans(queries, keys):
    """Each segment's queries and keys, from their cumulative lengths."""
    ends = zip(queries[:-1].tolist(), queries[1:].tolist(), keys[:-1].tolist(), keys[1:].tolist(), strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in ends]


def scores(q, k, causal, scale):
    s = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return s.masked_fill(~torch.ones(s.shape[1:], dtype=torch.bool).tril(), -torch.inf) if causal else s


def emulated_flash(q, k, v, cum_q, cum_k, most_q, most_k, dropout, causal, debug, *, scale):
    """aten._flash_attention_forward in plain torch, by its documentation: log-sum-exps are [heads, tokens]."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf)
    for rows, columns in spans(cum_q, cum_k):
        assert rows.stop - rows.start <= most_q
        assert columns.stop - columns.start <= most_k
        s = scores(q[rows], k[columns], causal, scale)
        lse[:, rows] = s.logsumexp(-1)
        values = v[columns].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(out.dtype)
    return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)


def emulated_flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, most_q, most_k, dropout, causal, rng_state, unused, *, scale
):
    """aten._flash_attention_backward: weights are exp(score - log-sum-exp), whatever that was added up over."""
    dq, dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v))
    heads = q.shape[1] // k.shape[1]
    delta = (grad.float() * out.float()).sum(-1).T
    for rows, columns in spans(cum_q, cum_k):
        key, value = (tensor[columns].float().repeat_interleave(heads, 1) for tensor in (k, v))
        weights = (scores(q[rows], k[columns], causal, scale) - lse[:, rows, None]).exp()
        of_weights = torch.einsum("qhd,khd->hqk", grad[rows].float(), value)
        of_scores = weights * (of_weights - delta[:, rows, None]) * scale
        dq[rows] += torch.einsum("hqk,khd->qhd", of_scores, key)
        for total, part in (
            (dk, torch.einsum("hqk,qhd->khd", of_scores, q[rows].float())),
            (dv, torch.einsum("hqk,qhd->khd", weights, grad[rows].float())),
        ):
            total[columns] += part.unflatten(1, (-1, heads)).sum(2)
    return tuple(total.to(tensor.dtype) for total, tensor in zip((dq, dk, dv), (q, k, v), strict=True))


@pytest.fixture
def flash(monkeypatch):
    """Let variable-length attention run on emulated kernels."""
    monkeypatch.setattr(prefix_attention, "_varlen_flash", emulated_flash)
    monkeypatch.setattr(prefix_attention, "_varlen_flash_backward", emulated_flash_backward)


def attended(attend, layout, tokens, heads, dtype):
    """Return output and gradients of q, k and v, in fp32."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(tokens, n, 8, generator=generator).to(dtype).requires_grad_() for n in (heads[0], *heads[1:] * 2)
    ]
    out = attend(*parts, layout, 0.5)
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    return [tensor.detach().float() for tensor in (out, *(part.grad for part in parts))]


@settings(deadline=None, max_examples=20)
@given(groups=prompt_groups(), heads=st.sampled_from([(4, 4), (4, 2)]), last=st.booleans())
def test_two_variable_length_calls_are_the_masked_attention(groups, heads, last):
    """In fp32 to 1e-5 of the largest number; in bf16 to ten of its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_attention, "_varlen_flash", emulated_flash)
        patch.setattr(prefix_attention, "_varlen_flash_backward", emulated_flash_backward)
        packed = pack(groups, last=last)
        shape = packed.layout, packed.ids.shape[1], heads
        expected = attended(masked_attention, *shape, torch.float32)
        ours = attended(VariableLengthAttention.apply, *shape, torch.float32)
        rounded = attended(VariableLengthAttention.apply, *shape, torch.bfloat16)
    for want, fp32, bf16 in zip(expected, ours, rounded, strict=True):
        largest = float(want.abs().max())
        assert float((fp32 - want).abs().max()) <= 1e-5 * max(1.0, largest)
        assert float((bf16 - want).abs().max()) <= 10 * BF16 * max(1.0, largest)


def test_a_network_on_variable_length_attention_is_the_network_on_tiles(flash, monkeypatch):
    """Log-probs and all gradients, to 1e-5: the attention is chosen by device, and the rest of a pass is the same."""
    network = enlarged(SHARING["qwen2"]())
    share_prefixes(network)
    groups = [
        PromptGroup([5, 6, 7], [[8], [9, 10, 11], [9, 12]]),
        PromptGroup([4], [[3]]),
        PromptGroup([9] * 6, [[3] * 5]),
    ]
    results = []
    for attend in (prefix_attention.MergedAttention, VariableLengthAttention):
        monkeypatch.setattr(prefix_attention, "MergedAttention", attend)
        network.zero_grad()
        logp = completion_logp(network, groups, "float32")[0]
        (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
        results.append([logp.detach(), *(weight.grad.clone() for weight in network.parameters())])
    for tiles, variable in zip(*results, strict=True):
        assert float((tiles - variable).norm()) <= 1e-5 * max(1.0, float(tiles.norm()))


HEADS = {
    "plain": dict(scale=1.0, soft_cap=None, biased=False),
    "scaled, biased": dict(scale=0.5, soft_cap=None, biased=True),
    "capped": dict(scale=1.0, soft_cap=3.0, biased=False),
}


def head_results(apply, dtype, kind, frozen=False):
    """Return log-probs, which are likeliest, and gradients of states, weight and bias."""
    options = HEADS[kind]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(23, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_(not frozen)
    bias = torch.randn(50, generator=generator).requires_grad_(not frozen) if options["biased"] else None
    targets = torch.randint(50, (23,), generator=generator)
    head = LMHead(weight, bias, options["scale"], options["soft_cap"])
    logp, is_correct = apply(states, head, targets)
    (logp * torch.linspace(-1, 2, 23)).sum().backward()
    gradients = [part.grad for part in (states, weight, bias) if part is not None and part.requires_grad]
    return [logp.detach(), is_correct.float(), *gradients]


def kept(states, head, targets):
    low = head.weight.detach().to(states.dtype)
    return lm_head._KeptLogp.apply(states, head.weight, head.bias, low, head, targets)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("at_once", [50, 350, 1 << 20])
def test_a_head_that_keeps_probabilities_is_the_one_that_computes_them_again(kind, frozen, at_once, monkeypatch):
    """To 1e-5 in fp32, however many rows at once; gradients in bf16 to three of its steps of the largest."""
    expected = head_results(lm_head.token_logp, torch.float32, kind, frozen)
    low_expected = head_results(lm_head.token_logp, torch.bfloat16, kind, frozen)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    for ours, want in zip(head_results(kept, torch.float32, kind, frozen), expected, strict=True):
        assert torch.allclose(ours, want, rtol=1e-5, atol=1e-5)
    for ours, want in zip(head_results(kept, torch.bfloat16, kind, frozen), low_expected, strict=True):
        assert ours.dtype == want.dtype
        assert float((ours.float() - want.float()).abs().max()) <= 3 * BF16 * float(want.float().abs().max())


def test_a_likely_target_keeps_its_gradient_in_bf16():
    """p = 1 - 1e-5 is 1 in bf16: d log p / d logit of the target, 1 - p, must not be 0."""
    states = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[11.5], [0.0]], requires_grad=True)
    logp, _ = kept(states, LMHead(weight, None, 1.0, None), torch.tensor([0]))
    logp.sum().backward()
    assert weight.grad[0, 0].item() == pytest.approx(-np.expm1(logp.item()), rel=BF16)
    assert weight.grad[0, 0] > 0


@pytest.mark.parametrize("name", SHARING)
def test_linear_layers_in_bf16_give_the_numbers_of_autocast(name):
    """Bit for bit, log-probs and states of all kinds of networks, with a bias, tied, capped or scaled."""
    network = enlarged(SHARING[name]())
    share_prefixes(network)
    groups = [PromptGroup([5, 6, 7], [[8], [9, 10, 11]]), PromptGroup([4] * 9, [[3, 7, 12, 30]])]
    with torch.no_grad():
        expected = [measure(network, groups, "bfloat16") for measure in (logp_of, response_means, next_logits)]
        round_linear_layers(network)
        ours = [measure(network, groups, "bfloat16") for measure in (logp_of, response_means, next_logits)]
    rounded = sum(weight.numel() for weight in network.parameters() if weight.dtype == torch.bfloat16)
    assert rounded > 0.6 * sum(weight.numel() for weight in network.parameters())
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("name", SHARING)
def test_a_step_on_working_weights_has_the_gradients_of_autocast(name):
    """Bit for bit, over two passes of two steps; outside of passes the network has its fp32 weights."""
    network = enlarged(SHARING[name]())
    share_prefixes(network)
    passes = [[PromptGroup([5, 6, 7], [[8], [9, 10, 11]])], [PromptGroup([4] * 9, [[3, 7, 12, 30]])]]
    working = WorkingWeights(network)

    def step(context):
        network.zero_grad(set_to_none=True)
        with context:
            for groups in passes:
                completion_logp(network, groups, "bfloat16")[0].sum().backward()
        return [weight.grad.clone() for weight in network.parameters()]

    for _ in range(2):
        expected = step(nullcontext())
        assert all(map(torch.equal, step(working.passes()), expected))
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1.25)
    assert len(working.weights) >= 6 * 2


VIEWS = (
    "view", "_unsafe_view", "expand", "t.", "transpose", "slice", "select", "detach", "alias", "split", "permute",
    "unsqueeze", "squeeze", "as_strided", "arange", "empty", "unflatten", "_reshape_alias", "lift", "new_empty",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Bytes that kernels read and write, each tensor of their arguments and results once, and how often each runs."""

    def __init__(self):
        super().__init__()
        self.bytes = self.largest = 0
        self.calls: Counts[str] = Counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.").partition(".")[0]
        if not name.startswith((*VIEWS, "prim")):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
            touched = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
            if name in ("gather", "scatter_"):  # one number of each row
                touched = [16 * len(args[0])]
            elif name.endswith("_"):  # in place: read and written
                touched.append(touched[0])
            self.bytes += sum(touched)
            self.largest = max(self.largest, *(tensor.numel() for tensor in tensors.values()))
            self.calls[name] += 1
        return out


def test_the_head_reads_and_writes_little_more_than_its_logits():
    """8,192 tokens of an 8B's head."""
    vocabulary, hidden, n = 128256, 4096, 8192
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "kept_bytes", lambda _: 5 << 30)
        weight = torch.empty(vocabulary, hidden, requires_grad=True)
        states = torch.empty(n, hidden, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(n, dtype=torch.long)
        head = LMHead(weight, None, 1.0, None)
        unfused = Counter()

        def counted(*args):
            with unfused:
                return softmax_rows(*args)

        softmax_rows = lm_head._softmax
        patch.setattr(lm_head, "_softmax", counted)
        with Counter() as ahead:
            logp, _ = lm_head.token_logp(states, head, targets)
        with Counter() as back:
            logp.sum().backward()
    once = 2 * 4 * n * vocabulary + 4 * vocabulary * hidden  # a read and a write of fp32 logits, and the head
    assert back.bytes <= 1.5 * once
    # Of the softmax as torch.compile has it, two reads of the logits and one write of the probabilities.
    softmax = (2 * 4 + 2) * n * vocabulary
    assert ahead.bytes - unfused.bytes + softmax + back.bytes <= 2 * 1.55 * once
    assert sum(ahead.calls.values()) <= 70
    assert sum(back.calls.values()) <= 14


def test_a_layer_has_two_attentions_and_no_mask():
    """7,656 tokens: no tensor of a number per pair of tokens; kernels and bytes at most what they are today."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=4, attn_implementation="sdpa",
    )  # fmt: skip
    groups = [PromptGroup([5] * 512, [[n] * 256 for n in range(8)]) for _ in range(3)]
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_attention, "has_flash", lambda *_: True)
        patch.setattr(forward, "autocast", lambda *_: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        network = transformers.LlamaForCausalLM(config).bfloat16()
        network.set_attn_implementation(prefix_attention.NAME)
        with Counter() as ahead:
            states, _ = hidden_states(network, groups, "bfloat16")
        with Counter() as back:
            states.sum().backward()
    tokens, stream = states.numel() // config.hidden_size, 2 * states.numel()
    assert ahead.largest <= tokens * config.intermediate_size < tokens**2 / 2
    assert back.largest <= tokens * config.intermediate_size
    assert ahead.calls["_flash_attention_forward"] == back.calls["_flash_attention_backward"] == 2
    print(ahead.bytes / stream, back.bytes / stream, sum(ahead.calls.values()), sum(back.calls.values()))
    assert ahead.bytes <= 120 * stream
    assert back.bytes <= 290 * stream


def test_layers_that_cannot_be_compiled_are_refused(monkeypatch):
    """A GPU without Triton, before the first step."""
    network = enlarged(SHARING["llama"]())
    monkeypatch.setattr("stages.network.load.can_compile", lambda _: False)
    with pytest.raises(WinnowError, match="compile_layers: Triton is not installed"):
        compile_layers(network)

"""One forward pass for a prompt and all of its responses, against one padded row for each.

The law: log p(y_k | x), and the gradient of any function of all of them, do not depend on how the tokens were laid out.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from stages.network.forward import (
    _own_logp,
    _sums,
    completion_logp,
    next_logits,
    response_means,
    share_prefixes,
    shares,
)
from stages.network.packing import PassSize, PromptGroup, fill, pack, pad, split
from stages.network.prefix_attention import NAME, Merged, masked_attention
from stages.training.distributed import Distributed
from stages.training.throughput import ThroughputMeter

VOCABULARY = 61
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
SHARING = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8)),
    "gemma2, capped head": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=2.0)
    ),
    "phi, biased head": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "cohere, scaled head": lambda: CohereForCausalLM(CohereConfig(**SIZES)),
    "granite, divided head": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
}
PLAIN = {
    "gemma2, capped attention": (
        lambda: Gemma2ForCausalLM._from_config(Gemma2Config(**GROUPED, head_dim=8), attn_implementation="eager"),
        "softcap",
    ),
    "gpt-oss, sinks": (
        lambda: GptOssForCausalLM._from_config(
            GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None),
            attn_implementation="eager",
        ),
        "s_aux",
    ),
    "mamba, a state": (lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32)), "Mamba"),
    "bloom, alibi": (lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4)), "Bloom"),
}


def spread(network):
    """Larger weights, so that predictions are far from uniform and every token matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.25) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    return network.eval()


def shared(make):
    network = spread(make())
    share_prefixes(network)
    return network


@pytest.fixture(scope="module", params=SHARING)
def network(request):
    made = shared(SHARING[request.param])
    assert shares(made)
    return made


def test_filled_up_rows_weigh_nothing_however_large_the_scores():
    """Scores of a hundred nats and more, ragged responses: what fills up a row must not overflow into its gradient."""
    network = shared(SHARING["llama"])
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    rng = np.random.default_rng(0)

    def some(least, most):
        return rng.integers(3, VOCABULARY, rng.integers(least, most)).tolist()

    asked = [PromptGroup(some(8, 9), [some(2, 13) for _ in range(6)]) for _ in range(4)]
    ours = gradients(network, completion_logp(network, asked, "float32")[0])
    for name, each in gradients(network, plain(network, asked)).items():
        assert float((ours[name] - each).norm()) <= 1e-3 * float(each.norm()), name


ids = st.integers(3, VOCABULARY - 1)
tokens = st.lists(ids, min_size=1, max_size=9)


@st.composite
def groups(draw):
    """1 to 3 prompts with 1 to 16 ragged responses, equal ones and prefixes of others among them."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        responses = draw(st.lists(tokens, min_size=1, max_size=12))
        again = draw(st.lists(st.sampled_from(responses), max_size=2))
        cut = [
            each[: draw(st.integers(1, len(each)))] for each in draw(st.lists(st.sampled_from(responses), max_size=2))
        ]
        made.append(PromptGroup(draw(tokens), draw(st.permutations([*responses, *again, *cut]))))
    return made


def slopes(count):
    """Some fixed, uneven d loss / d log-prob."""
    return torch.linspace(-1, 2, count) if count > 1 else torch.ones(1)


def gradients(network, logp):
    network.zero_grad()
    (logp * slopes(len(logp))).sum().backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def plain(network, asked):
    """transformers' own logits of one padded row a response."""
    logp, _, rows = _own_logp(network, asked, "float32")
    return _sums(logp, rows)


@settings(deadline=None, max_examples=12)
@given(asked=groups())
@example(asked=[PromptGroup([5], [[7]])])
@example(asked=[PromptGroup([5, 6], [[7], [7], [8]])])
@example(
    asked=[
        PromptGroup([5, 6], [[7, 8, 9], [7, 8], [7]]),
        PromptGroup([9, 4], [[3], [5, 5, 5, 5]]),
        PromptGroup([9], [[3]]),
    ]
)
def test_log_probs_and_all_gradients_are_those_of_plain_rows(network, asked):
    """To 1e-5 relative, in fp32. A parameter's gradient that is small against the largest (queries and keys where
    there is one key have none at all) is rounding of larger numbers: it counts with half of the largest."""
    found, expected = completion_logp(network, asked, "float32")[0], plain(network, asked)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(network, found), gradients(network, expected)
    assert ours.keys() == theirs.keys()
    top = max(float(each.norm()) for each in theirs.values())
    for name, each in theirs.items():
        assert float((ours[name] - each).norm()) <= 1e-5 * max(float(each.norm()), 0.5 * top), name


@settings(deadline=None, max_examples=10)
@given(asked=groups())
def test_other_readings_are_those_of_plain_rows(network, asked):
    """Mean hidden states over a response, and the network's own logits of the token after it."""
    means, logits = response_means(network, asked, "float32"), next_logits(network, asked, "float32")
    rows = [(group.prompt, response) for group in asked for response in group.responses]
    for mean, after, (prompt, response) in zip(means, logits, rows, strict=True):
        seen = network(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
        assert torch.allclose(after, seen.logits[0, -1], rtol=1e-4, atol=1e-4)
        assert torch.allclose(mean, seen.hidden_states[-1][0, len(prompt) :].mean(0), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(asked=groups(), heads=st.sampled_from([(4, 4), (4, 2)]))
def test_the_mask_and_the_merge_are_one_attention(asked, heads):
    """On a GPU a mask says who sees whom; on a CPU two parts are merged. Outputs and gradients agree."""
    packed = pack(asked)
    layout, count = packed.layout, packed.ids.shape[1]
    assert layout is not None
    torch.manual_seed(0)
    ends = []
    for attend in (Merged.apply, masked_attention):
        torch.manual_seed(0)
        q, k, v = parts = [torch.randn(count, n, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
        out = attend(q, k, v, layout, 0.5)
        (out * torch.randn_like(out)).sum().backward()
        ends.append([out, *(part.grad for part in parts)])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_networks_that_cannot_share_say_so_and_read_plain_rows(name):
    """A cap or a sink in attention, a state, a bias of positions: the trial, not a list of names, finds them out."""
    make, why = PLAIN[name]
    network = spread(make())
    with pytest.warns(UserWarning, match=f"reads a prompt again for each of its responses.*|{why}") as seen:
        share_prefixes(network)
    assert any(why in str(each.message) for each in seen)
    assert not shares(network)
    asked = [PromptGroup([5, 6], [[7, 8], [9]])]
    assert torch.allclose(completion_logp(network, asked, "float32")[0], plain(network, asked), rtol=1e-6)
    ThroughputMeter(network, Distributed())  # counts whatever way the network passes its tokens on
    completion_logp(network, asked, "float32")[0].sum().backward()


def test_an_encoder_decoder_says_so_and_gives_its_own_log_probs():
    """T5: log p(y | x) is that of its cross-entropy on labels, one unpadded row at a time."""
    sizes = dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    network = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).eval()
    with pytest.warns(UserWarning, match="T5.*again for each.*encoder-decoder"):
        share_prefixes(network)
    asked = [PromptGroup([5, 6, 9], [[7, 8], [9], [4, 4, 4, 1]]), PromptGroup([8], [[3, 1]])]
    rows = [(group.prompt, response) for group in asked for response in group.responses]
    found, hits = completion_logp(network, asked, "float32")
    for value, right, (prompt, response) in zip(found, hits, rows, strict=True):
        own = network(input_ids=torch.tensor([prompt]), labels=torch.tensor([response]))
        assert value.item() == pytest.approx(-own.loss.item() * len(response), rel=1e-5)
        assert right == (own.logits[0].argmax(-1) == torch.tensor(response)).sum()


def test_a_window_shorter_than_the_reach_is_read_plainly_and_right():
    """A window of 12 tokens: rows of 12 share their prompt, rows of 13 do not, and both are what plain rows give."""
    network = shared(lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=12)))
    short, long = [PromptGroup([5, 6, 7, 8], [[9] * 8, [10]])], [PromptGroup([5, 6, 7, 8], [[9] * 9, [10]])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shares(network, short)
    with pytest.warns(UserWarning, match="again for each of its responses where they reach beyond its window of 12"):
        assert not shares(network, long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not shares(network, long)  # said once
    for asked in (short, long):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = completion_logp(network, asked, "float32")[0]
        assert torch.allclose(found, plain(network, asked), rtol=1e-5, atol=1e-5)


def test_responses_do_not_see_each_other(network):
    """Changing one response leaves every other log-prob as it was."""
    asked, other = (
        PromptGroup([5, 6, 7], [[8, 9, 10], [11, 12]]),
        PromptGroup([5, 6, 7], [[8, 9, 10], [20, 30, 40, 50]]),
    )
    one, two = (completion_logp(network, [each], "float32")[0] for each in (asked, other))
    assert one[0].item() == pytest.approx(two[0].item(), rel=1e-6)
    assert abs(one[1] - two[1]).item() > 1e-3


@settings(deadline=None)
@given(asked=groups())
def test_nothing_is_packed_twice(asked):
    """T = sum over prompts of P + sum over different responses of (R - 1); padded, N rows as wide as the longest."""
    total = sum(len(group.prompt) + sum(len(each) - 1 for each in set(map(tuple, group.responses))) for group in asked)
    packed, padded = pack(asked), pad(asked)
    assert packed.ids.shape == (1, total)
    rows = [len(group.prompt) + len(each) for group in asked for each in group.responses]
    assert padded.ids.shape == (len(rows), max(rows))
    assert len(packed.rows) == len(rows)


@settings(deadline=None)
@given(asked=groups(), budget=st.integers(1, 80), is_shared=st.booleans())
def test_fill_and_split_keep_the_budget_and_lose_nothing(asked, budget, is_shared):
    """Every group in one batch, every response in one part; over the budget only what is one group, or one response."""
    batches = list(fill(asked, budget, is_shared))
    assert sorted(n for batch in batches for n in batch) == list(range(len(asked)))
    for batch in batches:
        assert len(batch) == 1 or PassSize.of([asked[n] for n in batch], is_shared).size <= budget
    for group in asked:
        parts = split(group, budget, is_shared)
        assert [n for part in parts for n in part] == list(range(len(group.responses)))
        for part in parts:
            whole = PromptGroup(group.prompt, [group.responses[n] for n in part])
            assert len(part) == 1 or PassSize.of([whole], is_shared).size <= budget


def test_the_trial_leaves_the_attention_in_place():
    """After sharing, a plain call of the network (generation, say) computes what it did before."""
    network = spread(LlamaForCausalLM(LlamaConfig(**GROUPED)))
    padded = dict(
        input_ids=torch.tensor([[2, 2, 5, 6], [5, 6, 7, 8]]), attention_mask=torch.tensor([[0, 0, 1, 1], [1] * 4])
    )
    before = network(**padded).logits
    share_prefixes(network)
    assert network.config._attn_implementation == NAME
    assert torch.equal(network(**padded).logits, before)

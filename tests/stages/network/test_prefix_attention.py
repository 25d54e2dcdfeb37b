"""One forward pass for a prompt and all of its responses, against one padded row for each.

The law: log p(y_k | x), and the gradient of any function of all of them, do not depend on how the tokens were laid out.
"""

import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.network.forward import completion_logp, next_logits, response_means, share_prefixes, uses_shared_prefix
from stages.network.packing import PromptGroup, batch_by_tokens, forward_tokens, pack, pad, split_responses
from stages.network.prefix_attention import NAME, MergedAttention, masked_attention
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
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "gemma2, capped head": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=2.0)
    ),
    "phi, biased head": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)),
    "cohere, scaled head": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES)),
    "granite, divided head": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, logits_scaling=3.0)
    ),
}
PLAIN = {
    "gemma2, capped attention": (
        lambda: transformers.Gemma2ForCausalLM._from_config(
            transformers.Gemma2Config(**GROUPED, head_dim=8), attn_implementation="eager"
        ),
        "softcap",
    ),
    "gpt-oss, sinks": (
        lambda: transformers.GptOssForCausalLM._from_config(
            transformers.GptOssConfig(
                **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None
            ),
            attn_implementation="eager",
        ),
        "s_aux",
    ),
    "mamba, a state": (
        lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32)),
        "Mamba",
    ),
    "bloom, alibi": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4)
        ),
        "Bloom",
    ),
}


def enlarged(network):
    """The network with larger weights, so that predictions are far from uniform and every token matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.25) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    return network.eval()


def sharing(make):
    network = enlarged(make())
    share_prefixes(network)
    return network


@pytest.fixture(scope="module", params=SHARING)
def network(request):
    """Return a network that computes a prompt once for its responses."""
    network = sharing(SHARING[request.param])
    assert uses_shared_prefix(network)
    return network


ids = st.integers(3, VOCABULARY - 1)
tokens = st.lists(ids, min_size=1, max_size=9)


@st.composite
def prompt_groups(draw):
    """1 to 3 prompts with 1 to 16 ragged responses, equal ones and prefixes of others among them."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        responses = draw(st.lists(tokens, min_size=1, max_size=12))
        again = draw(st.lists(st.sampled_from(responses), max_size=2))
        originals = draw(st.lists(st.sampled_from(responses), max_size=2))
        cut = [response[: draw(st.integers(1, len(response)))] for response in originals]
        groups.append(PromptGroup(draw(tokens), draw(st.permutations([*responses, *again, *cut]))))
    return groups


def slopes(count):
    """Some fixed, uneven d loss / d log-prob."""
    return torch.linspace(-1, 2, count) if count > 1 else torch.ones(1)


def gradients(network, logp):
    network.zero_grad()
    (logp * slopes(len(logp))).sum().backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def padded_logp(network, groups):
    """Log-probs from transformers' own logits of one padded row per response."""
    tokens = pad(groups)
    logits = network(input_ids=tokens.ids, use_cache=False).logits.flatten(0, 1)[tokens.predictors]
    logp = logits.float().log_softmax(-1).gather(1, tokens.targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in logp.split(tokens.lengths.tolist())])


@settings(deadline=None, max_examples=12)
@given(groups=prompt_groups())
@example(groups=[PromptGroup([5], [[7]])])
@example(groups=[PromptGroup([5, 6], [[7], [7], [8]])])
@example(
    groups=[
        PromptGroup([5, 6], [[7, 8, 9], [7, 8], [7]]),
        PromptGroup([9, 4], [[3], [5, 5, 5, 5]]),
        PromptGroup([9], [[3]]),
    ]
)
def test_log_probs_and_all_gradients_are_those_of_plain_rows(network, groups):
    """To 1e-5 relative, in fp32. A parameter's gradient that is small against the largest (queries and keys where
    there is one key have none at all) is rounding of larger numbers: it counts with half of the largest."""
    logp, expected = completion_logp(network, groups, "float32")[0], padded_logp(network, groups)
    assert torch.allclose(logp, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(network, logp), gradients(network, expected), 0.5)


def assert_same_gradients(ours, theirs, fraction):
    """To 1e-5 of each parameter's norm, or of this fraction of the largest norm."""
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), fraction * largest), name


def test_padding_weighs_nothing_however_large_the_scores():
    """Scores of a hundred nats and more, ragged responses: what pads a row must not overflow into its gradient."""
    network = sharing(SHARING["llama"])
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    rng = np.random.default_rng(0)

    def some(least, most):
        return rng.integers(3, VOCABULARY, rng.integers(least, most)).tolist()

    groups = [PromptGroup(some(8, 9), [some(2, 13) for _ in range(6)]) for _ in range(4)]
    ours = gradients(network, completion_logp(network, groups, "float32")[0])
    for name, expected in gradients(network, padded_logp(network, groups)).items():
        assert float((ours[name] - expected).norm()) <= 1e-3 * float(expected.norm()), name


@settings(deadline=None, max_examples=5)
@given(groups=prompt_groups())
def test_other_forward_passes_are_those_of_plain_rows(network, groups):
    """Mean hidden states over a response, and the network's own logits of the token after it."""
    means, logits = response_means(network, groups, "float32"), next_logits(network, groups, "float32")
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    for mean, after, (prompt, response) in zip(means, logits, rows, strict=True):
        plain = network(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
        assert torch.allclose(after, plain.logits[0, -1], rtol=1e-4, atol=1e-4)
        assert torch.allclose(mean, plain.hidden_states[-1][0, len(prompt) :].mean(0), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(groups=prompt_groups(), heads=st.sampled_from([(4, 4), (4, 2)]))
def test_the_mask_and_the_merge_are_one_attention(groups, heads):
    """On a GPU a mask says which token attends to which; on a CPU two parts are merged. Outputs and gradients agree."""
    packed = pack(groups)
    layout, count = packed.layout, packed.ids.shape[1]
    assert layout is not None
    results = []
    for attend in (MergedAttention.apply, masked_attention):
        torch.manual_seed(0)
        q, k, v = parts = [torch.randn(count, n, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
        out = attend(q, k, v, layout, 0.5)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, *(part.grad for part in parts)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_networks_that_cannot_share_prefixes_say_so_and_use_padded_rows(name):
    """A cap or a sink in attention, a state, a bias of positions: the trial, not a list of names, finds them out."""
    make, why = PLAIN[name]
    network = enlarged(make())
    with pytest.warns(UserWarning, match=f"computes a prompt again for each of its responses.*|{why}") as caught:
        share_prefixes(network)
    (text,) = (str(warning.message) for warning in caught if why in str(warning.message))
    assert "the results are the same" in text
    assert "ValueError" not in text, "it is no failure"
    assert not uses_shared_prefix(network)
    groups = [PromptGroup([5, 6], [[7, 8], [9]])]
    assert torch.allclose(completion_logp(network, groups, "float32")[0], padded_logp(network, groups), rtol=1e-6)
    ThroughputMeter(network, Distributed())  # counts however the network passes its tokens on
    completion_logp(network, groups, "float32")[0].sum().backward()


def test_an_encoder_decoder_says_so_and_gives_its_own_log_probs():
    """T5: log p(y | x) is that of its cross-entropy on labels, one unpadded row at a time."""
    sizes = dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes)).eval()
    with pytest.warns(UserWarning, match="T5.*again for each.*encoder-decoder"):
        share_prefixes(network)
    groups = [PromptGroup([5, 6, 9], [[7, 8], [9], [4, 4, 4, 1]]), PromptGroup([8], [[3, 1]])]
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    logp, n_correct = completion_logp(network, groups, "float32")
    for value, correct, (prompt, response) in zip(logp, n_correct, rows, strict=True):
        plain = network(input_ids=torch.tensor([prompt]), labels=torch.tensor([response]))
        assert value.item() == pytest.approx(-plain.loss.item() * len(response), rel=1e-5)
        assert correct == (plain.logits[0].argmax(-1) == torch.tensor(response)).sum()


def test_rows_longer_than_the_window_are_padded_and_right():
    """A window of 12 tokens: rows of 12 share their prompt, rows of 13 do not, and both are what plain rows give.

    It is said once.
    """
    network = sharing(lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=12)))
    short, long = [PromptGroup([5, 6, 7, 8], [[9] * 8, [10]])], [PromptGroup([5, 6, 7, 8], [[9] * 9, [10]])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uses_shared_prefix(network, short)
    with pytest.warns(UserWarning, match="again for each of its responses where they are longer than its window of 12"):
        assert not uses_shared_prefix(network, long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for groups in (short, long):
            logp = completion_logp(network, groups, "float32")[0]
            assert torch.allclose(logp, padded_logp(network, groups), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(groups=prompt_groups())
def test_nothing_is_packed_twice(groups):
    """T = sum over prompts of P + sum over different responses of (R - 1); padded, N rows as wide as the longest."""
    packed, padded = pack(groups), pad(groups)
    unique = [{tuple(response) for response in group.responses} for group in groups]
    lengths = [
        len(group.prompt) + sum(len(ids) - 1 for ids in responses)
        for group, responses in zip(groups, unique, strict=True)
    ]
    assert packed.ids.shape == (1, sum(lengths))
    rows = [len(group.prompt) + len(response) for group in groups for response in group.responses]
    assert padded.ids.shape == (len(rows), max(rows))
    assert len(packed.rows) == len(rows)


@settings(deadline=None)
@given(groups=prompt_groups(), budget=st.integers(1, 80), shared_prefix=st.booleans())
def test_batches_and_parts_keep_the_budget_and_lose_nothing(groups, budget, shared_prefix):
    """Every group in one batch, every response in one part; over the budget only what is one group, or one response."""
    batches = list(batch_by_tokens(groups, budget, shared_prefix))
    assert sorted(n for batch in batches for n in batch) == list(range(len(groups)))
    for batch in batches:
        assert len(batch) == 1 or forward_tokens([groups[n] for n in batch], shared_prefix) <= budget
    for group in groups:
        parts = split_responses(group, budget, shared_prefix)
        assert [n for part in parts for n in part] == list(range(len(group.responses)))
        for part in parts:
            piece = PromptGroup(group.prompt, [group.responses[n] for n in part])
            assert len(part) == 1 or forward_tokens([piece], shared_prefix) <= budget


def test_the_trial_leaves_plain_attention_as_it_was():
    """After sharing, a plain call of the network (generation, say) computes what it did before."""
    network = enlarged(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)))
    mask = torch.tensor([[0, 0, 1, 1], [1] * 4])
    padded = dict(input_ids=torch.tensor([[2, 2, 5, 6], [5, 6, 7, 8]]), attention_mask=mask)
    before = network(**padded).logits
    share_prefixes(network)
    assert network.config._attn_implementation == NAME
    assert torch.equal(network(**padded).logits, before)

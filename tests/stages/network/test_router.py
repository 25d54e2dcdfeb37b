"""The auxiliary loss of mixture-of-experts networks: transformers' own, however tokens are packed, cut and divided."""

import json
import shutil

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError
from stages.network.forward import check_router_loss, uses_shared_prefix
from stages.network.load import checkpoint_layers, load_network
from tests.material import cache, loss_of, random_rows, responses_of, term_of, train

EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True, router_aux_loss_coef=0.5)
CONFIGS = {
    "mixtral": lambda **sizes: MixtralConfig(**sizes, num_local_experts=4, intermediate_size=32),
    "qwen2_moe": lambda **sizes: Qwen2MoeConfig(**sizes, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda **sizes: Qwen3MoeConfig(**sizes, num_experts=4, head_dim=16),
    "olmoe": lambda **sizes: OlmoeConfig(**sizes, num_experts=4, intermediate_size=32),
}


def mixture_of_experts(tiny, folder, name, **options):
    """Return a small network of this kind with the tiny model's tokenizer."""
    shutil.copytree(tiny.folder, folder)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    sizes |= dict(vocab_size=json.loads((tiny.folder / "config.json").read_text())["vocab_size"])
    sizes |= dict(max_position_embeddings=128, bos_token_id=0, eos_token_id=1)
    ids = dict(pad_token_id=None, initializer_range=0.3)  # far from even, so that a wrong weight shows
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name](**sizes | ids | EXPERTS | options)).save_pretrained(folder)
    return Model(folder, model_digest(folder))


@pytest.fixture(scope="module")
def mixtral(tiny, tmp_path_factory):
    return mixture_of_experts(tiny, tmp_path_factory.mktemp("mixtral") / "model", "mixtral")


def rows_with_copies():
    """Return rows of `examples` in which one response is there twice, and prompts have 2 to 4 responses."""
    rows = random_rows()
    rows[0]["responses"][1]["token_ids"] = rows[0]["responses"][0]["token_ids"]
    return rows


def transformers_aux_loss(network, rows):
    """Return the loss by transformers' own forward pass over padded rows of prompt and response."""
    sequences = [torch.tensor([*prompt, *ids]) for prompt, ids in responses_of(rows)]
    mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    return network(input_ids=pad_sequence(sequences, batch_first=True), attention_mask=mask).aux_loss


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loss_of_a_step_has_transformers_own_aux_loss(tiny, tmp_path, name):
    """Value and gradient, of one pass with shared prompts, of many, and of groups that are split into parts."""
    init = mixture_of_experts(tiny, tmp_path / "model", name)
    network = load_network(init, train=True)
    assert uses_shared_prefix(network)
    rows = rows_with_copies()
    plain = load_network(mixture_of_experts(tiny, tmp_path / "off", name, output_router_logits=False), train=True)
    own = transformers_aux_loss(network, rows)
    expected, own = gradients(network, 0.5 * own), float(own.detach())
    for tokens_per_pass in (10_000, 60, 1):
        term = term_of(init, rows, "sigmoid_mean", tokens_per_pass=tokens_per_pass)
        loss, metrics = loss_of(term, network)
        loss_without, metrics_without = loss_of(term, plain)
        assert "aux_loss" not in metrics_without
        assert metrics["aux_loss"] == pytest.approx(own, rel=1e-5)
        assert metrics["loss"] == pytest.approx(metrics_without["loss"] + 0.5 * own, rel=1e-5)
        assert float(loss.detach()) == pytest.approx(metrics["loss"], rel=1e-5)
        grads, without = gradients(network, loss), gradients(plain, loss_without)
        for weight, grad in grads.items():
            assert torch.allclose(grad - without[weight], expected.get(weight, torch.zeros_like(grad)), atol=1e-5)
        assert any("gate" in weight and grad.abs().max() > 1e-4 for weight, grad in expected.items())
        with torch.no_grad():
            assert term.evaluate(network, term.groups)["aux_loss"] == pytest.approx(own, rel=1e-5)


def test_layers_that_run_again_give_the_routers_the_same_gradients(mixtral):
    rows = rows_with_copies()
    networks = [load_network(mixtral, train=True) for _ in range(2)]
    checkpoint_layers(networks[1])
    term = term_of(mixtral, rows, "sigmoid_mean")
    grads, again = (gradients(network, loss_of(term, network)[0]) for network in networks)
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


def test_the_coefficient_of_the_config_changes_what_is_trained(tiny, tmp_path):
    """0 and 10 gave the same bytes; without output_router_logits transformers adds none, and neither do we."""
    digests = {}
    for coefficient, output in ((0.0, True), (10.0, True), (10.0, False)):
        options = dict(router_aux_loss_coef=coefficient, output_router_logits=output)
        name = f"{coefficient} {output}"
        init = mixture_of_experts(tiny, tmp_path / name / "init", "mixtral", **options)
        rows = cache(init, random_rows())
        model, metrics, policy = train(init, rows, tmp_path / name, lr_scheduler_type="constant")
        weights = b"".join(file.read_bytes() for file in sorted(model.folder.glob("*.safetensors")))
        digests[name] = weights, (1, "aux_loss") in metrics
        assert metrics[policy["steps"], "saved/margin_kept"] == pytest.approx(1, abs=1e-2)
    assert [has_metric for _, has_metric in digests.values()] == [False, True, False]
    assert digests["0.0 True"][0] != digests["10.0 True"][0]
    assert digests["0.0 True"][0] == digests["10.0 False"][0]


def test_a_network_whose_routers_loss_is_another_is_refused_by_name(mixtral):
    network = load_network(mixtral)
    check_router_loss(network)
    network.num_experts_per_tok = 1  # as if its own loss counted other experts than its routers choose
    own, network.forward = network.forward, lambda **inputs: own(**inputs) | {"aux_loss": torch.tensor(3.0)}
    with pytest.raises(WinnowError, match=r"MixtralForCausalLM.*output_router_logits"):
        check_router_loss(network)

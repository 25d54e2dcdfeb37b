"""One network in memory: its log-probs against a naive transcription, and what it writes to disk."""

import errno
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.store.fingerprints import ModelPath, model_digest
from schemas import Model, WinnowError
from stages.data.tokenizer import Tokenizer
from stages.limits import check_ids, context_length
from stages.network.forward import completion_logp, forward_rows, logp_of
from stages.network.load import load_network, round_weights, save_network
from tests.material import alone

LIMIT = 1e-5  # relative, and in nats near zero: fp32 numbers at 40 nats are 4e-6 apart
few = settings(deadline=None, max_examples=15)
ids = st.lists(st.integers(5, 300), min_size=1, max_size=14)
short = st.lists(st.integers(5, 300), min_size=1, max_size=4)
rows_of = st.lists(st.tuples(ids, short), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def network(tiny):
    """The tiny model with larger weights, so that its predictions are far from uniform and differ by position."""
    loaded = load_network(tiny)
    with torch.no_grad():
        for weight in loaded.parameters():
            if weight.dim() == 2:
                weight.mul_(3)
    return loaded


@torch.inference_mode()
def naive(network, prompt, response):
    """sum_t log softmax(logits at position |x| + t - 1)[y_t]: one row, no padding, no window, float64 softmax."""
    logits = network(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].double()
    logp = logits.log_softmax(-1)
    return sum(float(logp[len(prompt) + t - 1, token]) for t, token in enumerate(response))


@torch.inference_mode()
def scored(network, rows):
    return completion_logp(network, alone(rows), "float32")[0].tolist()


@few
@given(rows=rows_of, long=st.tuples(st.lists(st.integers(5, 300), min_size=20, max_size=60), ids))
def test_completion_logp_is_the_naive_sum(network, rows, long):
    """Each row has its sum in any mixture of lengths: alone, or beside a much longer one (padding, a wider window)."""
    for batch in (rows, [*rows, long], [rows[0]]):
        assert scored(network, batch) == [pytest.approx(naive(network, *row), rel=LIMIT, abs=LIMIT) for row in batch]


def test_the_first_response_token_is_predicted_from_the_last_prompt_token(network):
    """log p(y_1 | x) = log softmax(logits at the last prompt position)[y_1], and summed over y_1 it is 1.

    One position early or late, sum_v p(v) would not be 1 over the vocabulary of one-token responses: each row
    would have the distribution of another prefix. A later token cannot change it; the prompt's last can.
    """
    prompt = [7, 40, 91, 13]
    vocabulary = network.config.vocab_size
    logp = torch.tensor(scored(network, [(prompt, [token]) for token in range(vocabulary)]))
    with torch.inference_mode():
        at_last = network(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert torch.allclose(logp, at_last, rtol=0, atol=LIMIT)
    assert logp.exp().sum().item() == pytest.approx(1, abs=LIMIT)
    assert logp.std() > 0.1
    other = scored(network, [([*prompt[:-1], 14], [50])])[0]
    assert abs(other - logp[50].item()) > 1e-3


def test_logp_adds_up_along_a_response(network):
    """log p(y | x) = log p(y_1..t | x) + log p(y_t+1.. | x y_1..t): the chain rule, at every cut."""
    prompt, response = [3, 99, 27], [55, 8, 121, 77, 1]
    total = scored(network, [(prompt, response)])[0]
    for cut in range(1, len(response)):
        parts = scored(network, [(prompt, response[:cut]), (prompt + response[:cut], response[cut:])])
        assert sum(parts) == pytest.approx(total, rel=LIMIT, abs=LIMIT)


def test_n_correct_counts_the_tokens_that_greedy_decoding_would_write(network):
    """The greedy continuation has all its tokens counted; with one token changed, that one is not."""
    prompt = [5, 17, 200]
    greedy: list[int] = []
    with torch.inference_mode():
        for _ in range(6):
            greedy.append(int(network(input_ids=torch.tensor([prompt + greedy])).logits[0, -1].argmax()))
    broken = [*greedy[:-1], (greedy[-1] + 1) % network.config.vocab_size]
    _, n_correct = completion_logp(network, alone([(prompt, greedy), (prompt, broken)]), "float32")
    assert n_correct.tolist() == [6, 5]


@few
@given(rows=rows_of, budget=st.integers(1, 120))
def test_forward_rows_is_completion_logp_in_the_order_of_rows(network, rows, budget):
    """Whatever the budget cuts into batches."""
    scores = forward_rows(logp_of, network, rows, "float32", budget)
    assert scores.dtype == np.float32
    assert scores.tolist() == [pytest.approx(value, rel=LIMIT, abs=LIMIT) for value in scored(network, rows)]


def test_bfloat16_has_an_fp32_softmax(network):
    """autocast moves the logits by a few parts in 2^8, and the sum stays fp32: near the fp32 number, and not equal."""
    row = ([7, 40, 91], [13, 60, 4, 88])
    with torch.inference_mode():
        low, _ = completion_logp(network, alone([row]), "bfloat16")
    full = naive(network, *row)
    assert low.dtype == torch.float32
    assert low.item() != full
    assert low.item() == pytest.approx(full, rel=0.05)


def test_dropout_is_off_even_if_the_config_has_it(tiny, tmp_path):
    """A policy that drops out differs from its own reference; the config's dropout is real (train mode shows it)."""
    folder = tmp_path / "dropping"
    shutil.copytree(tiny.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    rows = [([7, 40, 91], [13, 60, 4, 88])]
    for train in (False, True):
        loaded = load_network(Model(folder, "dropping"), train=train)
        assert scored(loaded, rows) == scored(loaded, rows) == scored(load_network(tiny), rows)
    ids = torch.tensor([[7, 40, 91, 13]])
    assert not torch.equal(loaded.train()(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_save_network_round_trips(tiny, network, tmp_path):
    """Weights equal bit for bit, tokenizer and template there, a folder that `model` accepts, no pickle.

    What a killed run left behind does not mix with the new weights.
    """
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_text("old")
    (folder.parent / ".model").mkdir()
    (folder.parent / ".model" / "half.safetensors").write_text("half")
    saved = save_network(network, tiny, folder)
    weights, again = dict(network.named_parameters()), dict(load_network(saved).named_parameters())
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert Tokenizer(saved).prompt_ids("Hello there.") == Tokenizer(tiny).prompt_ids("Hello there.")
    ModelPath(str(folder))
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}
    assert "half.safetensors" not in [file.name for file in files]
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """The tiny model as a folder of bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(tiny.folder, folder)
    load_network(tiny).to(torch.bfloat16).save_pretrained(folder)
    return Model(folder, model_digest(folder))


def test_a_full_disk_while_weights_are_written_is_an_error_of_the_disk_and_leaves_no_scratch(tiny, network, tmp_path):
    """safetensors raises one of its own, which is no OSError; the run ends by it as by that of any other file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path / "model")) as error:
            save_network(network, tiny, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_save_network_saves_fp32_weights_as_they_are_whatever_the_initial_folder_holds(half, tmp_path):
    """A bfloat16 model is trained in fp32: moves below half a step of bfloat16 are in the folder; old weights not."""
    network = load_network(half)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1 + 2**-12)
    expected = {name: weight.clone() for name, weight in network.named_parameters()}
    saved = save_network(network, half, tmp_path / "model")
    assert json.loads((saved.folder / "config.json").read_text())["dtype"] == "float32"
    loaded = dict(load_network(saved).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_save_network_rounds_to_bfloat16_where_it_is_set(half, tmp_path):
    """Nearest undoes a move of an eighth of a step everywhere; stochastic keeps a part of it, on average all."""
    before = dict(load_network(half).named_parameters())
    moved = {}
    for rounding in ("nearest", "stochastic"):
        network = load_network(half)
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.ldexp(weight.sign(), weight.frexp().exponent - 11))  # bfloat16 has 8 bits
        step = {name: weight - before[name] for name, weight in network.named_parameters()}
        saved = save_network(network, half, tmp_path / rounding, dtype="bfloat16", rounding=rounding)
        stored = [tensor for file in saved.folder.glob("*.safetensors") for tensor in load_file(file).values()]
        assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
        moves = [(weight - before[name]) / step[name] for name, weight in load_network(saved).named_parameters()]
        moved[rounding] = torch.cat([move[move.isfinite()] for move in moves]).detach()
    assert (moved["nearest"] == 0).all()
    assert float(moved["stochastic"].mean()) == pytest.approx(1, abs=0.05)
    assert set(moved["stochastic"].unique().tolist()) <= {0.0, 8.0}


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_leaves_what_bfloat16_has(values, seed):
    weights = torch.tensor(values)
    network = torch.nn.ParameterList([weights.clone(), weights.bfloat16().float()])
    round_weights(network, "stochastic", seed)
    towards_zero = (weights.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = ((weights.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((network[0] == towards_zero) | ((network[0] == away) & (weights != towards_zero))).all()
    assert torch.equal(network[1], weights.bfloat16().float())


def test_check_ids_refuses_foreign_ids_with_both_numbers(tiny):
    """The highest id known is vocab_size - 1; the message has the id found and the vocabulary."""
    size = json.loads((tiny.folder / "config.json").read_text())["vocab_size"]
    check_ids(tiny, "prompts", [[0, size - 1], []])
    check_ids(tiny, "prompts", [])
    with pytest.raises(WinnowError, match=f"prompts hold token id {size + 6}.*below {size}.*tokenizer"):
        check_ids(tiny, "prompts", [[1], [2, size + 6, 3]])


def test_context_length_is_the_configs(tiny):
    """max_position_embeddings, which the fixture sets to 128."""
    assert context_length(tiny.folder) == 128

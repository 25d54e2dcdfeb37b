"""Preference heads: features of the frozen policy, heads trained on pairs, scores as rewards, steered decoding."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline import InputStep, ModelPath
from pipeline.context import StageContext, WarmCache
from pipeline.registry import entry_of
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, FEATURES, HEADS, JUDGEMENTS, METRICS, PAIRS, REWARDS
from stages.evaluation.evaluate import evaluate
from stages.head.features import features
from stages.head.relu import ReluHead, feature_matrix, read_relu_head
from stages.head.train import PairFeatures, head, head_reward, last_layer, preference_head
from stages.network.forward import completion_logp, forward_rows, response_means
from stages.network.load import load_network
from stages.sampling.engines import Request, Sampling, Steering, open_engine
from stages.sampling.engines.steering import Guide
from stages.sampling.sample import sample
from stages.selection.pair import pair, pair_rule
from stages.training.reference import reference
from tests.material import alone, context
from tests.stages.test_stages import candidate, prompts_of, selections_of

few = settings(deadline=None, max_examples=20)
PROMPTS = ([0, 5, 9, 14, 30, 8], [0, 7, 7, 21], [0, 60, 61, 62, 63, 64, 65, 66, 67])


def new_context():
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


# Features.


def test_features_are_the_mean_hidden_state_over_the_response(sharp, ctx):
    """One row by hand: the network's last hidden states (after the norm) at the response's positions, averaged.

    Rows of other lengths beside it change it by rounding alone; equal tokens go through once.
    """
    ids = [[20], [30, 31, 1], [40, 41, 42, 43, 1], [30, 31, 1]]
    rows = [candidate("p", k, ids=tokens) for k, tokens in enumerate(ids)]
    table = features(prompts_of(["p"]), pa.Table.from_pylist(rows, schema=CANDIDATES), sharp, ctx)
    conform(table, FEATURES)
    network = load_network(sharp)
    for row, tokens in zip(table.to_pylist(), ids, strict=True):
        with torch.inference_mode():
            out = network(input_ids=torch.tensor([[0, 5, 9, *tokens]]), output_hidden_states=True)
        assert row["features"] == pytest.approx(out.hidden_states[-1][0, 3:].mean(0).tolist(), abs=1e-5)
    assert table["features"][1].as_py() == table["features"][3].as_py()
    assert ctx.counters["tokens"] == 3 * 3 + 1 + 3 + 5


def test_a_response_without_tokens_is_rejected(sharp, ctx):
    rows = [candidate("p", 0), candidate("p", 1) | {"token_ids": [], "n_tokens": 0}]
    table = features(prompts_of(["p"]), pa.Table.from_pylist(rows, schema=CANDIDATES), sharp, ctx)
    assert table["candidate_id"].to_pylist() == ["p-0"]
    assert [(row["candidate_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [("p-1", "empty response")]


# Heads.


def features_of(vectors):
    """{candidate id: vector}; the prompt is the part before the dash."""
    rows = [dict(prompt_id=name.split("-")[0], candidate_id=name, features=list(x)) for name, x in vectors.items()]
    return pa.Table.from_pylist(rows, schema=FEATURES)


def stored(vectors):
    """The vectors rounded to fp32, as a table has them."""
    return np.array(list(vectors.values()), dtype=np.float32).astype(float)


def pairs_of(prompts, weight=1.0):
    rows = [
        dict(prompt_id=name, chosen_id=f"{name}-0", rejected_id=f"{name}-1", gap=None, weight=weight, rule="label")
        for name in prompts
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def quadrants(count, seed=0):
    """Chosen where x0 x1 > 0, rejected where x0 x1 < 0; x2 is 100 times as large and says nothing, x3 is constant."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([*np.abs(rng.normal(size=(2, 2 * count))), 7 + 100 * rng.normal(size=2 * count)])
    x[:, 0] *= rng.choice([-1, 1], 2 * count)
    x[:, 1] *= np.sign(x[:, 0]) * np.tile([1, -1], count)
    x = np.column_stack([x, np.full(2 * count, 5.0)])
    return {f"q{n // 2:03d}-{n % 2}": row for n, row in enumerate(x)}


def trained(vectors, spec, heldout=(), ctx=None, pairs=None, weight=1.0):
    names = sorted({name.split("-")[0] for name in vectors})
    prompts = pa.concat_tables(
        [prompts_of([n for n in names if n not in heldout]), prompts_of(list(heldout), split="heldout")]
    )
    pairs = pairs_of(names, weight) if pairs is None else pairs
    return preference_head(prompts, features_of(vectors), pairs, ctx or new_context(), head=head.bind(spec))


def values(metrics):
    return {row["metric"]: row["value"] for row in metrics.to_pylist()}


CONVEX = {"name": "convex_relu", "gates": 30, "iterations": 60}


def test_the_convex_head_learns_what_no_line_separates():
    """The sign of a product: a linear head orders half of the pairs, ReLUs nearly all, on held-out prompts too."""
    vectors = quadrants(300)
    heldout = [f"q{n:03d}" for n in range(200, 300)]
    tables = {spec["name"]: trained(vectors, spec, heldout) for spec in (CONVEX, {"name": "logistic"})}
    for heads, metrics in tables.values():
        conform(heads, HEADS)
        conform(metrics, METRICS)
    figures = {name: values(metrics) for name, (_, metrics) in tables.items()}
    assert figures["convex_relu"]["heldout/accuracy"] > 0.9 > 0.65 > figures["logistic"]["heldout/accuracy"]
    assert figures["convex_relu"]["heldout/auc"] > 0.9 > 0.65 > figures["logistic"]["heldout/auc"]
    assert [figures["logistic"][name] for name in ("pairs", "heldout/pairs")] == [200, 100]
    assert set(figures["convex_relu"]) > {"neurons", "iterations", "primal_residual", "dual_residual", "objective"}


def test_the_logistic_head_is_scikit_learns_on_standardised_rows():
    """Two neurons, relu(z) - relu(-z) = z, with the standardisation folded in: z is its decision function."""
    from sklearn.linear_model import LogisticRegression

    vectors = quadrants(40)
    x = stored(vectors)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    fit = LogisticRegression(C=0.5).fit(z, np.tile([1, -1], 40))
    heads, _ = trained(vectors, {"name": "logistic", "C": 0.5})
    assert read_relu_head(heads).score(x) == pytest.approx(fit.decision_function(z), abs=1e-3)


def test_heldout_pairs_do_not_train():
    """Other features and other labels of held-out prompts: the same head, byte for byte."""
    vectors, heldout = quadrants(40), [f"q{n:03d}" for n in range(30, 40)]
    names = sorted({name.split("-")[0] for name in vectors})
    first, _ = trained(vectors, CONVEX, heldout)
    other = {name: -3 * x if name.split("-")[0] in heldout else x for name, x in vectors.items()}
    second, _ = trained(other, CONVEX, heldout, pairs=pairs_of(names[:-3]))
    assert first.equals(second)


@few
@given(st.integers(0, 10**6), st.sampled_from([CONVEX | {"iterations": 10}, {"name": "logistic"}]))
def test_a_head_scores_raw_features_whatever_their_scale(seed, spec):
    """x -> s x + t, feature by feature: standardised rows are the same, so the head's scores are."""
    rng = np.random.default_rng(seed)
    vectors = quadrants(20, seed)
    scale, shift = 2.0 ** rng.integers(-3, 4, 4), rng.integers(-8, 8, 4)
    moved = {name: scale * x.astype(np.float32) + shift for name, x in vectors.items()}
    scores = [read_relu_head(trained(x, spec)[0]).score(stored(x)) for x in (vectors, moved)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-2)


@few
@given(st.integers(0, 10**6))
def test_the_last_layer_is_at_the_minimum_of_the_preference_loss(seed):
    """L(a) = sum_p w_p softplus(m - s g_p.a) / sum w + r/2 |a|^2; dL/da = r a - s sum_p w_p sigma(.) g_p / sum w = 0.

    And it is reached from anywhere, for L is strictly convex.
    """
    rng = np.random.default_rng(seed)
    sides = PairFeatures(rng.normal(size=(30, 3)), rng.normal(size=(30, 3)), rng.uniform(0.1, 2, 30))
    neurons = ReluHead(rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(size=5))
    a = last_layer(neurons, sides, 2.5, 1.5, 1e-2).outer
    gaps = np.maximum(sides.chosen @ neurons.inner.T + neurons.bias, 0) - np.maximum(
        sides.rejected @ neurons.inner.T + neurons.bias, 0
    )
    pull = 1 / (1 + np.exp(2.5 * gaps @ a - 1.5)) * sides.weight / sides.weight.sum()
    assert 1e-2 * a == pytest.approx(2.5 * pull @ gaps, abs=1e-5)
    start = ReluHead(neurons.inner, neurons.bias, 10 * rng.normal(size=5))
    assert last_layer(start, sides, 2.5, 1.5, 1e-2).outer == pytest.approx(a, abs=1e-3)


@pytest.mark.parametrize("spec", [CONVEX, {"name": "logistic"}], ids=["convex_relu", "logistic"])
def test_a_weight_of_two_is_the_pair_twice(spec):
    """Weighted least squares, and the weighted mean of the losses, for both kinds of head."""
    rng, bound = np.random.default_rng(0), head.bind(spec)
    chosen, rejected = rng.normal(size=(2, 20, 3))
    twice = [*range(20), *range(5)]
    sides = (
        PairFeatures(chosen[twice], rejected[twice], np.ones(25)),
        PairFeatures(chosen, rejected, np.repeat([2.0, 1.0], [5, 15])),
    )
    first, second = (bound(side, lambda *progress: None)[0].score(chosen) for side in sides)
    assert first == pytest.approx(second, abs=1e-3)


def test_pairs_that_teach_nothing_are_rejected():
    ctx, vectors = new_context(), quadrants(8)
    vectors["q000-1"] = vectors["q000-0"]
    vectors["q001-0"] = np.full(4, np.nan)
    vectors["q002-1"] = np.full(4, np.inf)
    del vectors["q003-0"]
    heads, metrics = trained(vectors, {"name": "logistic"}, ctx=ctx)
    reasons = {row["prompt_id"]: row["reason"] for row in ctx.rejects.to_pylist()}
    assert reasons == {
        "q000": "equal features",
        "q001": "features not finite",
        "q002": "features not finite",
        "q003": "no features",
    }
    assert values(metrics)["pairs"] == 4
    assert all(np.isfinite(heads["outer"].to_pylist()))


def test_what_leaves_no_pairs_or_no_neurons_raises():
    with pytest.raises(WinnowError, match="1 usable pairs of train prompts"):
        trained(quadrants(3), {"name": "logistic"}, heldout=["q000", "q001"])
    with pytest.raises(WinnowError, match="0 usable pairs"):
        trained(quadrants(3), {"name": "logistic"}, pairs=pairs_of(["q000"], weight=0.0))
    with pytest.raises(WinnowError, match=r"beta 50\.0"):
        trained(quadrants(20), {"name": "convex_relu", "beta": 50.0})


# Rewards.


def linear(*weights):
    """A head that scores w.x."""
    w = np.array(weights, dtype=float)
    return ReluHead(np.stack([w, -w]), np.zeros(2), np.array([1.0, -1.0]))


def test_a_candidates_reward_is_its_score():
    ctx = new_context()
    table = features_of({"p-0": [1, 2], "p-1": [-3, 0.5], "p-2": [np.nan, 0]})
    rewards = conform(head_reward(table, linear(2, -1).to_table(), ctx), REWARDS).to_pylist()
    assert {row["candidate_id"]: row["reward"] for row in rewards} == {"p-0": 0.0, "p-1": -6.5}
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["features not finite"]
    with pytest.raises(WinnowError, match="features have 2 numbers, and the head reads 3"):
        head_reward(features_of({"p-0": [1, 2]}), linear(1, 1, 1).to_table(), ctx)


# Steering.


@pytest.fixture(scope="session")
def engine(sharp):
    opened = open_engine("transformers", sharp.folder, "float32")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def opinion():
    """A head of eight random neurons on the sharp model's 64 features."""
    rng = np.random.default_rng(3)
    return ReluHead(rng.normal(size=(8, 64)), rng.normal(size=8), rng.normal(size=8))


def requests_of(count):
    return [Request(PROMPTS[n % 3], 100 + n) for n in range(count)]


PENALTIES: dict[str, Any] = dict(frequency_penalty=2.0, min_tokens=3, top_p=0.9, bad_words=("a", "e"), stop=("o", " t"))


def test_steering_of_no_strength_draws_what_the_unsteered_engine_draws(engine, opinion):
    """Our own loop with its cache, against `generate`: equal ids, ends and log-probs, under other laws too."""
    for temperature, top_k, others in ((1.0, 0, {}), (0.6, 20, {}), (1.0, 0, PENALTIES)):
        plain, steered = (
            engine.generate(requests_of(30), Sampling(temperature, top_k, 12, (1, 2, 3), steering, **others))
            for steering in (None, Steering(opinion, 0.0, 15, 1))
        )
        for ours, expected in zip(steered, plain, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (expected.token_ids, expected.finish_reason)
            assert ours.logp == pytest.approx(expected.logp, abs=1e-4)


def continuation_scores(network, head, prompt, prefix, tokens):
    """Scores of features that `stages.head.features` makes of each whole continuation, without a cache."""
    rows = [(prompt, [*prefix, int(token)]) for token in tokens]
    return head.score(forward_rows(response_means, network, rows, "float32", 4096).astype(float))


@torch.inference_mode()
def next_token_logits(network, prompt, prefix):
    return network(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1].double().numpy()


@pytest.mark.parametrize("every", [1, 3])
def test_a_large_strength_draws_the_top_token_that_the_head_likes_best(engine, opinion, sharp, every):
    """Every step again, without a cache. At steps between, the draw is argmax(logit / T + the row's own noise)."""
    network, top = load_network(sharp), 6
    requests, steered = requests_of(6), 0
    completions = engine.generate(requests, Sampling(0.8, 0, 6, (1,), Steering(opinion, 1e6, top, every)))
    for request, completion in zip(requests, completions, strict=True):
        for step, token in enumerate(completion.token_ids):
            prefix = completion.token_ids[:step]
            logits = next_token_logits(network, request.prompt_ids, prefix)
            if step % every:
                noise = np.random.Generator(np.random.Philox(key=[request.seed, step])).gumbel(size=len(logits))
                assert token == (logits / 0.8 + noise.astype(np.float32)).argmax()
                continue
            tokens = np.argsort(-logits)[:top]
            best = continuation_scores(network, opinion, request.prompt_ids, prefix, tokens).argmax()
            assert token == tokens[best]
            steered += token != logits.argmax()
    assert steered > 5, "the head agreed with the policy throughout: this test shows nothing"


def steered_logps(network, steering, prompt, prefix):
    """Log-probs [V] of the next token under the steered distribution."""
    logits = next_token_logits(network, prompt, prefix)
    if len(prefix) % steering.every == 0:
        top = np.argsort(-logits)[: steering.top]
        scores = continuation_scores(network, steering.head, prompt, prefix, top)
        logits[top] += steering.strength * (scores - scores.min()) / np.ptp(scores)
    return logits - np.logaddexp.reduce(logits)


@pytest.mark.parametrize("every", [1, 3])
def test_the_log_prob_of_an_uncut_steered_draw_is_that_of_the_steered_distribution(engine, opinion, sharp, every):
    """log q(y) = sum_t log softmax(logits + strength * share)[y_t], each step again and without a cache."""
    network, steering = load_network(sharp), Steering(opinion, 3.0, 15, every)
    completions = engine.generate(requests_of(6), Sampling(1.0, 0, 8, (1,), steering))
    for request, completion in zip(requests_of(6), completions, strict=True):
        ids = completion.token_ids
        logps = [
            steered_logps(network, steering, request.prompt_ids, ids[:step])[token] for step, token in enumerate(ids)
        ]
        assert completion.logp == pytest.approx(sum(logps), abs=1e-3)


def test_a_steered_draw_that_is_cut_has_the_policys_own_log_prob(engine, opinion, sharp):
    network = load_network(sharp)
    for temperature, top_k in ((0.7, 0), (1.0, 20)):
        sampling = Sampling(temperature, top_k, 8, (1,), Steering(opinion, 3.0, 15, 1))
        completions = engine.generate(requests_of(6), sampling)
        rows = [(request.prompt_ids, c.token_ids) for request, c in zip(requests_of(6), completions, strict=True)]
        with torch.inference_mode():
            expected, _ = completion_logp(network, alone(rows), "float32")
        assert [completion.logp for completion in completions] == pytest.approx(expected.tolist(), abs=1e-3)


UNCUT = dict(engine="transformers", temperature=1.0, top_k=0, keep_empty=True, keep_special=True, steer_every=1)


def test_features_of_several_chunks_are_one_matrix():
    """One array of lists holds 2^31 numbers: larger tables have several chunks, here with two rows and one."""
    chunks = [pa.array(rows, pa.list_(pa.float32())) for rows in ([[1, 2], [3, 4]], [[5, 6]])]
    table = pa.table({"features": pa.chunked_array(chunks)})
    assert feature_matrix(table).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert feature_matrix(table.slice(1)).tolist() == [[3, 4], [5, 6]]
    assert feature_matrix(table.slice(0, 0)).shape == (0, 0)


def test_stronger_steering_scores_higher(sharp, opinion, ctx):
    prompts = prompts_of(["p", "q"])
    means = []
    for strength in (0.0, 2.0, 20.0):
        candidates = sample(prompts, sharp, ctx, opinion.to_table(), n=16, max_tokens=8, steer=strength, **UNCUT)
        means.append(opinion.score(feature_matrix(features(prompts, candidates, sharp, ctx))).mean())
    assert means[0] < means[1] < means[2]


def test_logp_kind_names_the_distribution_of_a_log_prob(sharp, opinion, ctx):
    cut, heads = UNCUT | {"temperature": 0.7}, opinion.to_table()
    for head_table, options, kind in ((None, UNCUT, "exact"), (heads, UNCUT, "steered"), (heads, cut, "raw")):
        candidates = sample(prompts_of(["p"]), sharp, ctx, head_table, n=2, max_tokens=4, **options)
        assert set(candidates["logp_kind"].to_pylist()) == {kind}


def steered_kl(sharp, opinion, ctx, **options):
    """log q - log p of each draw, as `evaluate` has it: q the steered distribution, p the policy it started from."""
    prompts = prompts_of(["p"])
    candidates = sample(prompts, sharp, ctx, opinion.to_table(), **UNCUT, **options)
    ids = zip(candidates["k"].to_pylist(), candidates["candidate_id"].to_pylist(), strict=True)
    rows = [dict(prompt_id="p", k=k, candidate_id=name, baseline_id=name, logit=0.0) for k, name in ids]
    judgements = pa.Table.from_pylist(rows, schema=JUDGEMENTS)
    reference_logp = reference(prompts, candidates, sharp, ctx)
    outcomes, metrics = evaluate(
        prompts, candidates, candidates, judgements, context(), None, reference_logp, resamples=1
    )
    return np.array(outcomes["kl"].to_pylist()), values(metrics)["kl"]


def test_steering_of_no_strength_has_no_kl(sharp, opinion, ctx):
    """q = p, so log q - log p = 0 of every single draw."""
    ratios, kl = steered_kl(sharp, opinion, ctx, n=16, max_tokens=8, steer=0.0)
    assert len(ratios) == 16
    assert np.abs(ratios).max() < 1e-4
    assert kl == pytest.approx(0, abs=1e-4)


def test_kl_of_a_steered_policy_is_that_of_the_two_distributions(sharp, opinion, ctx):
    """One token, by enumeration: KL = sum_v q_v (log q_v - log p_v), in 2,000 draws to four standard errors."""
    ratios, kl = steered_kl(sharp, opinion, ctx, n=2000, max_tokens=1, steer=2.0)
    network, prompt = load_network(sharp), prompts_of(["p"])["token_ids"][0].as_py()
    q, p = (steered_logps(network, Steering(opinion, strength, 15, 1), prompt, []) for strength in (2.0, 0.0))
    exact = (np.exp(q) * (q - p)).sum()
    assert exact > 0.1
    assert kl == pytest.approx(ratios.mean())
    assert abs(kl - exact) < 4 * ratios.std() / math.sqrt(len(ratios))


def test_a_steered_log_prob_is_not_used_as_the_policys_own():
    rows = [candidate("a", k) | {"logp": -1.0, "logp_kind": "steered"} for k in range(2)]
    rule = pair_rule.bind("next_likelier_loser")
    with pytest.raises(WinnowError, match="without a head"):
        pair(pa.Table.from_pylist(rows, schema=CANDIDATES), new_context(), selections_of({"a": [1.0, -1.0]}), rule=rule)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_continuations_are_exact_in_other_architectures_too(kind):
    """m tokens tried at once at one position, against m whole forwards; and the cache is left as it was."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

    torch.manual_seed(0)
    config = {
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32),
        "qwen3": Qwen3Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=64, vocab_size=50,
        ),
    }[kind]  # fmt: skip
    network = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    tokens = torch.tensor([[1, 2, 9, 9], [10, 11, 12, 13]])
    with torch.inference_mode():
        guide = Guide(network, Steering(linear(*range(32)), 1.0, 4, 1))
        network(input_ids=ids, past_key_values=guide.cache)
        states, again = (guide.continued(tokens) for _ in range(2))
        for row in range(2):
            for m in range(4):
                sequence = torch.cat([ids[row], tokens[row, m : m + 1]])[None]
                plain = network(input_ids=sequence, output_hidden_states=True).hidden_states[-1][0, -1]
                assert states[row, m].tolist() == pytest.approx(plain.tolist(), abs=1e-5)
    assert torch.equal(states, again)


def test_a_model_that_cannot_be_steered_raises(engine):
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=50, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(WinnowError, match=r"sliding windows.*cannot be steered.*`head`"):
        Guide(AutoModelForCausalLM.from_config(config), Steering(linear(*range(32)), 1.0, 4, 1))
    with pytest.raises(WinnowError, match="features have 64 numbers, and the head reads 2"):
        engine.generate(requests_of(1), Sampling(1.0, 0, 4, (1,), Steering(linear(1, 1), 1.0, 4, 1)))


def test_steering_that_cannot_be_is_rejected_at_plan_time():
    """vLLM with a head; steering options without one; a head that was trained on another policy's features."""

    def problems(options, inputs):
        entry = entry_of(sample)
        return entry.metadata["signature"].check(entry.validate(options, "sample"), inputs)

    policy, other = InputStep("model", {"path": "a"}), InputStep("model", {"path": "b"})
    head_step = InputStep("preference_head", {}, {"features": InputStep("features", {}, {"policy": policy})})
    steered = {"policy": policy, "head": head_step}
    assert problems({}, {"policy": policy}) == []
    assert problems({"engine": "transformers", "steer": 4.0}, steered) == []
    for options, inputs, facts in (
        ({}, steered, "engine: vllm cannot steer.*engine: transformers"),
        ({"steer_top": 5}, {"policy": policy}, "steer_top: there is no head.*`head` under `from`"),
        ({"engine": "transformers"}, steered | {"policy": other}, "head was trained on features of another policy"),
    ):
        assert re.match(facts, *problems(options, inputs))


def hub_config(folder, kind):
    """The config of a folder as `save_pretrained` or the hub has it, and its step."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(kind))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")  # which nothing reads here, as the tokenizer
    (folder / "tokenizer.json").write_text("{}")
    return InputStep("model", {"path": ModelPath(str(folder))})


@pytest.mark.parametrize(
    ("kind", "narrow"),
    [
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"model_type": "qwen3_5", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "gemma2", "sliding_window": 4096}, "sliding_window: 4096"),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 512}}, "sliding_window: 512"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "attention_chunk_size: 8192"),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, "window: 9"),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 4}, ""),
        ({"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 2}, ""),
        ({"model_type": "qwen2", "sliding_window": 32768, "max_window_layers": 2}, ""),
        ({"model_type": "mistral", "sliding_window": None}, ""),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 4}, ""),
    ],
)
def test_a_policy_that_attends_in_windows_is_refused_a_head_when_planned(kind, narrow, tmp_path):
    """By its config alone; a policy trained from it, too."""
    base = hub_config(tmp_path / "model", {"num_hidden_layers": 4, "max_position_embeddings": 64} | kind)
    entry = entry_of(sample)
    options = entry.validate({"engine": "transformers", "max_tokens": 8}, "sample")
    for policy in (base, InputStep("optimize", {}, {"init": base})):
        head_step = InputStep("preference_head", {}, {"features": InputStep("features", {}, {"policy": policy})})
        problems = entry.metadata["signature"].check(options, {"policy": policy, "head": head_step})
        assert len(problems) == bool(narrow)
        assert all(re.search(rf"policy: .*cannot be steered.*{narrow}.*`head` under `from`", line) for line in problems)
        assert entry.metadata["signature"].check(options, {"policy": policy}) == []

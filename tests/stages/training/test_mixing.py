"""Which objective a step takes: the mixes as functions, and in training with a tiny network."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas import WinnowError
from schemas.tables import METRICS
from stages.network.load import load_network
from stages.network.models import reward_head
from stages.training import sharded
from stages.training.mixing import MixState, mix
from stages.training.throughput import TokenCounter
from tests.material import (
    bound,
    cache,
    context,
    imitate,
    interrupt_at,
    largest_difference,
    loss_of,
    random_rows,
    table,
    term_of,
    train,
    weights_of,
)

weights = st.floats(0, 1)


def weight(name, step=0, steps=100, seed=0, excess=(0.0, 0.0), **options):
    """The mix's one number."""
    return bound(mix, name, **options)(MixState(step, steps, seed, *excess))


# As functions


@given(weights, st.integers(0, 99), st.integers(0, 2**31))
def test_joint_is_the_same_in_every_step(lam, step, seed):
    """lambda f_D + (1 - lambda) f_S."""
    assert weight("joint", step=step, seed=seed, weight=lam) == lam


@given(st.integers(1, 500), weights)
def test_sequence_imitates_first_and_then_prefers(steps, lam):
    """0 for the first round((1 - w) steps), then 1; w = 0 never prefers, w = 1 always does."""
    values = [weight("sequence", step=step, steps=steps, weight=lam) for step in range(steps)]
    first = round((1 - lam) * steps)
    assert values == [0.0] * first + [1.0] * (steps - first)
    assert abs(sum(values) / steps - lam) <= 1 / steps


def test_sequence_has_the_other_order_too():
    """1 for the first round(w steps), then 0."""
    for lam, first in ((0.0, 0), (0.3, 2), (0.5, 4), (1.0, 7)):
        values = [weight("sequence", step=step, steps=7, weight=lam, first="preference") for step in range(7)]
        assert values == [1.0] * first + [0.0] * (7 - first)


def test_alright_prefers_that_often_in_the_long_run():
    """n = 5,000 coins of probability w: within 5 standard deviations sqrt(w (1 - w) / n), and 0 or 1 each."""
    n = 5_000
    for lam in (0.0, 0.1, 0.5, 1.0):
        alright = bound(mix, "alright", weight=lam)
        coins = [alright(MixState(step, n, 7)) for step in range(n)]
        assert set(coins) <= {0.0, 1.0}
        assert abs(np.mean(coins) - lam) <= 5 * math.sqrt(lam * (1 - lam) / n)
        runs = sum(a != b for a, b in pairwise(coins)) / n
        assert abs(runs - 2 * lam * (1 - lam)) <= 5 / math.sqrt(n)  # neighbours are independent
    one, two = ([weight("alright", step=step, seed=seed) for step in range(200)] for seed in (0, 1))
    assert one != two  # equal with probability 2^-200


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.tuples(st.floats(0, 9), st.floats(0, 9)), st.integers(1, 99))
def test_the_coin_is_of_seed_and_step_alone(seed, step, excess, steps):
    """A resumed run, or another rank, tosses the same, whatever it has seen."""
    assert weight("alright", step=step, seed=seed, excess=excess, steps=steps) == weight(
        "alright", step=step, seed=seed
    )


@given(weights, st.floats(-1, 9), st.floats(-1, 9))
def test_maxright_takes_the_larger_weighted_excess(lam, preference, imitation):
    """argmax of lambda (f_D - f_D*) and (1 - lambda) (f_S - f_S*); on a tie, imitation: 0.25 * 3 = 0.75 * 1."""
    expected = float(np.argmax([(1 - lam) * imitation, lam * preference]))  # the first of equals
    assert weight("maxright", excess=(preference, imitation), weight=lam) == expected
    assert weight("maxright", excess=(2.0, 2.0)) == 0.0
    assert weight("maxright", excess=(3.0, 1.0), weight=0.25) == 0.0
    assert weight("maxright", excess=(3.1, 1.0), weight=0.25) == 1.0


# In training


@pytest.fixture(scope="module")
def preferred(tiny):
    """Preferences with a cached reference: prompts q0 to q11 in 24 pairs."""
    return cache(tiny, [row | {"prompt_id": f"q{n}"} for n, row in enumerate(random_rows(seed=1, prompts=12))])


@pytest.fixture(scope="module")
def demonstrated():
    """One response per prompt to imitate: prompts p0 to p9."""
    return imitate([row | {"pairs": []} for row in random_rows(seed=2, prompts=10)], 0)


@pytest.fixture(scope="module")
def mixed(tiny, preferred, demonstrated):
    """Training with a mix of this name."""

    def run(folder, name, inputs=None, *, report_progress=lambda *_: None, seed=0, epochs=2, checkpoint_every=100,
            **options):  # fmt: skip
        return train(
            tiny, preferred, folder, seed=seed, epochs=epochs, checkpoint_every=checkpoint_every, tokens_per_pass=120,
            report_progress=report_progress, mix=bound(mix, name, **options),
            inputs={"demonstrations": table(demonstrated)} | (inputs or {}),
        )  # fmt: skip

    return run


@pytest.fixture
def both_terms(tiny, preferred, demonstrated):
    """The terms that `optimize` makes of both tables; the demonstrations are drawn from a stream of their own."""

    def terms(seed=3):
        options = dict(batch_size=4, tokens_per_pass=120, seed=seed)
        return [term_of(tiny, preferred, "sigmoid_norm", **options),
                term_of(tiny, demonstrated, "nll", index=1, **options)]  # fmt: skip

    return terms


def equal(a, b):
    """Bit for bit."""
    return largest_difference(weights_of(a), weights_of(b)) == 0


def weights_taken(metrics, steps):
    return [metrics[step, "preference_weight"] for step in range(1, steps + 1)]


def test_joint_with_weight_one_is_training_without_a_mix(tiny, preferred, mixed, tmp_path):
    """Nothing of the imitation is drawn or forwarded: the same weights bit for bit, the same metrics and tokens."""
    plain, expected, policy = train(tiny, preferred, tmp_path / "plain", epochs=2, tokens_per_pass=120)
    model, metrics, mixed_policy = mixed(tmp_path / "mix", "joint", weight=1.0)
    assert equal(plain, model)
    assert {key: value for key, value in metrics.items() if key[1] != "preference_weight"} == expected
    assert mixed_policy["tokens"] == policy["tokens"]
    assert set(weights_taken(metrics, policy["steps"])) == {1.0}


def test_joint_with_weight_zero_is_imitation_alone(mixed, both_terms, tmp_path):
    """No preference metric appears; the likelihood of the demonstrations rises; steps are those of the examples."""
    _, metrics, policy = mixed(tmp_path, "joint", weight=0.0, epochs=4)
    assert policy["steps"] == both_terms()[0].batches.steps(4)
    names = {name for _, name in metrics}
    assert "imitation/loss" in names
    assert not {"loss", "margin", "accuracy"} & names
    assert metrics[policy["steps"], "imitation/loss"] < 0.8 * metrics[1, "imitation/loss"]


def test_joint_is_the_weighted_sum_of_both_gradients(sharp, tmp_path):
    """One step: the norm is that of lambda grad f_D + (1 - lambda) grad f_S, computed separately."""
    preferred, demonstrated = cache(sharp, random_rows(seed=1)), imitate(random_rows(seed=2), 0)
    network = load_network(sharp)
    gradients = []
    for rows, name in ((preferred, "sigmoid_norm"), (demonstrated, "nll")):
        loss, _ = loss_of(term_of(sharp, rows, name), network)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    inputs = {"demonstrations": table(demonstrated)}
    joint = bound(mix, "joint", weight=0.3)
    _, metrics, _ = train(sharp, preferred, tmp_path, inputs=inputs, mix=joint, batch_size=100)
    expected = (0.3 * gradients[0] + 0.7 * gradients[1]).norm().item()
    assert metrics[1, "grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_what_has_weight_zero_is_neither_drawn_nor_forwarded(mixed, both_terms, tmp_path, monkeypatch):
    """A step has the metrics of the term it took, and its tokens; each term's batches come in their own order.

    So the tokens of the run are those of the first n batches of each term, n times that it was taken; and of the
    first preference batch once more, for the check of the reference, and of the last batch, whose margin is to be
    saved. No response's last token goes forward.
    """
    for name in ("sequence", "alright"):
        counters: list[TokenCounter] = []

        def load(*args, counters=counters, **options):
            network = load_network(*args, **options)
            counters.append(TokenCounter(network))
            return network

        monkeypatch.setattr(sharded, "load_network", load)
        _, metrics, policy = mixed(tmp_path / name, name, seed=3)
        taken = weights_taken(metrics, policy["steps"])
        assert 0 < sum(taken) < len(taken)
        if name == "sequence":
            first = round(0.5 * policy["steps"])
            assert taken == [0.0] * first + [1.0] * (policy["steps"] - first)
        for step, preference in enumerate(taken, 1):
            assert ((step, "loss") in metrics) == (preference == 1.0)
            assert ((step, "imitation/loss") in metrics) == (preference == 0.0)
        preference, imitation = both_terms()
        batches = [preference.batches[n] for n in range(int(sum(taken)))]
        batches += [imitation.batches[n] for n in range(len(taken) - int(sum(taken)))]
        assert policy["tokens"] == sum(group.tokens for batch in batches for group in batch)
        last = batches[int(sum(taken)) - 1] if taken[-1] else batches[-1]
        groups = [group for batch in [preference.batches[0], *batches, last] for group in batch]
        forwarded = [len(group.prompt) + sum(len(ids) - 1 for ids in group.responses) for group in groups]
        assert counters[0].tokens == sum(forwarded)


def test_an_interrupted_mixed_run_ends_as_if_it_had_not_been(mixed, tmp_path):
    """A checkpoint every 3 steps has the batches that each term has taken and the last excess losses: bit for bit."""
    for name, extra in [("alright", {}), ("maxright", {"refresh": 2, "weight": 0.9})]:
        options: dict = dict(name=name, seed=3, checkpoint_every=3) | extra
        straight, *expected = mixed(tmp_path / name, **options)
        assert set(weights_taken(expected[0], expected[1]["steps"])) == {0.0, 1.0}
        for at in (2, 8):
            with pytest.raises(KeyboardInterrupt):
                mixed(tmp_path / f"{name} {at}", report_progress=interrupt_at(at), **options)
            again, *rest = mixed(tmp_path / f"{name} {at}", **options)
            assert equal(straight, again)
            assert rest == expected


class PlainLoop:
    """A training loop without a mix: AdamW, gradients clipped to 1, in each step the next batch of one term."""

    def __init__(self, init, terms):
        self.network, self.terms, self.batches = load_network(init), terms, [0, 0]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def loss(self, n):
        return loss_of(self.terms[n], self.network, self.terms[n].batches[self.batches[n]])[0]

    def step(self, n):
        self.optimizer.zero_grad()
        loss = self.loss(n)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.batches[n] += 1
        return loss.item()

    def agrees(self, model):
        saved = weights_of(model)
        return all(torch.allclose(w, saved[name], atol=1e-6) for name, w in self.network.named_parameters())


def alright_pseudo_code(loop, steps, lam, seed):
    """i ~ Bernoulli(lambda): i = 1 is a step on f_D, i = 0 one on f_S, neither weighted. The preference weights."""
    coins = [float(np.random.default_rng([seed, step, 2]).random() < lam) for step in range(steps)]
    for coin in coins:
        loop.step(0 if coin else 1)
    return coins


def maxright_pseudo_code(loop, steps, lam, optima, refresh):
    """argmax of the stale weighted excess losses, a plain step on it, whose loss gives its excess. The weights.

    The refresh differs: only what was not taken is measured again, after every `refresh` steps, on the batch
    that it would take next; theirs draws a batch of both in every step and throws one away.
    """
    factor, choices = [lam, 1 - lam], []
    with torch.no_grad():
        stale = [factor[n] * (loop.loss(n).item() - optima[n]) for n in (0, 1)]
    for step in range(1, steps + 1):
        chosen = 0 if stale[0] > stale[1] else 1
        stale[chosen] = factor[chosen] * (loop.step(chosen) - optima[chosen])
        choices.append(1.0 - chosen)
        if step % refresh == 0:
            other = 1 - chosen
            with torch.no_grad():
                stale[other] = factor[other] * (loop.loss(other).item() - optima[other])
    return choices


def test_alright_follows_its_pseudo_code(tiny, mixed, both_terms, tmp_path):
    """The same term in every step, and the same weights at the end."""
    model, metrics, policy = mixed(tmp_path, "alright", seed=3, weight=0.4)
    loop = PlainLoop(tiny, both_terms())
    assert weights_taken(metrics, policy["steps"]) == alright_pseudo_code(loop, policy["steps"], 0.4, 3)
    assert loop.agrees(model)


def curve(values, name):
    """The metrics of a run whose loss had these values."""
    rows = [{"step": n, "metric": name, "value": value} for n, value in enumerate(values, 1)]
    rows += [{"step": n, "metric": "learning_rate", "value": 9.0} for n in range(1, len(values) + 1)]
    return pa.Table.from_pylist(rows, schema=METRICS)


def test_maxright_follows_its_pseudo_code(tiny, mixed, both_terms, tmp_path):
    """The same term in every step; optima come from the metrics of single runs, the mean of their last tenth."""
    for n, (lam, refresh, optima) in enumerate([(0.9, 3, (0.0, 0.0)), (0.8, 1, (0.25, 3.0)), (0.9, 5, (0.5, 2.0))]):
        inputs = {
            "preference_optimum": curve([5.0] * 18 + [optima[0] + 0.1, optima[0] - 0.1], "loss"),
            "imitation_optimum": curve([5.0] * 9 + [optima[1]], "imitation/loss"),
        }
        options = dict(weight=lam, refresh=refresh, seed=3, epochs=4)
        model, metrics, policy = mixed(tmp_path / str(n), "maxright", inputs, **options)
        loop = PlainLoop(tiny, both_terms())
        expected = maxright_pseudo_code(loop, policy["steps"], lam, optima, refresh)
        assert weights_taken(metrics, policy["steps"]) == expected
        assert loop.agrees(model)
        assert {0.0, 1.0} == set(expected)


def test_optima_move_the_choice(mixed, tmp_path):
    """f_D = ln 2 at the start. With f_D* = 1.7 its excess is below 0: imitation first; with f_S* = 99, preference."""
    for optima, first in (((1.7, 0.0), 0.0), ((0.0, 99.0), 1.0)):
        inputs = {
            "preference_optimum": curve([optima[0]], "loss"),
            "imitation_optimum": curve([optima[1]], "imitation/loss"),
        }
        _, metrics, _ = mixed(tmp_path / str(first), "maxright", inputs, epochs=1)
        assert metrics[1, "preference_weight"] == first


def test_measuring_again_costs_no_training(mixed, tmp_path):
    """Measured again or not, a run that takes one term only ends with the same weights: that leaves no gradient."""
    inputs = {"imitation_optimum": curve([99.0], "imitation/loss")}
    one, other = (mixed(tmp_path / str(refresh), "maxright", inputs, refresh=refresh) for refresh in (1, 1000))
    assert equal(one[0], other[0])
    assert one[1] == other[1]


def test_a_mix_of_a_users_own_declares_what_it_needs(mixed, tmp_path):
    """One that uses losses sees both before the first step, and again at the steps of the option that it names, if any.

    The loop knows no option by name: here it is `patience`, and the other mix has none.
    """
    states: list[MixState] = []

    @mix(uses_losses=True, measure_every="patience")
    def patient(state: MixState, *, patience: int = 2) -> float:
        states.append(state)
        return 1.0

    @mix(uses_losses=True)
    def hasty(state: MixState) -> float:
        states.append(state)
        return 1.0

    try:
        for name, options, every in (("patient", {}, 2), ("patient", {"patience": 3}, 3), ("hasty", {}, 1000)):
            states.clear()
            mixed(tmp_path / f"{name} {every}", name, **options)
            assert states[0].preference_excess == pytest.approx(math.log(2), abs=1e-5)
            assert states[0].imitation_excess > 1
            changes = [b.step for a, b in pairwise(states) if a.imitation_excess != b.imitation_excess]
            assert changes == list(range(every, len(states), every))
    finally:
        for name in ("patient", "hasty"):
            mix.entries.pop(name)


def test_both_heldout_sets_are_measured(preferred, demonstrated, mixed, tmp_path):
    """At the last step, each under its own name."""
    inputs = {"heldout": table(preferred[:3]), "heldout_demonstrations": table(demonstrated[:3])}
    _, metrics, policy = mixed(tmp_path, "alright", inputs, seed=3)
    assert {"heldout/loss", "heldout/imitation/loss"} <= {name for step, name in metrics if step == policy["steps"]}


def test_a_loss_that_is_not_finite_names_the_rows_of_the_term_taken(tiny, preferred, demonstrated, tmp_path):
    """An absurd learning rate; imitation alone was taken, so its rows are named, p0 to p9."""
    inputs = {"demonstrations": table(demonstrated)}
    with pytest.raises(WinnowError, match=r"step 1: .*not finite.*rows \(prompt/candidate\): (p\d/c\d\d(, )?)+ and"):
        train(tiny, preferred, tmp_path, learning_rate=1e30, mix=bound(mix, "joint", weight=0.0), inputs=inputs)


# A reward model


def test_a_reward_model_learns_a_plain_preference(tiny, tmp_path):
    """-ln s(r_w - r_l) on pairs whose sides end in different tokens: held-out pairs, too, are all ordered right.

    Scores are 0 at first, so the first loss is ln 2 and the accuracy one half.
    """
    head = reward_head(tiny, context(tmp_path / "head"))
    rows = random_rows(seed=4, prompts=60)
    for row in rows:
        for n, response in enumerate(row["responses"]):
            response["token_ids"] = [*response["token_ids"], 200 if n == 0 else 201]
    options = dict(objective="sigmoid", learning_rate=3e-3, epochs=3, batch_size=8)
    model, metrics, policy = train(head, rows[:40], tmp_path / "train", inputs={"heldout": table(rows[40:])}, **options)
    assert metrics[1, "loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[1, "accuracy"] == 0.5
    assert metrics[policy["steps"], "heldout/accuracy"] == 1.0
    assert metrics[policy["steps"], "heldout/loss"] < 0.2
    assert model.folder.joinpath("model.safetensors").exists()

"""Which objective a step takes: the mixes as functions, and in training with a tiny network."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.context import StageContext, WarmCache
from schemas import Model, WinnowError
from schemas.tables import METRICS
from stages.network.load import load_network
from stages.network.models import reward_head
from stages.training import trainer as training
from stages.training.mixing import MixState, mix
from stages.training.throughput import TokenCounter
from tests.material import bound, cache, imitate, leg_of, loss_of, random_rows, table, train

weights_of = st.floats(0, 1)


def weight(name, step=0, steps=100, seed=0, gaps=(0.0, 0.0), **options):
    """The mix's one number."""
    return bound(mix, name, **options)(MixState(step, steps, seed, *gaps))


# As functions


@given(weights_of, st.integers(0, 99), st.integers(0, 2**31))
def test_joint_is_the_same_in_every_step(share, step, seed):
    """lambda f_D + (1 - lambda) f_S."""
    assert weight("joint", step=step, seed=seed, weight=share) == share


@given(st.integers(1, 500), weights_of)
def test_sequence_imitates_first_and_then_prefers(steps, share):
    """0 for the first round((1 - w) steps), then 1; w = 0 never prefers, w = 1 always does."""
    found = [weight("sequence", step=step, steps=steps, weight=share) for step in range(steps)]
    first = round((1 - share) * steps)
    assert found == [0.0] * first + [1.0] * (steps - first)
    assert abs(sum(found) / steps - share) <= 1 / steps


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_alright_prefers_that_often_in_the_long_run(share):
    """n = 20,000 coins of probability w: within 5 standard deviations sqrt(w (1 - w) / n), and 0 or 1 each."""
    n = 20_000
    coins = [weight("alright", step=step, steps=n, seed=7, weight=share) for step in range(n)]
    assert set(coins) <= {0.0, 1.0}
    assert abs(np.mean(coins) - share) <= 5 * math.sqrt(share * (1 - share) / n)
    runs = sum(a != b for a, b in pairwise(coins)) / n
    assert abs(runs - 2 * share * (1 - share)) <= 5 / math.sqrt(n)  # neighbours are independent


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.tuples(st.floats(0, 9), st.floats(0, 9)), st.integers(1, 99))
def test_the_coin_is_of_seed_and_step_alone(seed, step, gaps, steps):
    """A resumed run, or another rank, tosses the same, whatever it has seen or has left."""
    assert weight("alright", step=step, seed=seed, gaps=gaps, steps=steps) == weight("alright", step=step, seed=seed)


def test_the_coins_of_another_seed_are_others():
    """Two of 200 coins are equal with probability 2^-200."""
    one, two = ([weight("alright", step=step, seed=seed) for step in range(200)] for seed in (0, 1))
    assert one != two


@given(weights_of, st.floats(-1, 9), st.floats(-1, 9))
def test_maxright_takes_the_larger_weighted_gap(share, preference, imitation):
    """argmax of lambda (f_D - f_D*) and (1 - lambda) (f_S - f_S*); on a tie, imitation."""
    expected = float(np.argmax([(1 - share) * imitation, share * preference]))  # the first of equals
    assert weight("maxright", gaps=(preference, imitation), weight=share) == expected


def test_maxright_on_a_tie_imitates():
    """0.5 * 2 against 0.5 * 2, and 0.25 * 3 against 0.75 * 1."""
    assert weight("maxright", gaps=(2.0, 2.0)) == 0.0
    assert weight("maxright", gaps=(3.0, 1.0), weight=0.25) == 0.0
    assert weight("maxright", gaps=(3.1, 1.0), weight=0.25) == 1.0


# In training


@pytest.fixture(scope="module")
def preferred(tiny):
    """Preferences with a cached reference: prompts q0 to q11 in 24 pairs."""
    return cache(tiny, [row | {"prompt_id": f"q{n}"} for n, row in enumerate(random_rows(seed=1, prompts=12))])


@pytest.fixture(scope="module")
def demonstrated():
    """One response a prompt to imitate: prompts p0 to p9."""
    return imitate([row | {"pairs": []} for row in random_rows(seed=2, prompts=10)], 0)


def weights(model: Model):
    return load_file(model.folder / "model.safetensors")


def equal(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mixed(init, preferred, demonstrated, folder, name, inputs=None, *, tell=lambda done, total, unit: None, seed=0,
          epochs=2, checkpoint_every=100, **options):  # fmt: skip
    given = dict(inputs={"demonstrations": table(demonstrated)} | (inputs or {}), mix=bound(mix, name, **options))
    return train(init, preferred, folder, seed=seed, epochs=epochs, checkpoint_every=checkpoint_every, tell=tell,
                 tokens_per_pass=120, **given)  # fmt: skip


def both_sides(init, preferred, demonstrated, seed):
    """The legs that `optimize` makes of them; the demonstrations' order has a seed of its own."""
    given = dict(batch_size=4, tokens_per_pass=120)
    preference, imitation = leg_of(init, preferred, "sigmoid_norm", **given), leg_of(init, demonstrated, "nll", **given)
    preference.seed, imitation.seed, imitation.number = seed, seed, 1
    return [preference, imitation]


def taken(metrics, steps):
    return [metrics[step, "preference_weight"] for step in range(1, steps + 1)]


def test_joint_with_weight_one_is_training_without_a_mix(tiny, preferred, demonstrated, tmp_path):
    """Nothing of the imitation is drawn or forwarded: the same weights bit for bit, the same metrics and tokens."""
    plain, expected, policy = train(tiny, preferred, tmp_path / "plain", epochs=2, tokens_per_pass=120)
    made, found, mixed_policy = mixed(tiny, preferred, demonstrated, tmp_path / "mix", "joint", weight=1.0)
    assert equal(weights(plain), weights(made))
    assert {key: value for key, value in found.items() if key[1] != "preference_weight"} == expected
    assert mixed_policy["tokens"] == policy["tokens"]
    assert set(taken(found, policy["steps"])) == {1.0}


def test_joint_with_weight_zero_is_imitation_alone(tiny, preferred, demonstrated, tmp_path):
    """No preference metric appears; the likelihood of the demonstrations rises; steps are those of the examples."""
    _, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, "joint", weight=0.0, epochs=4)
    assert policy["steps"] == leg_of(tiny, preferred, "sigmoid_norm", batch_size=4).steps(4)
    names = {name for _, name in found}
    assert "imitation/loss" in names
    assert not {"loss", "margin", "accuracy"} & names
    assert found[policy["steps"], "imitation/loss"] < 0.8 * found[1, "imitation/loss"]


def test_joint_is_the_weighted_sum_of_both_gradients(sharp, tmp_path):
    """One step of clipped size: the norm is that of lambda grad f_D + (1 - lambda) grad f_S, computed apart."""
    preferred, demonstrated = cache(sharp, random_rows(seed=1)), imitate(random_rows(seed=2), 0)
    network = load_network(sharp)
    gradients = []
    for rows, name in ((preferred, "sigmoid_norm"), (demonstrated, "nll")):
        loss, _ = loss_of(leg_of(sharp, rows, name), network)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    inputs = {"demonstrations": table(demonstrated)}
    _, found, _ = train(sharp, preferred, tmp_path, inputs=inputs, mix=bound(mix, "joint", weight=0.3), batch_size=100)
    expected = (0.3 * gradients[0] + 0.7 * gradients[1]).norm().item()
    assert found[1, "grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sequence", "alright"])
def test_what_has_weight_zero_is_neither_drawn_nor_forwarded(
    tiny, preferred, demonstrated, tmp_path, monkeypatch, name
):
    """A step has the metrics of the side it took, and its tokens; each side's batches come in their own order.

    So the tokens of the run are those of the first n batches of each side, n times that it was taken; and of the
    first preference batch once more, for the gate, those that the network reads, where no last one is.
    """
    reads = []

    def loaded(*args, **options):
        network = load_network(*args, **options)
        reads.append(TokenCounter(network))
        return network

    monkeypatch.setattr(training, "load_network", loaded)
    _, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, name, seed=3)
    sides = taken(found, policy["steps"])
    assert 0 < sum(sides) < len(sides)
    for step, side in enumerate(sides, 1):
        assert ((step, "loss") in found) == (side == 1.0)
        assert ((step, "imitation/loss") in found) == (side == 0.0)
    preference, imitation = both_sides(tiny, preferred, demonstrated, 3)
    batches = [preference.batch(n) for n in range(int(sum(sides)))]
    batches += [imitation.batch(n) for n in range(len(sides) - int(sum(sides)))]
    assert policy["tokens"] == sum(group.tokens for batch in batches for group in batch)
    read = [group for batch in [preference.batch(0), *batches] for group in batch]
    assert reads[0].tokens == sum(len(group.prompt) + sum(len(ids) - 1 for ids in group.responses) for group in read)


def test_sequence_goes_over_once(tiny, preferred, demonstrated, tmp_path):
    """w = 1/4 of the steps: three quarters of imitation, then a quarter of preference."""
    _, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, "sequence", weight=0.25)
    first = round(0.75 * policy["steps"])
    assert taken(found, policy["steps"]) == [0.0] * first + [1.0] * (policy["steps"] - first)


def stopped(at):
    """A `progress` that ends the run after step `at`, as Ctrl-C does."""

    def tell(done, total, unit):
        if done == at:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(("name", "options"), [("alright", {}), ("maxright", {"refresh": 2, "weight": 0.9})])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_mixed_run_that_was_stopped_ends_as_if_it_had_not_been(
    tiny, preferred, demonstrated, tmp_path, name, options, at
):
    """A checkpoint every 3 steps has the batches that each side has drawn and the gaps last known: bit for bit."""
    given = dict(name=name, seed=3, checkpoint_every=3) | options
    straight, metrics, policy = mixed(tiny, preferred, demonstrated, tmp_path / "straight", **given)
    with pytest.raises(KeyboardInterrupt):
        mixed(tiny, preferred, demonstrated, tmp_path / "stopped", tell=stopped(at), **given)
    again, metrics_again, policy_again = mixed(tiny, preferred, demonstrated, tmp_path / "stopped", **given)
    assert equal(weights(straight), weights(again))
    assert metrics_again == metrics
    assert policy_again == policy
    assert {0.0, 1.0} == set(taken(metrics, policy["steps"]))


class Plain:
    """A training loop without a mix: AdamW, gradients clipped to 1, in each step the next batch of one side."""

    def __init__(self, init, sides):
        self.network, self.sides, self.drawn = load_network(init), sides, [0, 0]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def loss(self, n):
        return loss_of(self.sides[n], self.network, self.sides[n].batch(self.drawn[n]))[0]

    def take(self, n):
        self.optimizer.zero_grad()
        loss = self.loss(n)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.drawn[n] += 1
        return loss.item()

    def agrees(self, model):
        saved = weights(model)
        return all(torch.allclose(w, saved[name], atol=1e-6) for name, w in self.network.named_parameters())


def alright_by_the_book(plain, steps, share, seed):
    """i ~ Bernoulli(lambda): i = 1 is a step on f_D, i = 0 one on f_S, neither weighted. The preference weights."""
    coins = [float(np.random.default_rng([seed, step, 2]).random() < share) for step in range(steps)]
    for coin in coins:
        plain.take(0 if coin else 1)
    return coins


def maxright_by_the_book(plain, steps, share, optima, refresh):
    """argmax of the stale weighted gaps, a plain step on it, its gap from that step's loss. The preference weights.

    The refresh differs: only what was not taken is measured again, after every `refresh` steps, on the batch
    that it would take next; theirs draws a batch of both in every step and throws one away.
    """
    factor, choices = [share, 1 - share], []
    with torch.no_grad():
        stale = [factor[n] * (plain.loss(n).item() - optima[n]) for n in (0, 1)]
    for step in range(1, steps + 1):
        chosen = 0 if stale[0] > stale[1] else 1
        stale[chosen] = factor[chosen] * (plain.take(chosen) - optima[chosen])
        choices.append(1.0 - chosen)
        if step % refresh == 0:
            other = 1 - chosen
            with torch.no_grad():
                stale[other] = factor[other] * (plain.loss(other).item() - optima[other])
    return choices


def test_alright_follows_its_pseudo_code(tiny, preferred, demonstrated, tmp_path):
    """The same side in every step, and the same weights at the end."""
    made, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, "alright", seed=3, weight=0.4)
    plain = Plain(tiny, both_sides(tiny, preferred, demonstrated, 3))
    assert taken(found, policy["steps"]) == alright_by_the_book(plain, policy["steps"], 0.4, 3)
    assert plain.agrees(made)


def curve(values, name):
    """The metrics of a run whose loss had these values."""
    rows = [{"step": n, "metric": name, "value": value} for n, value in enumerate(values, 1)]
    rows += [{"step": n, "metric": "learning_rate", "value": 9.0} for n in range(1, len(values) + 1)]
    return pa.Table.from_pylist(rows, schema=METRICS)


@pytest.mark.parametrize(
    ("share", "refresh", "optima"), [(0.9, 3, (0.0, 0.0)), (0.8, 1, (0.25, 3.0)), (0.9, 5, (0.5, 2.0))]
)
def test_maxright_follows_its_pseudo_code(tiny, preferred, demonstrated, tmp_path, share, refresh, optima):
    """The same side in every step; optima come from the metrics of single runs, the mean of their last tenth."""
    options = dict(weight=share, refresh=refresh, seed=3, epochs=4)
    inputs = {
        "preference_optimum": curve([5.0] * 18 + [optima[0] + 0.1, optima[0] - 0.1], "loss"),
        "imitation_optimum": curve([5.0] * 9 + [optima[1]], "imitation/loss"),
    }
    made, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, "maxright", inputs, **options)
    plain = Plain(tiny, both_sides(tiny, preferred, demonstrated, 3))
    expected = maxright_by_the_book(plain, policy["steps"], share, optima, refresh)
    assert taken(found, policy["steps"]) == expected
    assert plain.agrees(made)
    assert {0.0, 1.0} == set(expected)


def test_optima_move_the_choice(tiny, preferred, demonstrated, tmp_path):
    """f_D = ln 2 at the start. With f_D* = 1.7 its gap is below 0: imitation is first; with f_S* = 99, preference."""
    for optima, first in (((1.7, 0.0), 0.0), ((0.0, 99.0), 1.0)):
        inputs = {
            "preference_optimum": curve([optima[0]], "loss"),
            "imitation_optimum": curve([optima[1]], "imitation/loss"),
        }
        _, found, _ = mixed(tiny, preferred, demonstrated, tmp_path / str(first), "maxright", inputs, epochs=1)
        assert found[1, "preference_weight"] == first


def test_measuring_again_costs_no_training(tiny, preferred, demonstrated, tmp_path):
    """Refreshed or not, a run that takes one side only ends with the same weights: a look leaves no gradient."""
    inputs = {"imitation_optimum": curve([99.0], "imitation/loss")}
    runs = [
        mixed(tiny, preferred, demonstrated, tmp_path / str(refresh), "maxright", inputs, refresh=refresh)
        for refresh in (1, 1000)
    ]
    assert equal(weights(runs[0][0]), weights(runs[1][0]))
    assert runs[0][1] == runs[1][1]


def test_both_heldout_sets_are_measured(tiny, preferred, demonstrated, tmp_path):
    """At the last step, each under its own name."""
    inputs = {"heldout": table(preferred[:3]), "heldout_demonstrations": table(demonstrated[:3])}
    _, found, policy = mixed(tiny, preferred, demonstrated, tmp_path, "alright", inputs, seed=3)
    assert {"heldout/loss", "heldout/imitation/loss"} <= {name for step, name in found if step == policy["steps"]}


def test_a_loss_that_is_not_finite_names_the_rows_of_the_side_taken(tiny, preferred, demonstrated, tmp_path):
    """An absurd learning rate; imitation alone was taken, so its rows are named, p0 to p9."""
    with pytest.raises(WinnowError, match=r"step 1: .*not finite.*rows \(prompt/candidate\): (p\d/c\d\d(, )?)+ and"):
        train(tiny, preferred, tmp_path, learning_rate=1e30, mix=bound(mix, "joint", weight=0.0),
              inputs={"demonstrations": table(demonstrated)})  # fmt: skip


# A reward model


def test_a_reward_model_learns_a_plain_preference(tiny, tmp_path):
    """-ln s(r_w - r_l) on pairs whose sides end in different tokens: on held-out pairs, too, all are told apart.

    Scores are 0 at first, so the first loss is ln 2 and the accuracy one half.
    """
    made = reward_head(tiny, StageContext(tmp_path / "head", WarmCache(), lambda done, total, unit: None))
    rows = random_rows(seed=4, prompts=60)
    for row in rows:
        for n, each in enumerate(row["responses"]):
            each["token_ids"] = [*each["token_ids"], 200 if n == 0 else 201]
    held = {"heldout": table(rows[40:])}
    options = dict(objective="sigmoid", learning_rate=3e-3, epochs=3, batch_size=8, inputs=held)
    trained, found, policy = train(made, rows[:40], tmp_path / "train", **options)
    assert found[1, "loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[1, "accuracy"] == 0.5
    assert found[policy["steps"], "heldout/accuracy"] == 1.0
    assert found[policy["steps"], "heldout/loss"] < 0.2
    assert trained.folder.joinpath("model.safetensors").exists()

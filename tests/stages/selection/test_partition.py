"""The partition function as a learned function of the prompt: the fit, the stage, and the weights that it gives."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline import InputStep
from pipeline.stage import stages
from schemas import WinnowError, conform
from schemas.tables import PARTITIONS, PROMPTS, REWARDS
from stages.selection.groups import RewardGroups
from stages.selection.normalisers import normaliser
from stages.selection.partition import RIDGES, _fit, _intercept, _log_sums, _loss, partition
from stages.selection.rules import selection_rule
from stages.selection.select import _check_rule, select
from tests.catalogs import table
from tests.material import context

LEARNED = {"name": "softmax_weights", "beta": 2.0, "normaliser": "learned"}


def data(prompts=60, draws=3, seed=0):
    """Rewards with a mean that is a linear function of two features: phi [G, 2], rewards [G, draws], at beta 1."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(prompts, 2))
    return phi, 1.5 * phi[:, :1] - 0.5 + 0.7 * rng.normal(size=(prompts, draws))


def fitted(phi, rewards, ridge):
    """log sum exp per prompt, numbers of rewards, d and log Z."""
    draws = rewards.shape[1]
    logs = _log_sums(rewards.ravel(), np.arange(len(rewards) + 1) * draws)
    sizes = np.full(len(rewards), draws)
    d = _fit(logs, phi, sizes, ridge)
    return logs, sizes, d, _intercept(logs, phi, sizes, d) + phi @ d


@pytest.mark.parametrize("ridge", RIDGES)
def test_weights_have_mean_one_and_the_loss_is_least(ridge):
    """exp(r / beta) / Z over all rewards; and a step to any side raises the loss plus ridge."""
    phi, rewards = data()
    logs, sizes, d, log_z = fitted(phi, rewards, ridge)
    assert np.exp(rewards - log_z[:, None]).mean() == pytest.approx(1.0)
    if np.isinf(ridge):
        assert not d.any()
        return

    def total(d):
        return _loss(logs, phi, sizes, d) + ridge / 2 * d @ d

    assert all(total(d + step) > total(d) for step in 1e-3 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]))


def test_a_few_draws_know_less_of_z_than_all_prompts_together():
    """Z = exp(mean + sd^2 / 2): the learned one is nearer than the mean of a prompt's own three draws, by half."""
    phi, rewards = data(prompts=400)
    *_, log_z = fitted(phi, rewards, 1e-3)
    truth = 1.5 * phi[:, 0] - 0.5 + 0.7**2 / 2
    own = np.log(np.exp(rewards).mean(axis=1))
    errors = [float(np.sqrt(np.mean((estimate - truth) ** 2))) for estimate in (log_z, own)]
    assert errors[0] < 0.5 * errors[1]


def prompts_of(*tokens):
    return table(PROMPTS, *(dict(prompt_id=f"p{n:02}", token_ids=ids) for n, ids in enumerate(tokens)))


def rewards_of(values):
    """Two rewards per prompt."""
    rows = [
        dict(prompt_id=f"p{n:02}", candidate_id=f"p{n:02}-{k}", reward=float(value) + k)
        for n, value in enumerate(values)
        for k in range(2)
    ]
    return pa.Table.from_pylist(rows, REWARDS)


def test_it_is_a_function_of_the_prompt_alone(tiny):
    """Prompts of equal tokens have one Z, whatever their own rewards; one that begins with rewards far higher, another.

    Of one token there is no context: that prompt is rejected.
    """
    tokens = [[5, 9, 4 + n % 2] for n in range(20)] + [[7]]
    values = [10.0 * (n % 2) for n in range(20)] + [0.0]
    values[0], values[1] = 3.0, 7.0  # two that are unlike the others of their tokens
    ctx = context()
    result, metrics = partition(prompts_of(*tokens), rewards_of(values), tiny, ctx, beta=2.0)
    log_z = conform(result, PARTITIONS)["log_z"].to_numpy()
    assert len(set(log_z[::2])) == len(set(log_z[1::2])) == 1
    assert log_z[1] - log_z[0] == pytest.approx(10 / 2, abs=1.0)
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [("p20", "a prompt of one token")]
    figures = dict(zip(metrics["metric"].to_pylist(), metrics["value"].to_pylist(), strict=True))
    assert figures["heldout/loss"] < figures["heldout/loss_constant"]


def test_where_prompts_say_nothing_all_have_one_z_and_a_warning(tiny):
    tokens = [[5, 9, 10 + n] for n in range(20)]
    values = np.ones(20)  # equal: no function of the prompt predicts what none has
    with pytest.warns(UserWarning, match=r"say nothing of the rewards of 20 prompts"):
        result, _ = partition(prompts_of(*tokens), rewards_of(values), tiny, context(), beta=1.0)
    assert len(set(result["log_z"].to_pylist())) == 1
    with pytest.raises(WinnowError, match="4 prompts"):
        partition(prompts_of(*tokens[:4]), rewards_of(values[:4]), tiny, context(), beta=1.0)


def test_weights_are_those_of_the_learned_function():
    """exp(r / beta - log Z), of raw rewards; a prompt that it was not learned for is rejected."""
    learned = pa.table([["p00", "p02"], [0.25, -1.0]], schema=PARTITIONS)
    ctx = context()
    rows = select(rewards_of([1.0, 2.0, 3.0]), ctx, partition=learned, rule=selection_rule.bind(LEARNED)).to_pylist()
    expected = [np.exp(r / 2 - z) for z, rewards in ((0.25, (1, 2)), (-1.0, (3, 4))) for r in rewards]
    assert [row["weight"] for row in rows] == pytest.approx(expected)
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [("p01", "no partition function")]


def test_without_a_learned_function_there_are_no_weights():
    """As in `winnow diagnose`, which has rewards alone."""
    groups = RewardGroups(np.zeros(2), np.array([0, 2]), np.zeros(1, np.uint64))
    with pytest.raises(WinnowError, match="partition"):
        normaliser.bind("learned")(groups, np.ones(1))


def problems(rule=LEARNED, scale="raw", rewards="r", beta=2.0, given=True):
    """What a plan says of `select` with a step `partition` learned from step `r` at `beta`."""
    steps = {name: InputStep("reward", {"seed": n}) for n, name in enumerate(("r", "other"))}
    inputs = {"rewards": steps[rewards]}
    if given:
        inputs["partition"] = InputStep("partition", {"beta": beta}, {"rewards": steps["r"]})
    options = stages.find("select").options(rule=selection_rule.bind(rule), scale=scale)
    return _check_rule({name: getattr(options, name) for name in type(options).model_fields}, inputs)


def test_a_plan_refuses_a_partition_function_of_other_weights():
    """Of another temperature, other rewards or another scale; without the step, or without a reader."""
    assert problems() == []
    for changed, words in (
        (dict(beta=1.0), ("rule.beta", "2.0", "1.0")),
        (dict(rewards="other"), ("partition", "rewards")),
        (dict(scale="standardized"), ("scale", "raw")),
        (dict(given=False), ("partition", "from")),
        (dict(rule={"name": "softmax_weights", "beta": 2.0}), ("partition", "learned")),
        (dict(rule={"name": "softmax_weights", "ess": 2.0, "normaliser": "learned"}), ("rule.beta",)),
    ):
        (problem,) = problems(**changed)
        assert all(word in problem for word in words), changed

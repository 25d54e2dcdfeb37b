"""A step's loss against its formula, written as loops over pairs and rows with log-probs computed token by token."""

import math
import tracemalloc
from itertools import pairwise
from typing import get_type_hints

import pytest
import torch

from schemas import WinnowError
from stages.network.load import load_network
from stages.network.models import reward_head
from stages.training.config import TrainConfig
from stages.training.data import BatchSampler, groups_of
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.trainer import check_reference
from tests.material import (
    bound,
    cache,
    context,
    imitate,
    labelled,
    loss_of,
    random_rows,
    relative_difference,
    table,
    term_of,
    train,
    weights_of,
)


@pytest.fixture(scope="module")
def network(sharp):
    return load_network(sharp)


@pytest.fixture(scope="module")
def logp(network):
    """Return log p(response | prompt), token after token, one row at a time, in double precision."""

    def logp_of_row(row, response):
        ids = [*row["prompt_ids"], *response["token_ids"]]
        with torch.inference_mode():
            scores = network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"])
        return sum(scores[position - 1, ids[position]].item() for position in range(start, len(ids)))

    return logp_of_row


def sides(row):
    for pair in row["pairs"]:
        yield row["responses"][pair["chosen"]], row["responses"][pair["rejected"]], pair


def test_slic_hf(sharp, network, logp):
    """mean over pairs of max(0, delta - lp(w) + lp(l)), minus lambda mean over targets of lp(y_ref), all summed.

    arXiv:2305.10425, eq. 1, with the best candidate as y_ref: nll_weight = lambda, nll_per = response.
    """
    rows = imitate(random_rows(), 0)
    pairs = [max(0.0, 1.0 - logp(row, won) + logp(row, lost)) for row in rows for won, lost, _ in sides(row)]
    targets = [logp(row, row["responses"][0]) for row in rows]
    expected = sum(pairs) / len(pairs) - 0.1 * sum(targets) / len(targets)
    term = term_of(sharp, rows, "hinge", delta=1.0, nll_weight=0.1, nll_per="response")
    assert loss_of(term, network)[0].item() == pytest.approx(expected, rel=1e-5)


def test_click(sharp, network, logp):
    """L_LM + alpha mean over pairs of max(0, gamma + lp(y-) - lp(y+)), L_LM a mean over tokens. arXiv:2306.03350.

    Ours is that over alpha: hinge with delta = gamma, and nll_weight = 1 / alpha.
    """
    rows = imitate(random_rows(), 0)
    alpha, gamma = 0.5, 15.0
    pairs = [max(0.0, gamma + logp(row, lost) - logp(row, won)) for row in rows for won, lost, _ in sides(row)]
    tokens = sum(len(row["responses"][0]["token_ids"]) for row in rows)
    language = -sum(logp(row, row["responses"][0]) for row in rows) / tokens
    term = term_of(sharp, rows, "hinge", delta=gamma, nll_weight=1 / alpha)
    loss = loss_of(term, network)[0].item()
    assert alpha * loss == pytest.approx(language + alpha * sum(pairs) / len(pairs), rel=1e-5)
    assert sum(value > 0 for value in pairs) > 0


def test_rrhf(sharp, network, logp):
    """sum over r_i < r_j of max(0, p_i - p_j), p = lp / |y|, minus lp of the best: arXiv:2304.05302, eq. 2 to 4.

    A prompt with k responses has k (k - 1) / 2 such pairs; per prompt, ours is theirs over that number with
    nll_weight one over it, nll_per response. Rewards fall with the index, so the first is the best.
    """
    k = 4
    rows = imitate([row for row in random_rows(prompts=9) if len(row["responses"]) == k], 0)
    every = [(i, j) for i in range(k) for j in range(k) if i < j]
    for row in rows:
        row["pairs"] = [{"chosen": i, "rejected": j, "weight": 1.0, "label": 1.0} for i, j in every]
    total = 0.0
    for row in rows:
        p = [logp(row, response) / len(response["token_ids"]) for response in row["responses"]]
        rewards = [-n for n in range(k)]
        total += sum(max(0.0, p[i] - p[j]) for i in range(k) for j in range(k) if rewards[i] < rewards[j])
        total -= logp(row, row["responses"][0])
    term = term_of(sharp, rows, "rank", nll_weight=1 / len(every), nll_per="response")
    assert len(every) * loss_of(term, network)[0].item() == pytest.approx(total / len(rows), rel=1e-5)


def test_spin(sharp, network, logp):
    """mean of l(lambda log pi(y) / pi_t(y) - lambda log pi(y') / pi_t(y')), l(t) = log(1 + e^-t): arXiv:2401.01335.

    y is the demonstration, y' a sample of pi_t, the policy that the iteration starts from.
    """
    rows = cache(sharp, random_rows(), spread=8.0)
    values = [
        math.log1p(math.exp(-0.3 * (logp(row, won) - won["ref_logp"]) + 0.3 * (logp(row, lost) - lost["ref_logp"])))
        for row in rows
        for won, lost, _ in sides(row)
    ]
    term = term_of(sharp, rows, "sigmoid_norm", beta=0.3)
    assert loss_of(term, network)[0].item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_weights_and_labels_of_pairs(sharp, network, logp):
    """sum v [-q ln s(beta h) - (1 - q) ln s(-beta h)] / pairs: v how much a pair counts, q its label."""
    rows = cache(sharp, random_rows(), spread=8.0)
    total = count = 0.0
    for n, row in enumerate(rows):
        for m, (won, lost, pair) in enumerate(sides(row)):
            pair |= {"weight": 0.25 * (1 + n + m), "label": 0.5 + 0.0625 * (n + m)}
            h = logp(row, won) - won["ref_logp"] - logp(row, lost) + lost["ref_logp"]
            q = pair["label"]
            value = q * math.log1p(math.exp(-0.1 * h)) + (1 - q) * math.log1p(math.exp(0.1 * h))
            total, count = total + pair["weight"] * value, count + 1
    for tokens_per_pass in (1, 60, 10_000):
        term = term_of(sharp, rows, "sigmoid_norm", beta=0.1, tokens_per_pass=tokens_per_pass)
        assert loss_of(term, network)[0].item() == pytest.approx(total / count, rel=1e-5)


def test_weights_keep_their_scale(sharp, network):
    """Twice all weights is twice the loss, so what one prompt's weights say beside another's remains."""
    plain, heavy = (cache(sharp, random_rows(), spread=8.0) for _ in range(2))
    for row in heavy:
        for pair in row["pairs"]:
            pair["weight"] = 2.0
    one, two = (loss_of(term_of(sharp, rows, "sigmoid_norm"), network)[0].item() for rows in (plain, heavy))
    assert two == pytest.approx(2 * one, rel=1e-6)
    light, heavy = imitate(random_rows(), 0), imitate(random_rows(), 0)
    for row in heavy:
        row["responses"][0]["weight"] = 2.0
    for nll_per in ("token", "response"):
        one, two = (loss_of(term_of(sharp, rows, "nll", nll_per=nll_per), network)[0].item() for rows in (light, heavy))
        assert two == pytest.approx(2 * one, rel=1e-6)


@pytest.mark.parametrize("apart", [-4.0, 4.0])
def test_kto(sharp, network, logp, apart):
    """mean over labelled rows of D (1 - s(beta (r - z))) or U (1 - s(beta (z - r))), arXiv:2402.01306, eq. 8.

    z = max(0, mean of r over the responses under other prompts): one number for the whole step, whatever the
    micro-batches; a response without a label counts nowhere. Once z is cut off at 0 and once it is not.
    """
    rows = cache(sharp, labelled(random_rows()), spread=3.0)
    logratios: dict = {1: [], 0: [], -1: [], None: []}
    for row in rows:
        for response in row["responses"]:
            response["ref_logp"] -= apart * (response["desirable"] == 0)
            logratios[response["desirable"]].append(logp(row, response) - response["ref_logp"])
    kl = sum(logratios[0]) / len(logratios[0])
    z = max(0.0, kl)
    total = sum(1.2 / (1 + math.exp(0.2 * (r - z))) for r in logratios[1])
    total += sum(1.5 / (1 + math.exp(0.2 * (z - r))) for r in logratios[-1])
    for tokens_per_pass in (1, 60, 10_000):
        options = dict(beta=0.2, desirable=1.2, undesirable=1.5, tokens_per_pass=tokens_per_pass)
        loss, entry = loss_of(term_of(sharp, rows, "kto", **options), network)
        assert loss.item() == pytest.approx(total / len(logratios[1] + logratios[-1]), rel=1e-5)
        assert entry["kl"] == pytest.approx(kl, abs=1e-4)
    assert (z > 0) == (apart > 0)


def test_training_by_kto_is_the_same_in_any_micro_batches(sharp, network, tmp_path):
    """z is of the whole step and taken before any gradient: equal gradients, and equal weights after two epochs."""
    rows = cache(sharp, labelled(random_rows()))
    gradients, runs = [], []
    for tokens_per_pass in (1, 10_000):
        loss, _ = loss_of(term_of(sharp, rows, "kto", tokens_per_pass=tokens_per_pass), network)
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        gradients.append(torch.cat([slope.flatten() for slope in slopes]))
        folder = tmp_path / str(tokens_per_pass)
        runs.append(train(sharp, rows, folder, objective="kto", epochs=2, tokens_per_pass=tokens_per_pass))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    (fine, metrics, _), (coarse, expected, policy) = runs
    assert metrics[1, "loss"] == pytest.approx(0.5, abs=1e-5)
    assert abs(expected[policy["steps"], "kl"]) > 1e-2
    for step in range(1, policy["steps"] + 1):
        assert metrics[step, "kl"] == pytest.approx(expected[step, "kl"], abs=1e-3)
    assert relative_difference(weights_of(fine), weights_of(coarse), weights_of(sharp)) < 3e-4


def test_kto_counts_its_batches_in_labels(sharp):
    """A step is whole groups until they hold batch_size labels; mismatched and unlabelled rows do not count."""
    term = term_of(sharp, cache(sharp, labelled(random_rows())), "kto", batch_size=4)
    assert [sum(group.labelled for group in term.batches[n]) for n in range(3)] == [4, 4, 4]
    assert all(len(group.mismatched) == 2 for group in term.groups)


def test_the_reference_check_of_kto_includes_its_mismatched_rows(sharp, network):
    """Policy = reference gives kl 0 and D / 2, U / 2; a mismatched reference that is 5 nats low gives another loss."""
    rows = cache(sharp, labelled(random_rows()))
    check_reference(term_of(sharp, rows, "kto"), network)
    for row in rows:
        for response in row["responses"]:
            response["ref_logp"] -= 5.0 * (response["desirable"] == 0)
    with pytest.raises(WinnowError, match="step 0"):
        check_reference(term_of(sharp, rows, "kto"), network)


def test_soft_labels_are_refused_where_they_would_be_ignored(sharp):
    """Objectives that read no labels take every pair as certain."""
    rows = cache(sharp, random_rows())
    rows[0]["pairs"][0]["label"] = 0.75
    for name in ("hinge", "hinge_norm", "squared", "rank", "sigmoid_mean", "odds_ratio"):
        with pytest.raises(WinnowError, match=f"objective {name} takes every label as certain.*labels: hard"):
            term_of(sharp, rows, name)


def test_nll_per_token_or_per_response(sharp, network, logp):
    """-sum w lp / sum |y|, or -sum w lp / n, over the n responses with w > 0."""
    rows = imitate(random_rows(), 0, 1)
    for n, row in enumerate(rows):
        row["responses"][1]["weight"] = 0.5 * n
    pairs = [(row, response) for row in rows for response in row["responses"]]
    total = -sum(response["weight"] * logp(row, response) for row, response in pairs)
    counts = {
        "token": sum(len(response["token_ids"]) for _, response in pairs if response["weight"]),
        "response": sum(response["weight"] > 0 for _, response in pairs),
    }
    for nll_per, count in counts.items():
        loss, _ = loss_of(term_of(sharp, rows, "nll", nll_per=nll_per), network)
        assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_token_ids_of_all_groups_are_not_objects_of_python(sharp):
    """What groups and their batches keep is small beside the table, in whose memory the ids stay."""
    rows = random_rows(prompts=600)
    for row in rows:
        for candidate in row["responses"]:
            candidate["token_ids"] = [300 + n % 40 for n in range(100)]
    examples = table(rows)
    tracemalloc.start()
    groups = groups_of(examples, bound(objective, "hinge"), 0.0, sharp, "float32")
    assert BatchSampler(groups, "pairs", 32, 0, 0).steps(2) > 20
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(groups) == 600
    assert kept < examples.nbytes / 2


def test_each_epoch_has_every_group_once_in_batches_from_the_seed_alone(sharp):
    """A batch is whole groups until they hold batch_size pairs, the last of an epoch the rest, in any order."""
    rows = cache(sharp, random_rows(prompts=7))
    one, two = (term_of(sharp, rows, "sigmoid_norm", batch_size=4, seed=5).batches for _ in range(2))
    per_epoch = [one.steps(epochs) for epochs in (1, 2, 3)]
    forward, backward = [one[n] for n in range(per_epoch[-1])], [two[n] for n in reversed(range(per_epoch[-1]))]
    assert forward == backward[::-1]
    for start, end in pairwise([0, *per_epoch]):
        epoch = forward[start:end]
        assert sorted(group.prompt_id for batch in epoch for group in batch) == [f"p{n}" for n in range(7)]
        sizes = [[len(group.pairs) for group in batch] for batch in epoch]
        assert all(sum(batch) >= 4 > sum(batch[:-1]) for batch in sizes[:-1])
        assert sum(sizes[-1][:-1]) < 4


def test_the_config_has_the_types_of_the_options():
    """`TrainConfig` is filled from the options of `optimize` by name, which a type checker does not see."""
    options = get_type_hints(optimize)
    for name, kind in get_type_hints(TrainConfig).items():
        assert options[name] == kind, name


def test_a_reward_model_takes_no_loss_of_log_probs(tiny, tmp_path):
    """Its score is no log-prob: no reference, no average per token, no likelihood. A hinge may be of scores."""
    head = reward_head(tiny, context(tmp_path))
    rows = table(cache(tiny, random_rows()))
    for name, nll_weight in [*((name, 0.0) for name in ("sigmoid_norm", "rank", "kto", "nll")), ("sigmoid", 0.5)]:
        with pytest.raises(WinnowError, match="reward model gives scores"):
            groups_of(rows, bound(objective, name), nll_weight, head, "float32")
    assert groups_of(rows, bound(objective, "hinge"), 0.0, head, "float32")

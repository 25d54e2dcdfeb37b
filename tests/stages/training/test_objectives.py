"""Losses as formulas. lp, rp: summed log-probs of policy, reference; d = lp - rp; h = d(w) - d(l); m = lp / |y|."""

import ast
import inspect
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.registry import Bound
from stages.training.objectives import (
    Batch,
    hinge,
    hinge_norm,
    kto,
    nll,
    objective,
    odds_ratio,
    rank,
    sigmoid,
    sigmoid_mean,
    sigmoid_norm,
    squared,
)

LN2 = math.log(2)
ENTRIES = list(objective.entries.values())
PAIRED = [entry for entry in ENTRIES if entry.metadata["per"] == "pairs"]
WITH_REFERENCE = [entry for entry in ENTRIES if "ref" in entry.metadata["reads"]]
few = settings(max_examples=25, deadline=None)  # of all objectives
margins = st.floats(-60, 60)
scales = st.floats(0.01, 2)
probabilities = st.floats(0.001, 0.999)


def losses_of(entry, b, **options):
    return Bound(entry, options)(b)


def batch(logp, ref=None, *, length=None, pairs=((0, 1),), weight=None, label=None, desirable=None, kl=None,
          dtype=torch.float64):  # fmt: skip
    """Rows of given log-probs, one pair of them unless said otherwise, weights and lengths 1."""

    def vector(values):
        return None if values is None else torch.as_tensor(values, dtype=dtype)

    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return Batch(
        logp=vector(logp).clone().requires_grad_(),
        length=vector([1.0] * len(logp) if length is None else length),
        weight=vector([1.0] * len(logp) if weight is None else weight),
        chosen=index[:, 0],
        rejected=index[:, 1],
        ref=vector(ref),
        label=vector(label),
        desirable=vector(desirable),
        kl=vector(kl),
    )


def pair(h, **fields):
    """One pair whose h is given."""
    return batch([h, 0.0], [0.0, 0.0], **fields)


def slopes(losses, b):
    """Return dL/dlp per row."""
    return torch.autograd.grad(losses.sum(), b.logp)[0].tolist()


def s(x):
    """The logistic function."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


@st.composite
def full_batch(draw):
    """A batch with every field, far from any special value; each pair of rows at most once."""
    n = draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ordered = [(i, j) for i in range(n) for j in range(n) if i != j]
    pairs = [ordered[k] for k in rng.permutation(len(ordered))[: draw(st.integers(1, len(ordered)))]]
    length = rng.integers(1, 30, n)
    return batch(
        -length * rng.uniform(0.05, 4, n),
        -length * rng.uniform(0.05, 4, n),
        length=length,
        weight=rng.uniform(0.1, 2, n),
        pairs=pairs,
        label=rng.uniform(0.55, 0.95, len(pairs)),
        desirable=rng.choice([-1.0, 0.0, 1.0], n),
        kl=rng.uniform(0.1, 3),
    )


def test_by_hand():
    """DPO: lp = (-10, -14), rp = (-11, -12): h = 4 - 1 = 3, beta h = 0.3; ln(1 + e^-0.3) = 0.554355244. Smoothed by
    0.1: 0.9 * 0.554355244 + 0.1 * 0.854355244 = 0.584355244, for ln(1 + e^x) = ln(1 + e^-x) + x.

    SLiC on the same: delta = 5: 5 + 10 - 14 = 1; delta = 1: max(0, 1 - 4) = 0. SimPO, lp = (-3, -10) with 3 and 5
    tokens: g = 1, at beta 2 and gamma 1 ln(1 + e^-1) = 0.313261688. lp = (-12, -10) with 6 and 2 tokens: m = (-2, -5),
    in order for RRHF though the sums are not, which the hinge sees. KTO, r = 2 for both, kl = 1, beta = 1/2: x = 0.5;
    1 - s(0.5) = 0.377540669 and s(0.5) = 0.622459331. A mean logratio below 0 is no divergence: z = 0, x = 1, and
    1 - s(1) = 0.268941421.
    """
    even, uneven = batch([-10.0, -14.0], [-11.0, -12.0]), batch([-12.0, -10.0], length=[6, 2])
    rows = batch([-3.0, -3.0], [-5.0, -5.0], desirable=[1, -1], kl=1.0, pairs=())
    for losses, expected in [
        (sigmoid_norm(even, beta=0.1), [0.554355244]),
        (sigmoid_norm(even, beta=0.1, smoothing=0.1), [0.584355244]),
        (hinge(even, delta=5.0), [1.0]),
        (hinge(even, delta=1.0), [0.0]),
        (sigmoid_mean(batch([-3.0, -10.0], length=[3, 5]), beta=2.0, gamma=1.0), [0.313261688]),
        (rank(uneven), [0.0]),
        (hinge(uneven, delta=1.0), [3.0]),
        (kto(rows, beta=0.5), [0.377540669, 0.622459331]),
        (kto(replace(rows, kl=torch.tensor(-9.0)), beta=0.5), [0.268941421, 0.731058579]),
    ]:
        assert losses.tolist() == pytest.approx(expected)


def log1pexp(x):
    """-ln s(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@given(st.tuples(*[st.floats(-60, 0)] * 4), st.tuples(*[st.integers(1, 40)] * 2), scales, probabilities)
def test_values_and_slopes_are_the_formulas(logps, lengths, scale, q):
    """Each pairwise loss as a function of one margin x: of logratios (h), of log-probs, or of either per token.

    dL/dlp(w) = L'(x) and dL/dlp(l) = -L'(x), each over its side's own length where x is per token. DPO's
    L' = beta (s(beta h) - q) is eq. 7 of arXiv:2305.18290 at q = 1. A hinge bends at its margin.
    """
    chosen, rejected, ref_chosen, ref_rejected = logps
    (long, short), aim = lengths, 1 / (2 * scale)
    h, g = (chosen - ref_chosen) - (rejected - ref_rejected), chosen - rejected
    h_token, g_token = (
        (chosen - ref_chosen) / long - (rejected - ref_rejected) / short,
        chosen / long - rejected / short,
    )
    assume(min(abs(1 - scale * h), abs(scale - g), abs(g_token)) > 1e-9)
    b = batch([chosen, rejected], [ref_chosen, ref_rejected], length=lengths)
    soft = replace(b, label=torch.tensor([q], dtype=torch.float64))
    for loss, value, slope, per_token in [
        (sigmoid_norm(b, beta=scale), log1pexp(-scale * h), -scale * s(-scale * h), False),
        (sigmoid_norm(soft, beta=scale), log1pexp(-scale * h) + (1 - q) * scale * h, scale * (s(scale * h) - q), False),
        (sigmoid(b, beta=scale), log1pexp(-scale * g), -scale * s(-scale * g), False),
        (sigmoid(soft, beta=scale), log1pexp(-scale * g) + (1 - q) * scale * g, scale * (s(scale * g) - q), False),
        (hinge_norm(b, gamma=scale), max(0.0, 1 - scale * h), -scale * (scale * h < 1), False),
        (hinge(b, delta=scale), max(0.0, scale - g), -1.0 * (g < scale), False),
        (squared(b, tau=scale), (h - aim) ** 2, 2 * (h - aim), False),
        (squared(b, tau=scale, average="token"), (h_token - aim) ** 2, 2 * (h_token - aim), True),
        (rank(b), max(0.0, -g_token), -1.0 * (g_token < 0), True),
        (
            sigmoid_mean(b, beta=scale, gamma=1.5),
            log1pexp(1.5 - scale * g_token),
            -scale * s(1.5 - scale * g_token),
            True,
        ),
    ]:
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
        sides = [slope / long, -slope / short] if per_token else [slope, -slope]
        assert slopes(loss, b) == pytest.approx(sides, rel=1e-9, abs=1e-12)


@given(st.floats(-200, 0), st.floats(-200, 0), st.integers(1, 40), scales)
def test_how_the_losses_relate(chosen, rejected, n, scale):
    """hinge_norm is gamma times SLiC's hinge with delta 1 / gamma, on logratios instead of log-probs, and 1 at
    policy = reference. IPO per token at n tau is IPO at tau over n^2, for equal lengths n. SimPO without a margin is
    DPO without a reference on averages; with one, ln 2 where the margin is just reached."""
    b = batch([chosen, rejected], [0.0, 0.0], length=[n, n])
    averages = batch([chosen / n, rejected / n], [0.0, 0.0])
    for ours, other in [
        (hinge_norm(b, gamma=scale), scale * hinge(b, delta=1 / scale)),
        (hinge_norm(pair(0.0), gamma=scale), torch.ones(1)),
        (squared(b, tau=n * scale, average="token"), squared(b, tau=scale) / n**2),
        (sigmoid_mean(b, beta=scale, gamma=0.0), sigmoid_norm(averages, beta=scale)),
        (sigmoid_mean(batch([3 * n / scale - 6, -10.0], length=[3, 5]), beta=scale, gamma=n), torch.tensor([LN2])),
    ]:
        assert ours.item() == pytest.approx(other.item(), rel=1e-7, abs=1e-9)


# DPO, with certain, smoothed and soft labels


@given(st.lists(st.floats(-300, 0), min_size=2, max_size=9), scales, probabilities)
def test_dpo_is_ln_2_at_policy_equal_reference(logp, beta, label):
    """h = 0: -q ln s(0) - (1 - q) ln s(0) = ln 2, for every beta, label and smoothing."""
    pairs = [(n, n + 1) for n in range(len(logp) - 1)]
    for labels, smoothing in [(None, 0.0), (None, 0.3), ([label] * len(pairs), 0.0), ([label] * len(pairs), 0.1)]:
        same = batch(logp, logp, pairs=pairs, label=labels)
        losses = sigmoid_norm(same, beta=beta, smoothing=smoothing).tolist()
        assert losses == pytest.approx([LN2] * len(pairs), abs=1e-12)


@given(margins, scales, st.floats(0, 0.499))
def test_smoothing_is_a_label_for_every_pair(h, beta, smoothing):
    """cDPO(epsilon) is DPO with q = 1 - epsilon; cDPO(0) is DPO. Both at once: q (1 - e) + (1 - q) e.

    A pair may be turned around with its label: L(h, q) = L(-h, 1 - q).
    """
    smooth = sigmoid_norm(pair(h), beta=beta, smoothing=smoothing).item()
    assert smooth == pytest.approx(sigmoid_norm(pair(h, label=[1 - smoothing]), beta=beta).item(), abs=1e-12)
    assert (
        sigmoid_norm(pair(h), beta=beta, smoothing=0.0).item() == sigmoid_norm(pair(h, label=[1.0]), beta=beta).item()
    )
    both = 0.8 * (1 - smoothing) + 0.2 * smoothing
    soft = sigmoid_norm(pair(h, label=[0.8]), beta=beta, smoothing=smoothing).item()
    for same in (pair(h, label=[both]), pair(-h, label=[1 - both])):
        assert soft == pytest.approx(sigmoid_norm(same, beta=beta).item(), abs=1e-12)


@given(probabilities, scales)
def test_the_least_of_a_soft_label_is_its_entropy(q, beta):
    """Slope 0 where s(beta h) = q, at h = log(q / (1 - q)) / beta; L = -q ln q - (1 - q) ln(1 - q) there."""
    b = pair(math.log(q / (1 - q)) / beta, label=[q])
    loss = sigmoid_norm(b, beta=beta)
    assert slopes(loss, b) == pytest.approx([0, 0], abs=1e-12)
    assert loss.item() == pytest.approx(-q * math.log(q) - (1 - q) * math.log(1 - q), abs=1e-12)


def test_dpo_is_finite_with_a_finite_slope_far_out():
    """-ln s(beta h) -> -beta h as h -> -inf and exp(-beta h) as h -> inf; its slope stays in [-beta, 0]."""
    for h, dtype in product([-1e4, -1e2, -1.0, 0.0, 1.0, 1e2, 1e4], [torch.float32, torch.float64]):
        b = pair(h, dtype=dtype)
        loss = sigmoid_norm(b, beta=1.0)
        assert loss.item() == pytest.approx(max(0.0, -h) + math.log1p(math.exp(-abs(h))), rel=1e-6, abs=1e-12)
        assert -1 <= slopes(loss, b)[0] <= 0


# ORPO


def exact_orpo(chosen, rejected, weight):
    """(loss, dL/dm(w), dL/dm(l)) in 400 digits: log odds(m) = m - log(1 - e^m), whose slope is 1 / (1 - e^m)."""
    with localcontext(prec=400):
        w, r = Decimal(chosen), Decimal(rejected)
        margin = (w - (1 - w.exp()).ln()) - (r - (1 - r.exp()).ln())
        wrong = 1 / (1 + margin.exp())
        exact = ((1 + (-margin).exp()).ln(), -wrong / (1 - w.exp()), wrong / (1 - r.exp()))
        return [weight * float(x) for x in exact]


means = st.one_of(st.floats(-5, -1e-5), st.floats(-1e-2, -2e-6), st.floats(-700, -5))


@given(means, means)
def test_orpo_is_exact_from_certain_to_impossible(chosen, rejected):
    """-lambda ln s(log odds(w) - log odds(l)) and its slopes, to 1e-8 of their exact values.

    1 - e^m from m = -2e-6, where it has lost 6 digits, to m = -700, where e^m is almost subnormal.
    """
    b = batch([3 * chosen, 2 * rejected], length=[3, 2])
    loss = odds_ratio(b, weight=0.1)
    value, up, down = exact_orpo(b.mean[0].item(), b.mean[1].item(), 0.1)
    assert loss.item() == pytest.approx(value, rel=1e-8, abs=1e-300)
    assert slopes(loss, b) == pytest.approx([up / 3, down / 2], rel=1e-8, abs=1e-300)


@given(means, means)
def test_orpo_in_single_precision_keeps_four_digits(chosen, rejected):
    """The network's own precision: a float32 mean next to 0 has lost digits before the loss sees it, no more are lost.

    |log odds| < 14 + 700, so an error of 1e-4 of it bounds that of the loss.
    """
    b = batch([chosen, rejected], dtype=torch.float32)
    value, _, _ = exact_orpo(b.logp[0].item(), b.logp[1].item(), 0.1)
    assert odds_ratio(b, weight=0.1).item() == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_orpo_and_its_slopes_are_finite_even_at_probability_one():
    """m = 0 has infinite odds; within 1e-6 of it the odds stay at 1e6, and nothing becomes inf or NaN."""
    means = [0.0, -1e-12, -1e-7, -1e-3, -1.0, -1e2, -1e5]
    for chosen, rejected, dtype in product(means, means, [torch.float32, torch.float64]):
        b = batch([chosen, rejected], dtype=dtype)
        loss = odds_ratio(b)
        assert math.isfinite(loss.item())
        assert all(map(math.isfinite, slopes(loss, b)))


@given(st.floats(-300, -25), st.floats(-300, -25))
def test_orpo_far_from_one_is_simpo(chosen, rejected):
    """odds(p) -> p as p -> 0: at p < e^-25, lambda times SimPO with beta 1 and gamma 0; at equal p lambda ln 2."""
    b = batch([chosen, rejected])
    assert odds_ratio(b, weight=0.3).item() == pytest.approx(
        0.3 * sigmoid_mean(b, beta=1.0, gamma=0.0).item(), rel=1e-9, abs=1e-300
    )
    assert odds_ratio(batch([chosen, chosen]), weight=0.3).item() == pytest.approx(0.3 * LN2)


# Bradley and Terry


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.integers(0, 2**32))
def test_sigmoid_on_scores_is_the_likelihood_of_bradley_and_terry(scores, seed):
    """-sum ln P(w beats l), P = s(r_w - r_l): its slope is, for item i, sum over i's games of P(i wins) - its wins."""
    rng = np.random.default_rng(seed)
    n = len(scores)
    games = [(i, j) for i in range(n) for j in range(n) if i != j for _ in range(rng.integers(0, 4))]
    b = batch(scores, pairs=games)
    loss = sigmoid(b)
    assert loss.sum().item() == pytest.approx(-sum(math.log(s(scores[i] - scores[j])) for i, j in games))
    wins = [sum(winner == i for winner, _ in games) for i in range(n)]
    hoped = [sum(s(scores[i] - scores[j + k - i]) for j, k in games if i in (j, k)) for i in range(n)]
    assert slopes(loss, b) == pytest.approx(np.subtract(hoped, wins), abs=1e-12)


@given(st.integers(1, 50), st.integers(1, 50))
def test_the_best_scores_of_two_items_give_back_their_ratio_of_wins(wins, losses):
    """a wins and b losses: slope 0 at r_1 - r_2 = log(a / b), and one pair of label a / (a + b) has the same."""
    best = math.log(wins / losses)
    b = batch([best, 0.0], pairs=[(0, 1)] * wins + [(1, 0)] * losses)
    games = sigmoid(b)
    assert slopes(games, b) == pytest.approx([0, 0], abs=1e-10)
    soft = sigmoid(batch([best, 0.0], label=[wins / (wins + losses)])).item()
    assert games.mean().item() == pytest.approx(soft, rel=1e-12)


# KTO


@given(st.floats(-60, 60), st.floats(-5, 5), scales)
def test_kto_is_one_minus_the_value_of_a_gain_over_z(logratio, kl, beta):
    """z = max(0, kl), r = the logratio: D (1 - s(beta (r - z))) if desirable, U (1 - s(beta (z - r))) if not, else 0.

    Slopes -D beta s s' and U beta s s', with s s' = s(x) (1 - s(x)) at x = beta (r - z); 0 without a label.
    """
    b = batch([logratio - 7] * 3, [-7.0] * 3, desirable=[1, -1, 0], kl=kl, pairs=())
    losses = kto(b, beta=beta, desirable=1.3, undesirable=0.6)
    value = s(beta * (logratio - max(0.0, kl)))
    other = s(-beta * (logratio - max(0.0, kl)))
    assert losses.tolist() == pytest.approx([1.3 * other, 0.6 * value, 0.0], abs=1e-9)
    steep = beta * value * other
    assert slopes(losses, b) == pytest.approx([-1.3 * steep, 0.6 * steep, 0.0], abs=1e-9)


@given(st.lists(st.floats(-300, 0), min_size=3, max_size=3), scales)
def test_kto_starts_at_half_its_weights(logp, beta):
    """Policy = reference: r = z = 0 and s(0) = 1/2, so D / 2 and U / 2, with slopes of beta / 4 of them."""
    b = batch(logp, logp, desirable=[1, -1, 0], kl=0.0, pairs=())
    losses = kto(b, beta=beta, desirable=1.3, undesirable=0.6)
    assert losses.tolist() == pytest.approx([0.65, 0.3, 0.0], abs=1e-12)
    assert slopes(losses, b) == pytest.approx([-1.3 * beta / 4, 0.6 * beta / 4, 0], abs=1e-12)


# Likelihood


@given(st.lists(st.tuples(st.floats(-300, 0), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=9))
def test_nll_is_minus_weight_times_logp_a_row(rows):
    """L_i = -w_i lp_i; a row of weight 0 adds nothing and has slope 0."""
    b = batch([logp for logp, _ in rows], weight=[weight for _, weight in rows], pairs=())
    losses = nll(b)
    assert losses.tolist() == [pytest.approx(-weight * logp) for logp, weight in rows]
    assert slopes(losses, b) == [-weight for _, weight in rows]


# Laws of all of them, or of all of a kind


@few
@given(b=full_batch())
def test_slopes_are_those_of_the_values(b):
    """Autograd against central differences, in double precision; not where a hinge of default options bends."""
    bends = torch.cat([1 - 0.05 * b.margin(b.logratio), 1 - b.margin(b.logp), b.margin(b.mean)])
    assume(not bool((bends.abs() < 1e-3).any()))
    for entry in ENTRIES:
        values = lambda logp, entry=entry: losses_of(entry, replace(b, logp=logp))  # noqa: E731
        assert torch.autograd.gradcheck(values, (b.logp,), atol=1e-5), entry.name


@few
@given(b=full_batch())
def test_slopes_raise_the_chosen_and_lower_the_rejected(b):
    """dL/dlp(w) <= 0 <= dL/dlp(l) wherever the pair is short of its aim; a row in no pair has slope 0.

    The aim: none, or h = 1 / (2 tau) for IPO and P(w beats l) for soft labels, which are certain here.
    """
    short = replace(b, ref=b.logp.detach() * 0.9, label=None, chosen=b.chosen[:1], rejected=b.rejected[:1])
    assume((0.1 * short.margin(short.logp)).item() < 5)
    chosen, rejected = int(short.chosen), int(short.rejected)
    for entry in PAIRED:
        slope = slopes(losses_of(entry, short), short)
        assert slope[chosen] <= 0 <= slope[rejected], entry.name
        assert not any(value for n, value in enumerate(slope) if n not in (chosen, rejected)), entry.name


@few
@given(h=st.floats(-50, 50), more=st.floats(0.01, 50))
def test_a_wider_margin_never_costs_more(h, more):
    """Each pairwise loss with a certain label falls, or stays, as the chosen gains; IPO up to its target."""
    low, high = (replace(batch([x - 60, -60.0], [-60.0, -60.0]), length=torch.full((2,), 2.0)) for x in (h, h + more))
    for entry in PAIRED:
        options = {"tau": 0.005} if entry.name == "squared" else {}
        assert losses_of(entry, high, **options).item() <= losses_of(entry, low, **options).item(), entry.name


@few
@given(b=full_batch(), constant=st.floats(-1e3, 1e3))
def test_a_constant_that_the_loss_does_not_see_changes_nothing(b, constant):
    """lp + c for losses of lp(w) - lp(l); lp + c |y| for those of m(w) - m(l); lp_i + c_i beside rp_i + c_i, another c
    for every row, for those with a reference."""
    by_row = constant * torch.arange(len(b.logp)).sin()
    for names, moved in [
        (("hinge", "sigmoid"), replace(b, logp=b.logp + constant)),
        (("rank", "sigmoid_mean"), replace(b, logp=b.logp + constant * b.length)),
        ([entry.name for entry in WITH_REFERENCE], replace(b, logp=b.logp + by_row, ref=b.ref + by_row)),
    ]:
        for name in names:
            entry = objective.entries[name]
            assert losses_of(entry, moved).tolist() == pytest.approx(losses_of(entry, b).tolist(), abs=1e-8), name


@few
@given(b=full_batch(), order=st.randoms())
def test_losses_are_one_by_one(b, order):
    """One number >= 0 per pair or per row, as `per` says. Permuting rows or pairs permutes them; twice a row or pair is
    twice its loss; none depends on its neighbours."""
    rows, pairs = list(range(len(b.logp))), list(range(len(b.chosen)))
    order.shuffle(rows)
    order.shuffle(pairs)
    rows.append(rows[0])
    pairs.append(pairs[0])
    moved = taken(b, rows, pairs)
    alone = taken(b, [int(b.chosen[pairs[0]]), int(b.rejected[pairs[0]])], [pairs[0]])
    for entry in ENTRIES:
        per_pair = entry.metadata["per"] == "pairs"
        losses = losses_of(entry, b).tolist()
        assert len(losses) == len(b.chosen if per_pair else b.logp)
        assert min(losses) >= 0
        expected = [losses[n] for n in (pairs if per_pair else rows)]
        assert losses_of(entry, moved).tolist() == pytest.approx(expected, rel=1e-12), entry.name
        first = losses[pairs[0] if per_pair else int(b.chosen[pairs[0]])]
        assert losses_of(entry, alone)[0].item() == pytest.approx(first, rel=1e-12), entry.name


def taken(b, rows, pairs):
    """The batch of these rows and pairs, indices pointing to the same rows as before."""
    index = {row: n for n, row in reversed(list(enumerate(rows)))}
    fields = {name: getattr(b, name)[rows] for name in ("logp", "length", "weight", "ref", "desirable")}
    for side in ("chosen", "rejected"):
        fields[side] = torch.tensor([index[row] for row in getattr(b, side)[pairs].tolist()])
    return replace(b, label=b.label[pairs], **fields)


# What they declare


CHANGES = {"ref": -1.5, "label": -0.02, "desirable": 2.0, "kl": 0.5, "weight": 0.3}  # what is added, to see who notices
GENERIC = dict(
    logp=[-8.0, -5.0, -9.0], ref=[-7.5, -5.5, -9.0], length=[4, 3, 5], weight=[1.0, 2.0, 0.5], pairs=[(0, 1), (2, 0)],
    label=[0.9, 0.7], desirable=[1, -1, -1], kl=0.4,
)  # fmt: skip


def test_the_declared_fields_are_those_that_a_loss_reads():
    """Another value of a field changes the loss if `reads` names it, and not one bit of it if not.

    Without a field that it reads a loss raises (labels: are certain); without any other it stays the same.
    """
    b = batch(**GENERIC)
    for entry, (field, change) in product(ENTRIES, CHANGES.items()):
        declared = field in entry.metadata["reads"]
        losses, value = losses_of(entry, b).tolist(), getattr(b, field).clone()
        value.view(-1)[0] += change
        assert (losses_of(entry, replace(b, **{field: value})).tolist() != losses) == declared, (entry.name, field)
        without = replace(b, **{field: None})
        if field == "label":
            certain = losses_of(entry, replace(b, label=torch.ones_like(b.label)))
            assert losses_of(entry, without).tolist() == certain.tolist()
        elif declared and field != "weight":
            with pytest.raises(ValueError, match="this objective reads"):
                losses_of(entry, without)
        elif not declared:
            assert losses_of(entry, without).tolist() == losses


def test_an_objective_is_at_most_ten_lines():
    """Lines of the body, docstring not counted."""
    for entry in ENTRIES:
        source = inspect.getsource(entry.fn)
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert len(source.splitlines()) - (function.body[0].end_lineno or 0) <= 10

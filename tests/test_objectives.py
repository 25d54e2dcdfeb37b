"""Losses as formulas: h = [lp(w) - lp(l)] - [rp(w) - rp(l)], lp and rp summed log-probs of policy and reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.registry import Bound
from stages.objectives import Batch, hinge, hinge_norm, nll, objective, sigmoid_norm

ENTRIES = list(objective.entries.values())
PAIRED = [entry for entry in ENTRIES if entry.facts["per"] == "pairs"]
REFERRED = [entry for entry in ENTRIES if entry.facts["reference"]]
named = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
paired = pytest.mark.parametrize("entry", PAIRED, ids=lambda entry: entry.name)
referred = pytest.mark.parametrize("entry", REFERRED, ids=lambda entry: entry.name)
logps = st.lists(st.floats(-300, 0), min_size=2, max_size=12)


def batch(logp, ref=None, pairs=((0, 1),), weight=None, dtype=torch.float64):
    index = torch.tensor(pairs).reshape(-1, 2)
    logp = torch.as_tensor(logp, dtype=dtype)
    return Batch(
        logp=logp if logp.requires_grad else logp.clone().requires_grad_(),
        length=torch.ones(len(logp), dtype=dtype),
        weight=torch.as_tensor(weight if weight is not None else [1.0] * len(logp), dtype=dtype),
        chosen=index[:, 0],
        rejected=index[:, 1],
        ref=None if ref is None else torch.as_tensor(ref, dtype=dtype),
    )


def gap(h, dtype=torch.float64):
    """One pair whose h is given."""
    return batch([h, 0.0], [0.0, 0.0], dtype=dtype)


@given(logps)
def test_at_policy_equal_reference_dpo_is_ln_2_and_hinge_norm_is_1(logp):
    """h = 0: -ln s(0) = ln 2 and max(0, 1 - 0) = 1, for every beta and gamma."""
    pairs = [(n, n + 1) for n in range(len(logp) - 1)]
    same = batch(logp, logp, pairs)
    for scale in (0.01, 0.1, 5.0):
        assert sigmoid_norm(same, beta=scale).tolist() == pytest.approx([math.log(2)] * len(pairs), abs=1e-12)
        assert hinge_norm(same, gamma=scale).tolist() == [1.0] * len(pairs)


def test_values_worked_by_hand():
    """lp = (-10, -14), rp = (-11, -12): h = (-10 + 14) - (-11 + 12) = 3.

    sigmoid_norm(beta = 0.1) = ln(1 + exp(-0.3)) = 0.554355244; hinge_norm(gamma = 0.05) = 1 - 0.15 = 0.85;
    hinge(delta = 5) = 5 - 10 + 14 - 8 with lp gap 4 = 1; hinge(delta = 1) = max(0, 1 - 4) = 0.
    """
    b = batch([-10.0, -14.0], [-11.0, -12.0])
    assert sigmoid_norm(b, beta=0.1).item() == pytest.approx(0.554355244)
    assert hinge_norm(b, gamma=0.05).item() == pytest.approx(0.85)
    assert hinge(b, delta=5.0).item() == pytest.approx(1.0)
    assert hinge(b, delta=1.0).item() == 0.0


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 2))
def test_hinge_norm_is_relu_of_one_minus_gamma_h(h, gamma):
    """max(0, 1 - gamma h): zero from h = 1 / gamma on; slope -gamma below."""
    assert hinge_norm(gap(h), gamma=gamma).item() == pytest.approx(max(0.0, 1 - gamma * h), abs=1e-9)


@given(st.floats(-200, 0), st.floats(-200, 0), st.floats(0.01, 20))
def test_hinge_is_zero_exactly_where_the_margin_is_kept(chosen, rejected, delta):
    """max(0, delta - lp(w) + lp(l)) = 0 if and only if lp(w) - lp(l) >= delta."""
    value = hinge(batch([chosen, rejected]), delta=delta).item()
    assert value == pytest.approx(max(0.0, delta - (chosen - rejected)), abs=1e-9)
    assert (value == 0) == (chosen - rejected >= delta)


@given(st.lists(st.tuples(st.floats(-300, 0), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=9))
def test_nll_is_minus_weight_times_logp_a_row(rows):
    """L_i = -w_i lp_i; a row of weight 0 adds nothing and gets no gradient."""
    b = batch([logp for logp, _ in rows], weight=[weight for _, weight in rows], pairs=())
    losses = nll(b)
    assert losses.tolist() == [pytest.approx(-weight * logp) for logp, weight in rows]
    (gradient,) = torch.autograd.grad(losses.sum(), b.logp)
    assert gradient.tolist() == [-weight for _, weight in rows]


@paired
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(entry):
    """dL/dlp(w) = -dL/dlp(l) < 0 at h = 0 (and at lp(w) = lp(l)); a row in no pair has gradient 0."""
    b = batch([-5.0, -5.0, -5.0], [-5.0, -5.0, -5.0])
    (gradient,) = torch.autograd.grad(Bound(entry, {})(b).sum(), b.logp)
    chosen, rejected, other = gradient.tolist()
    assert chosen < 0 < rejected
    assert chosen == pytest.approx(-rejected)
    assert other == 0


@given(st.floats(-60, 60), st.floats(0.01, 2))
def test_dpo_gradient_is_beta_times_the_probability_of_being_wrong(h, beta):
    """dL/dlp(w) = -beta s(-beta h): the weight that eq. 7 of arXiv:2305.18290 gives a pair."""
    b = gap(h)
    (gradient,) = torch.autograd.grad(sigmoid_norm(b, beta=beta).sum(), b.logp)
    assert gradient[0].item() == pytest.approx(-beta / (1 + math.exp(beta * h)), rel=1e-9)


@paired
@given(logp=logps, shift=st.floats(-1e3, 1e3))
def test_a_constant_on_both_sides_changes_nothing(entry, logp, shift):
    """Every pairwise loss sees lp(w) - lp(l) only: lp + c has the same value, with the reference held still."""
    ref = [-1.5 * n for n in range(len(logp))]
    pairs = [(n, n + 1) for n in range(len(logp) - 1)]
    here, there = (Bound(entry, {})(batch([x + c for x in logp], ref, pairs)) for c in (0.0, shift))
    assert there.tolist() == pytest.approx(here.tolist(), abs=1e-8)


@referred
@given(logp=logps, shift=st.floats(-1e3, 1e3))
def test_losses_with_a_reference_see_the_log_ratio_alone(entry, logp, shift):
    """lp_i + c_i beside rp_i + c_i, another c for every row, changes nothing."""
    ref = [-0.7 * n for n in range(len(logp))]
    moved = [shift * math.sin(n + 1) for n in range(len(logp))]
    pairs = [(n, n + 1) for n in range(len(logp) - 1)]
    here = Bound(entry, {})(batch(logp, ref, pairs))
    there = Bound(entry, {})(
        batch(
            [a + b for a, b in zip(logp, moved, strict=True)], [a + b for a, b in zip(ref, moved, strict=True)], pairs
        )
    )
    assert there.tolist() == pytest.approx(here.tolist(), abs=1e-8)


@paired
@given(logp=logps, order=st.randoms())
def test_pairs_are_judged_one_by_one(entry, logp, order):
    """Permuting pairs permutes the losses; a pair's loss does not depend on the pairs or rows beside it."""
    ref = [-2.0 * n for n in range(len(logp))]
    pairs = [(i, j) for i in range(len(logp)) for j in range(len(logp)) if i != j]
    losses = Bound(entry, {})(batch(logp, ref, pairs)).tolist()
    places = list(range(len(pairs)))
    order.shuffle(places)
    assert Bound(entry, {})(batch(logp, ref, [pairs[n] for n in places])).tolist() == [
        pytest.approx(losses[n], rel=1e-12)
        for n in places  # a vectorised exp may differ in its last bit
    ]
    i, j = pairs[places[0]]
    alone = Bound(entry, {})(batch([logp[i], logp[j]], [ref[i], ref[j]])).item()
    assert alone == pytest.approx(losses[places[0]], rel=1e-12)


@paired
@given(st.floats(-50, 50), st.floats(0.01, 50))
def test_a_wider_gap_never_costs_more(entry, h, more):
    """Each pairwise loss falls, or stays, as the chosen gains on the rejected."""
    assert Bound(entry, {})(gap(h + more)).item() <= Bound(entry, {})(gap(h)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [-1e4, -1e2, -1.0, 0.0, 1.0, 1e2, 1e4])
def test_dpo_is_finite_with_a_finite_gradient_far_out(h, dtype):
    """-ln s(beta h) -> -beta h as h -> -inf and exp(-beta h) as h -> inf; its slope stays in [-beta, 0]."""
    b = gap(h, dtype)
    loss = sigmoid_norm(b, beta=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), b.logp)
    assert loss.item() == pytest.approx(max(0.0, -h) + math.log1p(math.exp(-abs(h))), rel=1e-6, abs=1e-12)
    assert torch.isfinite(gradient).all()
    assert -1 <= gradient[0].item() <= 0


@named
def test_the_declared_reference_is_the_true_need(entry):
    """reference=True cannot be computed without one; reference=False has the same value beside any reference."""
    rows = [-3.0, -4.0]
    if entry.facts["reference"]:
        with pytest.raises(ValueError, match="reference"):
            Bound(entry, {})(batch(rows))
        values = [Bound(entry, {})(batch(rows, ref)).tolist() for ref in ([0.0, 0.0], [-1.0, 2.0])]
        assert values[0] != values[1]
    else:
        values = [Bound(entry, {})(batch(rows, ref)).tolist() for ref in (None, [0.0, 0.0], [-9.0, 5.0])]
        assert values[0] == values[1] == values[2]


@named
def test_one_number_a_unit_and_none_negative(entry):
    """`per` names the axis: one loss a pair, or one a row; all are >= 0, so a run's curve has a floor."""
    b = batch([-3.0, -4.0, -5.0], [-3.5, -2.0, -5.0], pairs=((0, 1), (0, 2)))
    losses = Bound(entry, {})(b)
    assert losses.shape == ((2,) if entry.facts["per"] == "pairs" else (3,))
    assert (losses >= 0).all()

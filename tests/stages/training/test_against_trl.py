"""Our losses beside TRL 1.16's own code, which is called and not copied.

First on given log-probs in double precision, values and gradients; then a whole step through the tiny network: the
same token ids to TRL's collators and trainers and to our loop. Names and conventions that differ:

* TRL's `sigmoid` ignores `label_smoothing`; its CPO applies it, to log-ratios as well as to log-probs: cDPO.
* TRL's `sigmoid_norm` is DPO on averages, our length_normalized_dpo; ours has RSO's name for DPO on sums, TRL's
  `sigmoid`.
* TRL's DPO `hinge` is RSO's hinge_norm; its CPO `hinge` is beta times SLiC's with margin 1 / beta.
* TRL's `ipo` averages each side over its own tokens, our average: token; its CPO `ipo` has no reference.
* TRL's KTO takes KL over one forward batch and clamps it at 0; ours over the whole step.
* TRL's ORPO takes the likelihood of prompt and response; ours, of the response. On prompts of one token, which
  has no likelihood, they are equal.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # CPO and ORPO live there

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import add_fused_lm_head

from stages.network.load import load_network
from stages.network.models import reward_head
from stages.training.objectives import (
    Batch,
    hinge,
    hinge_norm,
    kto,
    length_normalized_dpo,
    odds_ratio,
    sigmoid,
    sigmoid_mean,
    sigmoid_norm,
    squared,
)
from tests.material import cache, imitate, labelled, loss_of, random_rows, term_of

PAD = 2
few = settings(max_examples=25, deadline=None)  # TRL's code is slow at its first call
EXTRA = ("entropy", "mean_logits", "is_top1")  # what TRL logs beside its loss


def identity(values):
    """Return what `gather` gives in a single process."""
    return values


ONE_PROCESS = SimpleNamespace(device=torch.device("cpu"), gather=identity, gather_for_metrics=identity)


def trainer(cls, **attributes):
    """Return a TRL trainer with what its loss reads and nothing else: no data, no optimizer, no processes."""
    instance = object.__new__(cls)
    defaults = dict(
        accelerator=ONE_PROCESS, aux_loss_enabled=False, model=SimpleNamespace(training=False), label_smoothing=0.0,
        precompute_ref_logps=True, is_encoder_decoder=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, args=SimpleNamespace(max_length=None, center_rewards_coefficient=None),
    )  # fmt: skip
    vars(instance).update(defaults | attributes)
    return instance


def dpo(beta, *losses):
    """Return TRL's DPO with losses of (name, weight)."""
    return trainer(
        DPOTrainer, beta=beta, loss_types=[name for name, _ in losses], loss_weights=[weight for _, weight in losses],
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip


def unpaired(beta, desirable, undesirable):
    return trainer(
        KTOTrainer, beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=desirable,
        undesirable_weight=undesirable,
    )  # fmt: skip


def cpo(loss_type, beta, **attributes):
    defaults = dict(alpha=0.0, simpo_gamma=0.0, cpo_alpha=0.0, pad_token_id=PAD)
    return trainer(CPOTrainer, loss_type=loss_type, beta=beta, **(defaults | attributes))


def orpo(beta):
    return trainer(ORPOTrainer, beta=beta, padding_value=PAD)


# The same log-probs


@st.composite
def responses(draw):
    """Draw (length, log-prob, reference log-prob) of an even number of responses, the first half chosen."""
    n = 2 * draw(st.integers(1, 4))
    length = draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))
    mean = draw(st.lists(st.floats(-5, -0.01), min_size=n, max_size=n))
    logratio = draw(st.lists(st.floats(-30, 30), min_size=n, max_size=n))
    size = torch.tensor(length, dtype=torch.float64)
    logp = size * torch.tensor(mean, dtype=torch.float64)
    return size, logp.requires_grad_(), logp.detach() - torch.tensor(logratio, dtype=torch.float64)


def flat(size, logp, ref=None, **fields):
    """Return our batch: the first half chosen, the second rejected."""
    first = torch.arange(len(logp) // 2)
    fields = dict(weight=torch.zeros_like(logp)) | fields
    return Batch(logp=logp, length=size, ref=ref, chosen=first, rejected=first + len(first), **fields)


def padded(size, logp):
    """Return TRL's log-probs and mask: each log-prob spread evenly over its response, after a prompt of one token."""
    positions = torch.arange(int(size.max()) + 1)
    mask = (positions > 0) & (positions <= size[:, None])
    return (logp / size)[:, None] * mask[:, 1:], mask.long()


class FixedNetwork:
    """Network that returns fixed log-probs to TRL."""

    def __init__(self, log_probs):
        zeros = torch.zeros_like(log_probs)
        self.output = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def __call__(self, **inputs):
        return self.output


def same(ours, theirs, logp, tolerance=1e-6):
    """Assert that values agree to 1e-6, slopes to `tolerance`."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    (a,), (b,) = (torch.autograd.grad(loss, logp, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def bends(margin, beta):
    """Return whether a pair is at the bend of max(0, 1 - beta margin), where any slope between the two is right."""
    return bool(((1 - beta * margin).abs() < 1e-9).any())


@few
@given(rows=responses(), beta=st.floats(0.01, 1))
def test_dpo_hinge_and_ipo(rows, beta):
    """A mean over pairs of -ln s(beta h), max(0, 1 - beta h), (h per token - 1 / (2 beta))^2, -ln s(beta h per token);
    the last is our sigmoid_mean of logratios too."""
    size, logp, ref = rows
    b = flat(size, logp, ref)
    assume(not bends(b.margin(b.logratio), beta))
    log_probs, mask = padded(size, logp)
    chosen, rejected = ref.chunk(2)
    inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask, ref_chosen_logps=chosen,
                  ref_rejected_logps=rejected)  # fmt: skip
    for theirs, ours in {
        "sigmoid": sigmoid_norm(b, beta=beta),
        "hinge": hinge_norm(b, gamma=beta),
        "ipo": squared(b, tau=beta, average="token"),
        "sigmoid_norm": length_normalized_dpo(b, beta=beta),
    }.items():
        same(ours.mean(), dpo(beta, (theirs, 1.0)).compute_loss(FixedNetwork(log_probs), inputs), logp)
    same(ours.mean(), sigmoid_mean(flat(b.length, b.logratio), beta=beta, gamma=0.0).mean(), logp)


@few
@given(rows=responses(), beta=st.floats(0.01, 1), smoothing=st.floats(0, 0.49))
def test_conservative_dpo(rows, beta, smoothing):
    """CPO's sigmoid of log-ratios, smoothed; of log-probs, our `sigmoid` with labels 1 - smoothing."""
    size, logp, ref = rows
    theirs = cpo("sigmoid", beta, label_smoothing=smoothing)
    b = flat(size, logp, ref)
    same(sigmoid_norm(b, beta=beta, smoothing=smoothing).mean(), theirs.cpo_loss(*b.logratio.chunk(2))[0].mean(), logp)
    soft = flat(size, logp, label=torch.full((len(logp) // 2,), 1 - smoothing, dtype=torch.float64))
    same(sigmoid(soft, beta=beta).mean(), theirs.cpo_loss(*logp.chunk(2))[0].mean(), logp)


@few
@given(rows=responses(), beta=st.floats(0.1, 10), gamma=st.floats(0, 5))
def test_simpo(rows, beta, gamma):
    """-ln s(beta (m(w) - m(l)) - gamma): TRL subtracts gamma / beta before it multiplies by beta."""
    size, logp, _ = rows
    theirs = cpo("simpo", beta, simpo_gamma=gamma).cpo_loss(*(logp / size).chunk(2))[0]
    same(sigmoid_mean(flat(size, logp), beta=beta, gamma=gamma).mean(), theirs.mean(), logp)


@few
@given(rows=responses(), beta=st.floats(0.05, 2))
def test_slic(rows, beta):
    """CPO's hinge: relu(1 - beta (lp(w) - lp(l))) = beta max(0, 1 / beta - lp(w) + lp(l))."""
    size, logp, _ = rows
    b = flat(size, logp)
    assume(not bends(b.margin(b.logp), beta))
    theirs = cpo("hinge", beta).cpo_loss(*logp.chunk(2))[0]
    same(beta * hinge(b, delta=1 / beta).mean(), theirs.mean(), logp)


@few
@given(rows=responses(), weight=st.floats(0.01, 1))
def test_orpo(rows, weight):
    """-lambda ln s(log odds(w) - log odds(l)), both in single precision, to which TRL rounds: slopes to 1e-5."""
    size, logp, _ = rows
    single = (logp.detach().float() / size.float()).requires_grad_()
    ones = torch.ones_like(single)
    theirs = -orpo(weight).odds_ratio_loss(*single.chunk(2))[0]
    same(odds_ratio(flat(ones, single), weight=weight).mean(), theirs.mean(), single, 1e-5)


@few
@given(rows=responses(), beta=st.floats(0.01, 1), kl=st.floats(-10, 10), good=st.integers(0, 8))
def test_kto(rows, beta, kl, good):
    """A mean over rows; KL is clamped at 0; all desirable, or none, is no special case."""
    size, logp, ref = rows
    log_probs, mask = padded(size, logp)
    label = torch.arange(len(logp)) < good
    inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask, KL_input_ids=mask, KL_attention_mask=mask,
                  KL_completion_mask=mask, label=label, ref_logps=ref, ref_KL_logps=logp.detach() - kl)  # fmt: skip
    theirs = unpaired(beta, 1.3, 0.7).compute_loss(FixedNetwork(log_probs), inputs)
    b = flat(size, logp, ref, desirable=label.double() * 2 - 1, kl=torch.tensor(kl, dtype=torch.float64))
    same(kto(b, beta=beta, desirable=1.3, undesirable=0.7).mean(), theirs, logp)


@few
@given(rows=responses())
def test_bradley_terry(rows):
    """TRL's reward trainer: -ln s(score(w) - score(l))."""
    size, scores, _ = rows
    network = SimpleNamespace(logits=scores[:, None])
    theirs = trainer(RewardTrainer).compute_loss(lambda **inputs: network, {})
    same(sigmoid(flat(size, scores)).mean(), theirs, scores)


# The same token ids


@pytest.fixture(scope="module")
def ours(sharp):
    """In padded rows like TRL's: in fp32 the sharp network's gradients are off by 1e-4 in any other order of sums.

    test_prefix_attention.py has the two layouts against each other, on networks of usual weights.
    """
    network = load_network(sharp)
    network.set_attn_implementation("sdpa")
    return network


@pytest.fixture(scope="module")
def theirs(sharp):
    network = load_network(sharp)
    add_fused_lm_head(network, outputs=("log_probs", *EXTRA))
    return network


def pairs_of(rows):
    """Yield TRL's example of each pair."""
    for row in rows:
        for pair in row["pairs"]:
            chosen, rejected = row["responses"][pair["chosen"]], row["responses"][pair["rejected"]]
            yield {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": chosen["token_ids"],
                "rejected_ids": rejected["token_ids"],
                "ref_chosen_logps": chosen["ref_logp"],
                "ref_rejected_logps": rejected["ref_logp"],
            }


def same_step(loss, network, other, other_network, tolerance=1e-5):
    """Assert that losses agree to 1e-6, gradients to `tolerance` of the largest: sums of 1e2 float32 terms."""
    assert loss.item() == pytest.approx(other.item(), rel=1e-6, abs=1e-6)
    gradients = []
    for value, of in ((loss, network), (other, other_network)):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(of.parameters()))]))
    assert (gradients[0] - gradients[1]).abs().max() < tolerance * gradients[1].abs().max()


def test_a_step_of_dpo(sharp, ours, theirs):
    """Token ids through both collators, networks and reductions, with the likelihood of the chosen.

    A group of one prompt with several responses is its pairs one by one. TRL's `sft` term is a mean over the chosen
    tokens of its pairs; there every chosen response is in one pair.
    """
    every_pair = cache(sharp, random_rows(), spread=4.0)
    inputs = DataCollatorForPreference(pad_token_id=PAD)(list(pairs_of(every_pair)))
    loss, _ = loss_of(term_of(sharp, every_pair, "sigmoid_norm", beta=0.1), ours)
    same_step(loss, ours, dpo(0.1, ("sigmoid", 1.0)).compute_loss(theirs, inputs), theirs)
    rows = [row | {"pairs": row["pairs"][:1]} for row in every_pair]
    inputs = DataCollatorForPreference(pad_token_id=PAD)(list(pairs_of(rows)))
    cases: list[tuple[str, dict, str]] = [
        ("sigmoid_norm", {"beta": 0.1}, "sigmoid"),
        ("hinge_norm", {"gamma": 0.1}, "hinge"),
        ("squared", {"tau": 0.1, "average": "token"}, "ipo"),
    ]
    for name, options, trl_name in cases:
        other = dpo(0.1, (trl_name, 1.0), ("sft", 0.3)).compute_loss(theirs, inputs)
        loss, _ = loss_of(term_of(sharp, imitate(rows, 0), name, nll_weight=0.3, **options), ours)
        same_step(loss, ours, other, theirs)


def test_a_step_of_kto(sharp, ours, theirs):
    """Mismatched rows and references included. References are lowered for those, so that z > 0."""
    rows = cache(sharp, labelled(random_rows()), spread=4.0)
    examples = []
    for row in rows:
        mismatched = [response for response in row["responses"] if response["desirable"] == 0]
        for response, other in zip(row["responses"], mismatched, strict=False):
            other["ref_logp"] -= 3.0
            examples.append({
                "prompt_ids": row["prompt_ids"],
                "completion_ids": response["token_ids"],
                "KL_completion_ids": other["token_ids"],
                "label": response["desirable"] == 1,
                "ref_logps": response["ref_logp"],
                "ref_KL_logps": other["ref_logp"],
            })  # fmt: skip
    trl = unpaired(0.1, 1.0, 1.3)
    other = trl.compute_loss(theirs, DataCollatorForUnpairedPreference(pad_token_id=PAD)(examples))
    loss, entry = loss_of(term_of(sharp, rows, "kto", beta=0.1, undesirable=1.3), ours)
    same_step(loss, ours, other, theirs)
    assert entry["kl"] == pytest.approx(trl._metrics["eval"]["kl"][0], abs=1e-5)
    assert entry["kl"] > 0


def separately(rows):
    """Return inputs of TRL's CPO and ORPO: each side padded by itself, labels without the prompt."""
    batch = {}
    for side in ("chosen", "rejected"):
        inputs = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs_of(rows)]
        width = max(len(prompt) + len(ids) for prompt, ids in inputs)
        pad = [width - len(prompt) - len(ids) for prompt, ids in inputs]
        for name, values in {
            "input_ids": [[*prompt, *ids, *[PAD] * n] for (prompt, ids), n in zip(inputs, pad, strict=True)],
            "attention_mask": [[1] * (width - n) + [0] * n for n in pad],
            "labels": [
                [-100] * len(prompt) + [*ids, *[-100] * n] for (prompt, ids), n in zip(inputs, pad, strict=True)
            ],
        }.items():
            batch[f"{side}_{name}"] = torch.tensor(values)
    return batch


def one_pair_each():
    return imitate([row | {"pairs": row["pairs"][:1]} for row in random_rows()], 0)


def test_a_step_of_simpo(sharp, ours, theirs):
    """With CPO's likelihood of the chosen, a mean over the tokens of the step."""
    rows = one_pair_each()
    trl = cpo("simpo", 2.0, simpo_gamma=1.0, cpo_alpha=0.5)
    other, _ = trl.get_batch_loss_metrics(theirs, separately(rows))
    loss, _ = loss_of(term_of(sharp, rows, "sigmoid_mean", beta=2.0, gamma=1.0, nll_weight=0.5), ours)
    same_step(loss, ours, other, theirs)


def test_a_step_of_orpo(sharp, ours, theirs):
    """On prompts of one token the whole loss is equal; on longer ones the odds are, and TRL's likelihood is not."""
    rows = one_pair_each()
    short = [row | {"prompt_ids": row["prompt_ids"][:1]} for row in rows]
    other, _ = orpo(0.1).get_batch_loss_metrics(theirs, separately(short))
    loss, _ = loss_of(term_of(sharp, short, "odds_ratio", weight=0.1, nll_weight=1.0), ours)
    same_step(loss, ours, other, theirs)
    _, metrics = orpo(0.1).get_batch_loss_metrics(theirs, separately(rows))
    odds, _ = loss_of(term_of(sharp, rows, "odds_ratio", weight=0.1), ours)
    assert odds.item() == pytest.approx(-0.1 * metrics["log_odds_ratio"], rel=1e-6, abs=1e-6)
    likelihood, _ = loss_of(term_of(sharp, rows, "nll"), ours)
    assert abs(likelihood.item() - metrics["nll_loss"]) > 1e-3


def test_a_step_of_a_reward_model(sharp, ctx):
    """The score at each row's last token; TRL reads the one before the padding."""
    head = reward_head(sharp, ctx)
    network = load_network(head)
    with torch.no_grad():
        network.score.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    rows = random_rows()
    inputs = DataCollatorForPreference(pad_token_id=PAD)(
        [{k: v for k, v in pair.items() if "ref" not in k} for pair in pairs_of(rows)]
    )
    del inputs["completion_mask"]
    other = trainer(RewardTrainer).compute_loss(network, inputs)
    loss, _ = loss_of(term_of(head, rows, "sigmoid"), network)
    same_step(loss, network, other, network)

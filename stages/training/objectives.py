"""Losses, side by side: pure functions of a batch of completions. To add one, add a function here.

An objective returns one number per pair (per="pairs") or per row (per="rows", per="likelihood"); weighting and
dividing by the whole step's count is the loop's, so accumulation does not change the loss. Docstrings say whether
there is a reference, and whether log-probs are summed or averaged. `reads` names the fields of the batch, beyond
log-probs and pairs, that the loss is a function of. Names are those of the papers; `aliases` are the papers' names for
whole methods. `elsewhere` says of a name what it means in TRL if that is another loss: a plan repeats it to users who
write that name. Which responses are imitated (`nll`) is data: the rows with weight > 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired

from pipeline import Range, Registry
from stages.options import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

Field = Literal["length", "weight", "ref", "label", "desirable", "kl"]
objective = Registry(
    "objective",
    "batch",
    reads=tuple[Field, ...],
    per=Literal["pairs", "rows", "likelihood"],
    elsewhere=NotRequired[dict[str, str]],
)


@dataclass(frozen=True)
class Batch:
    """Flat batch of N completions, with P pairs of indices into it."""

    logp: Tensor  # [N] summed log-prob under the policy, with gradient; the score of a reward model
    length: Tensor  # [N] completion tokens
    weight: Tensor  # [N] likelihood weight; 0 keeps the row out of that term
    chosen: Tensor  # [P] row indices
    rejected: Tensor  # [P]
    ref: Tensor | None = None  # [N] the same log-prob under the reference
    label: Tensor | None = None  # [P] P(chosen is better), if that is not always 1
    desirable: Tensor | None = None  # [N] KTO's unpaired label: 1 desirable, -1 undesirable, 0 none
    kl: Tensor | None = None  # [] KTO's KL estimate z0 before its clamp: mean logratio of the step's mismatched rows

    @property
    def logratio(self) -> Tensor:
        """Return log policy - log reference, [N]."""
        return self.logp - _required(self.ref, "a reference")

    @property
    def mean(self) -> Tensor:
        """Return the log-prob per token, [N]."""
        return self.logp / self.length

    def margin(self, scores: Tensor) -> Tensor:
        """Return chosen - rejected, [P]."""
        return scores[self.chosen] - scores[self.rejected]


def _required(field: Tensor | None, what: str) -> Tensor:
    if field is None:
        raise ValueError(f"this objective reads {what}, and the batch has none")
    return field


def log_sigmoid(x: Tensor) -> Tensor:
    """Return -log(1 + exp(-x)), without overflow."""
    return -(-x).logaddexp(x.new_zeros(()))


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, exact near 0 and far from it; x is kept at least 1e-6 from 0."""
    near = x.clamp(max=-1e-6)
    return (-near.expm1()).log().where(near > -0.7, (-near.exp()).log1p())


@objective(
    reads=("ref", "label"),
    per="pairs",
    aliases=("dpo",),
    elsewhere={"sigmoid_norm": "RSO's name of DPO; TRL's sigmoid_norm is length_normalized_dpo here"},
)
def sigmoid_norm(b: Batch, *, beta: Positive = 0.1, smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0) -> Tensor:
    """DPO: -log s(beta h), h the margin of logratios. Reference, summed. Eq. 7 of arXiv:2305.18290; ln 2 at the start.

    With q = P(chosen is better), from labels and `smoothing` (cDPO): -q log s(beta h) - (1 - q) log s(-beta h),
    least at h = log(q / (1 - q)) / beta. In TRL it is called `sigmoid`, and `sigmoid_norm` is another loss.
    """
    return _cross_entropy(b, beta * b.margin(b.logratio), smoothing)


@objective(reads=("ref", "length", "label"), per="pairs", aliases=("dpo_norm",))
def length_normalized_dpo(
    b: Batch, *, beta: Positive = 5.0, smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0
) -> Tensor:
    """Length-normalised DPO: -log s(beta h), h the margin of logratios per token. Reference, averaged.

    Eq. 6 of arXiv:2411.15124 (Tulu 3, whose beta is 5); in TRL it is called `sigmoid_norm`. Labels and `smoothing` as
    in sigmoid_norm.
    """
    return _cross_entropy(b, beta * b.margin(b.logratio / b.length), smoothing)


def _cross_entropy(b: Batch, x: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return -q log s(x) - (1 - q) log s(-x), [P]; q is the label, moved towards 1/2 by `smoothing`."""
    label = 1.0 if b.label is None else b.label
    q = label * (1 - smoothing) + (1 - label) * smoothing
    return -q * log_sigmoid(x) - (1 - q) * log_sigmoid(-x)


@objective(reads=("ref",), per="pairs")
def hinge_norm(b: Batch, *, gamma: Positive = 0.05) -> Tensor:
    """RSO's hinge on normalised likelihood: max(0, 1 - gamma h). Reference, summed. arXiv:2309.06657.

    In TRL's DPO it is called `hinge`, and beta is its gamma.
    """
    return (1 - gamma * b.margin(b.logratio)).clamp(min=0)


@objective(
    reads=(),
    per="pairs",
    aliases=("slic",),
    elsewhere={"hinge": "SLiC's, without a reference; the hinge of TRL's DPO is hinge_norm here"},
)
def hinge(b: Batch, *, delta: Positive = 1.0) -> Tensor:
    """SLiC-HF: max(0, delta - log p(chosen) + log p(rejected)). No reference, summed. arXiv:2305.10425.

    CLICK (arXiv:2306.03350) is the same loss with a delta of 15 to 20 nats.
    """
    return (delta - b.margin(b.logp)).clamp(min=0)


@objective(reads=("ref", "length"), per="pairs", aliases=("ipo",))
def squared(b: Batch, *, tau: Positive = 0.1, average: Literal["sequence", "token"] = "sequence") -> Tensor:
    """IPO: (h - 1 / (2 tau))^2. Reference; arXiv:2310.12036, eq. 17.

    sequence: h is the margin of summed logratios, as the paper writes it. token: of each side's logratio divided by
    its own length, as TRL's `ipo` does and says that the authors did; the target is then in nats per token, and tau
    about |y| times as large for the same strength.
    """
    logratio = b.logratio if average == "sequence" else b.logratio / b.length
    return (b.margin(logratio) - 1 / (2 * tau)) ** 2


@objective(reads=("length",), per="pairs", aliases=("rrhf",))
def rank(b: Batch) -> Tensor:
    """RRHF: max(0, mean log p(rejected) - mean log p(chosen)). No reference, averaged. arXiv:2304.05302, eq. 3."""
    return (-b.margin(b.mean)).clamp(min=0)


@objective(
    reads=("label",),
    per="pairs",
    aliases=("bradley_terry", "cpo"),
    elsewhere={"sigmoid": "it has no reference; the sigmoid of TRL's DPO is dpo here, that of its CPO is this"},
)
def sigmoid(b: Batch, *, beta: Positive = 1.0) -> Tensor:
    """-log s(beta (score(chosen) - score(rejected))). No reference, summed.

    On a reward model, whose score stands for the log-prob: Bradley-Terry maximum likelihood. On a policy: the
    preference term of CPO (arXiv:2401.08417), whose likelihood term is nll_weight 1 on the chosen.
    """
    return _cross_entropy(b, beta * b.margin(b.logp))


@objective(reads=("length",), per="pairs", aliases=("simpo",))
def sigmoid_mean(b: Batch, *, beta: Positive = 2.0, gamma: NotNegative = 1.0) -> Tensor:
    """SimPO: -log s(beta (mean log p(chosen) - mean log p(rejected)) - gamma). No reference, averaged.

    arXiv:2405.14734, eq. 6; the paper tunes gamma / beta, 0.5 here.
    """
    return -log_sigmoid(beta * b.margin(b.mean) - gamma)


@objective(reads=("length",), per="pairs", aliases=("orpo",))
def odds_ratio(b: Batch, *, weight: Positive = 0.1) -> Tensor:
    """ORPO: -weight log s(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(mean log p).

    No reference, averaged. arXiv:2403.07691, eq. 7; its likelihood term is nll_weight 1 on the chosen.
    """
    return -weight * log_sigmoid(b.margin(b.mean - log1mexp(b.mean)))


@objective(reads=("ref", "desirable", "kl"), per="rows")
def kto(b: Batch, *, beta: Positive = 0.1, desirable: Positive = 1.0, undesirable: Positive = 1.0) -> Tensor:
    """KTO: lambda (1 - s(beta (logratio - z0))) if desirable, lambda (1 - s(beta (z0 - logratio))) if not.

    z0 = max(0, mean logratio of responses under other prompts), over the whole step, without gradient.
    Reference, summed. arXiv:2402.01306, eq. 8. One number per row; rows without a label have 0.
    """
    sign = _required(b.desirable, "unpaired labels").to(b.logp.dtype)
    z0 = _required(b.kl, "mismatched rows").clamp(min=0)
    weight = desirable * sign.clamp(min=0) - undesirable * sign.clamp(max=0)
    return weight * (sign * beta * (z0 - b.logratio)).sigmoid()


@objective(reads=("weight",), per="likelihood")
def nll(b: Batch) -> Tensor:
    """Weighted negative log-likelihood, -w log p; `nll_per` of `optimize` says what the mean is over. No reference."""
    return -b.weight * b.logp

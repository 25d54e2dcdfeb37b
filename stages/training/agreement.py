"""Comparison of the engine's log-probs with the trainer's own, over draws of the same weights.

Both compute one number in two ways, so that they differ by rounding alone. More than that is another network than the
one that is trained: another file, rotary embedding, dtype or sampler. Measured on nine families of small random
networks, of some 2.5 nats a token and 64 draws of up to 64 tokens (tests/bench/test_bench_agreement.py), as the mean
of |engine - trainer| in nats per token: at most 5e-7 where both are float32, and 8e-3 where either is bfloat16. With
the weights rounded to bfloat16 once it is 3e-3, with 1 % of noise in them 2e-2, with twice the rotary base 0.65, with
another factor of its scaling 1.4 and 2.6, with another file 9.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import StageContext
from schemas import WinnowError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.training.terms import ObjectiveTerm

MEASURE = "engine_difference_in_nats_per_token"  # of a step's summary and manifest
DIFFERENCE, LARGEST_DIFFERENCE = "engine_difference", "engine_difference/largest"  # the same as metrics of step 0
# What a draw of n tokens may differ by, in nats: a n + b sqrt(n). Rounding errors of tokens add up as sqrt(n), those of
# another network as n. The largest sum measured is a fifth of it for bfloat16 and a five-hundredth for float32.
LIMITS = {"float32": (2e-4, 1e-3), "bfloat16": (2e-2, 2e-1)}
COMPARABLE = ("exact", "raw")  # kinds of logp that are under the policy itself


@dataclass(frozen=True)
class Draw:
    """Log-prob of a draw by an engine, the digest of the weights, and the engine's arithmetic."""

    logp: float
    model: str
    dtype: str


def draw_of(candidate: dict[str, Any]) -> Draw | None:
    """Return the engine's log-prob of a row of `candidates`, or None if it has none under a policy itself."""
    if candidate.get("logp_kind") not in COMPARABLE or not candidate.get("model") or candidate["logp"] is None:
        return None
    return Draw(candidate["logp"], candidate["model"], candidate["dtype"])


def check_agreement(
    rows: Iterable[tuple[Draw, float, int]], dtype: str, tolerance: float, model: str, where: str
) -> dict[str, float] | None:
    """Return the mean difference per token (as total and count) and the largest of a draw, or None without draws.

    rows: the engine's log-prob, the trainer's own in `dtype`, and the number of tokens. Raises WinnowError where the
    sum of the differences is above `tolerance` times what rounding explains.
    """
    total = largest = bound = 0.0
    tokens = draws = 0
    for engine, logp, count in rows:
        if not count:
            continue
        difference = abs(engine.logp - logp)
        linear, root = LIMITS["bfloat16" if "bfloat16" in (engine.dtype, dtype) else "float32"]
        total, tokens, draws = total + difference, tokens + count, draws + 1
        bound += tolerance * (linear * count + root * count**0.5)
        largest = max(largest, difference / count)
    if not draws:
        return None
    if not total <= bound:  # a NaN is no agreement
        raise WinnowError(
            f"{where}: on {draws:,} draws of policy {model[:12]}, the log-probs of the engine that drew them and of "
            f"the trainer differ by {total / tokens:.2g} nats per token ({largest:.2g} at most), and rounding explains "
            f"{bound / tokens:.2g}: what was sampled is not the network that is trained. Look for two sets of weights "
            "in the model's folder (wrong file), a rotary embedding that one of the two scales (rope), an engine whose "
            "dtype is not that of `sample`, penalties or a bias in the sampler. Raise `engine_tolerance` only for a "
            "difference that you can explain"
        )
    return {"total": total, "count": float(tokens), "largest": largest}


def check_first_batches(
    terms: "list[ObjectiveTerm]", network: "PreTrainedModel", tolerance: float
) -> dict[str, float] | None:
    """Return `check_agreement` of draws of `init` in the first batches, where no cached reference has compared them.

    It is the first forward pass of the weights that were sampled in a method without reference (RAFT, ReST).
    """
    compared = []
    for term in terms:
        draws = [
            ((group.prompt, ids), draw)
            for group in term.batches[0]
            for ids, draw in zip(group.responses, group.draws, strict=True)
            if draw
        ]
        logp = term.logp_by_ranks(network, [row for row, _ in draws]).tolist() if draws else []
        compared += [(draw, value, len(ids)) for ((_, ids), draw), value in zip(draws, logp, strict=True)]
    return check_agreement(compared, terms[0].dtype, tolerance, terms[0].init.digest, "step 0")


def record_agreement(ctx: StageContext, difference: dict[str, float] | None) -> None:
    """Put the difference in the step's summary and manifest."""
    if difference is not None:
        ctx.measure(MEASURE, **difference)

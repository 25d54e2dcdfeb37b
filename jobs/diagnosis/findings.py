"""A diagnosis in words: which rules these candidates can support, and why."""

from collections.abc import Iterator

import numpy as np

from jobs.diagnosis.cached import ANOTHER_BASELINE
from jobs.diagnosis.sections import OTHER_ORDER, Diagnosis, Row

TOP_K_SHARE = 90.0  # % of what a rule keeps, from which it is said to act as top-k
WARM = 0.05  # nats: a rule that moves what it keeps by less keeps what `plain` would
GROWS = 0.2  # nats between the tilt that is asked and that of the candidates, from which they do not show it
CHANCE, CLEAR = 50.0, 60.0  # % of pairs in the right order: by a coin, and from where they teach something
FEW = 3.0  # candidates on which all weight of a prompt rests


def findings(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield a sentence or two per finding, in the order in which one would act on them."""
    yield from _order(diagnosis)
    yield from _spread(diagnosis)
    yield from _tilt(diagnosis)
    yield from _other_rules(diagnosis)
    yield from _best_of(diagnosis)
    yield from _ranker(diagnosis)
    yield from _gold(diagnosis)
    yield from _length(diagnosis)


def _order(diagnosis: Diagnosis) -> Iterator[str]:
    key = "gold" if diagnosis.gold else "reward"
    rows = [row for row in diagnosis.sections["rules"].rows if row[key] is not None]
    names = [f"{row['rule']} ({row[key]:.3g})" for row in rows]
    signs = [">" if gap.low > 0 else "~" for gap in diagnosis.apart]
    text = "".join(f" {sign} {name}" for sign, name in zip(signs, names[1:], strict=False))
    yield f"Order of the rules by {key} of what they keep (~: not told apart): {names[0]}{text}."


def _spread(diagnosis: Diagnosis) -> Iterator[str]:
    if diagnosis.distinct < 0.75:
        yield (
            f"Of a prompt's {diagnosis.n} candidates {100 * diagnosis.distinct:.0f} % are different, and no rule finds "
            "more than these; a higher temperature, top_k or top_p of `sample` gives more."
        )
    if diagnosis.flat > 0:
        yield (
            f"In {100 * diagnosis.flat:.3g} % of the prompts all rewards are equal: no rule can choose there, and "
            "those that need a spread reject these prompts."
        )
    if diagnosis.labels:
        yield (
            "The rewards are labels, right or wrong: a rule can only keep more of the right ones, and beta says how "
            "many wrong ones stay among them."
        )


def _tilt(diagnosis: Diagnosis) -> Iterator[str]:
    k, n, beta = diagnosis.k, diagnosis.n, diagnosis.beta
    row = next(row for row in diagnosis.sections["tilt"].rows if row["beta"] == float(f"{beta:.3g}"))
    if k >= n:
        yield f"k = {k} of {n} candidates: every rule that keeps k keeps all of them, whatever their rewards."
        return
    asks = (
        f"beta {beta:g} asks for {row['asked']:.2g} nats of tilt; {n} candidates and k = {k} can realise at most "
        f"log({n} / {k}) = {diagnosis.limit:.2g}"
    )
    if row["top k %"] >= TOP_K_SHARE or row["asked"] > diagnosis.limit:
        acts = "acts as top-k" if row["top k %"] >= TOP_K_SHARE else "is near top-k"
        yield (
            f"{asks}: rejection_sample {acts} ({row['top k %']:.0f} % of what it keeps are the {k} best). It can "
            f"follow a beta above about {diagnosis.edge:g}; for {beta:g}, sample more or keep fewer."
        )
    elif row["kept"] < WARM:
        yield f"{asks}: what rejection_sample keeps is moved by {row['kept']:.2g}, and is what plain would keep."
    else:
        yield (
            f"{asks}: rejection_sample realises {row['kept']:.2g}, and {row['top k %']:.0f} % of what it keeps are "
            f"the {k} best. Below a beta of about {diagnosis.edge:g} it would act as top-k."
        )
    if row["asked reward"] is not None:
        yield (
            f"The policy's own tilt at beta {beta:g} has a mean reward of {row['asked reward']:.3g}; what Algorithm 1 "
            f"keeps has {row['kept reward']:.3g}: its bias is {row['kept reward'] - row['asked reward']:+.2g}."
        )
    if row["asked"] - row["of n"] > GROWS:
        yield (
            f"At beta {beta:g} half of the candidates show {2 * row['of n'] - row['asked']:.2g} nats of tilt and all "
            f"of them {row['of n']:.2g}: it still grows with their number, and what is asked is more than this "
            "estimate."
        )


def _other_rules(diagnosis: Diagnosis) -> Iterator[str]:
    for row in diagnosis.sections["rules"].rows:
        if row["rule"] in diagnosis.weighing and row["ess"] is not None and row["ess"] < min(FEW, diagnosis.n / 4):
            yield (
                f"{row['rule']}: its weights rest on {row['ess']:.1f} of {diagnosis.n} candidates; a larger beta "
                "spreads them."
            )
        lost = 1 - row["prompts"] / max(other["prompts"] for other in diagnosis.sections["rules"].rows)
        if lost > 0.1:
            yield f"{row['rule']} keeps nothing of {100 * lost:.0f} % of the prompts; its means are of the others."


def _best_of(diagnosis: Diagnosis) -> Iterator[str]:
    rows = diagnosis.sections["best-of"].rows
    if len(rows) < 3:
        return
    before, last = rows[-2:]
    gain, exponent = last["reward gain"], last["reward gain"] / diagnosis.beta
    if gain > 0:
        factor = f"{np.exp(exponent):.2g}" if exponent < 10 else f"e^{exponent:.0f}"
        yield (
            f"The best of {last['n']} has {gain:.2g} more reward than the best of {before['n']}. The maximum that "
            "Algorithm 1 accepts against is too low by about as much again: with twice the candidates it would accept "
            f"{factor} times less at beta {diagnosis.beta:g}."
        )
    if not diagnosis.gold or diagnosis.past_peak is None:
        return
    peak = max(rows, key=lambda row: row["gold"])
    if diagnosis.past_peak.high < 0:
        yield (
            f"Gold of the best of n falls from {peak['gold']:.3g} at n = {peak['n']} to {last['gold']:.3g} at n = "
            f"{last['n']}: beyond {peak['n']} the ranker is exploited. Take fewer candidates, a higher beta or a "
            "better ranker."
        )
    else:
        rises = "still rises" if last["gold gain low"] > 0 else "no longer rises for certain"
        yield (
            f"Gold of the best of n {rises} from {before['n']} to {last['n']} candidates: {last['gold gain']:+.2g} "
            f"[{last['gold gain low']:+.2g}, {last['gold gain high']:+.2g}]."
        )


def _ranker(diagnosis: Diagnosis) -> Iterator[str]:
    section = diagnosis.sections.get("agreement")
    for row in section.rows if section else []:
        what = row["against"]
        if what == OTHER_ORDER:
            text = f"Both orders of reading agree on {row['alike %']:.0f} % of the pairs, {_inside(row)}."
        elif what.startswith(ANOTHER_BASELINE):
            text = f"With {what} {row['alike %']:.0f} % of the pairs keep their order, {_inside(row)}."
        else:
            continue
        seen, by = row["confirmed %"], "the second order" if what == OTHER_ORDER else "the other baseline"
        gain = "" if seen is None else f" Of what the recipe's rule gains in reward, {by} confirms {seen:.0f} %."
        yield text + gain
    if bias := diagnosis.position_bias:
        side = "first" if bias["bias"] < 0 else "second"
        yield (
            f"The ranker prefers the {side} of two responses by {abs(bias['bias']):.2g} nats, and "
            f"{100 * bias['flipped']:.0f} % of its verdicts change with the order of reading."
        )
    if diagnosis.asks_for_baselines:
        yield (
            "How far the order depends on the one random baseline of a prompt is not known. A second run in this store "
            "with `--set reward.seed=1 --until reward`, and diagnose again, says it."
        )


def _gold(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.gold:
        yield (
            "No gold reward was read. What cannot be said: how often the ranker is right, whether the best of n is "
            "exploited, and in which order the rules are by quality; the order by reward is the ranker's own opinion. "
            "`evaluate: {with: {gold: ...}}` in the config names a program for it."
        )
        return
    row = next(row for row in diagnosis.sections["agreement"].rows if row["against"] == "gold")
    if row["alike %"] is not None:
        yield f"The reward orders {row['alike %']:.0f} % of the pairs as gold does, {_inside(row)}."
    for row in diagnosis.sections["rules"].rows:
        if row["right %"] is not None and row["right % high"] < CLEAR:
            than = "no better" if row["right % low"] <= CHANCE else "little better"
            yield (
                f"Pairs of what {row['rule']} keeps are right in {row['right %']:.0f} % [{row['right % low']:.0f}, "
                f"{row['right % high']:.0f}], {than} than chance: imitate what it keeps, or add its likelihood to the "
                "loss of the pairs."
            )


def _length(diagnosis: Diagnosis) -> Iterator[str]:
    rows = {row["length and"]: row for row in diagnosis.sections["length"].rows}
    reward, gold = rows["reward"], rows.get("gold")
    if reward["correlation"] is None:
        return
    text = (
        f"Within prompts reward and length correlate by {reward['correlation']:+.2f} "
        f"[{reward['correlation low']:+.2f}, {reward['correlation high']:+.2f}]"
    )
    if gold is None or gold["correlation"] is None:
        yield f"{text}; whether longer ones are better, only gold would say."
    elif reward["correlation low"] > gold["correlation high"]:
        yield f"{text}, gold and length by {gold['correlation']:+.2f}: the ranker prefers length more than gold does."
    else:
        yield f"{text}, gold and length by {gold['correlation']:+.2f}: the ranker has no bias to length beyond gold's."


def _inside(row: Row) -> str:
    parts = [
        f"{value:.0f} % of those that {name.removeprefix('in ').removesuffix(': %')} keeps"
        for name, value in row.items()
        if name.startswith("in ") and name.endswith(": %") and value is not None
    ]
    return " and ".join(parts)

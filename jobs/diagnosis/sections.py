"""Sections of a diagnosis: a table each, with 95 % percentile bootstrap intervals over prompts."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import queries
from jobs.diagnosis.cached import CachedCandidates
from jobs.diagnosis.kept import RuleOutcome, compared_rules, keep, label_of
from pipeline.registry import Bound
from pipeline.sql.catalog import query
from stages.selection import diagnostics as measures
from stages.selection.diagnostics import Estimate, Resamples
from stages.selection.groups import Floats, RewardGroups, temperature
from stages.selection.rules import selection_rule
from stages.selection.scales import quantile, scaled

RESAMPLES = 1000
DISTANCE_BINS = 6
GRID = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # betas of the tilt's table, in units of the recipe's own
DEFAULT_K, DEFAULT_BETA = 8, 0.5  # where the recipe's own rule has none
OTHER_ORDER = "the other order"
ENDS = (" low", " high")
Row = dict[str, Any]


@dataclass
class Section:
    """Part of a diagnosis: its table, what the columns mean, which of them a console shows, and numbers of its plot."""

    id: str
    title: str
    about: str
    rows: list[Row]
    short: tuple[str, ...]
    plot: dict[str, Any] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """Facts about the candidates, numbers that only the findings read, and the sections by id.

    apart: by how much what a row of `rules` keeps is better by gold than what the next row keeps. past_peak: gold of
    the best of all minus that of the n with the highest gold. edge: beta below which a rule that keeps k acts as top-k.
    distinct: share of a prompt's candidates that are different; flat: of prompts whose rewards are all equal.
    """

    name: str
    facts: dict[str, str]
    sections: dict[str, Section]
    k: int
    n: int
    beta: float
    limit: float
    edge: float
    distinct: float
    flat: float
    labels: bool
    gold: bool
    weighing: set[str]
    apart: list[Estimate]
    past_peak: Estimate | None
    position_bias: Row | None
    asks_for_baselines: bool
    findings: list[str] = field(default_factory=list)

    def flat_table(self) -> pa.Table:
        """Return all tables as one: a row per section, item and measure, with its interval where it has one."""
        rows = []
        for section in self.sections.values():
            for row in section.rows:
                (_, item), *values = row.items()
                for measure, value in values:
                    if not measure.endswith(ENDS) and value is not None:
                        low, high = (row.get(f"{measure}{end}") for end in ENDS)
                        cells = dict(section=section.id, item=str(item), measure=measure, value=float(value))
                        rows.append(cells | dict(low=low, high=high))
        rows += [dict(section="findings", item=text) for text in self.findings]
        names = [(name, pa.string()) for name in ("section", "item", "measure")]
        names += [(name, pa.float64()) for name in ("value", "low", "high")]
        return pa.Table.from_pylist(rows, pa.schema(names))


def make_diagnosis(cached: CachedCandidates, name: str, extra: list[Bound], seed: int = 0) -> Diagnosis:
    """Return the diagnosis of cached candidates for the recipe's own rule, the rules that ship, and `extra` ones."""
    from jobs.diagnosis.findings import findings

    groups, step = cached.groups, cached.select
    rule, scale = step.options["rule"], step.options["scale"]
    k, beta = rule.options.get("k") or DEFAULT_K, rule.options.get("beta")
    beta = DEFAULT_BETA if beta is None or not 0 < beta < np.inf else beta
    outcomes = [keep(cached, *pair) for pair in compared_rules(rule, scale, extra, k, beta)]
    top = next(item for item in outcomes if item.rule.name == "best_of" and item.rule.options["k"] == k)
    resamples = Resamples(len(groups.sizes), RESAMPLES, seed)
    limit = float(np.log(groups.sizes / np.minimum(k, groups.sizes)).mean())
    on_scale = scaled(scale, groups)
    # The beta, median over prompts, at which the candidates' own tilt is log(n / k).
    betas = temperature(on_scale, None, None, max(limit, 1e-3))
    usable = betas[np.isfinite(betas) & (betas > 0)]
    edge = float(f"{np.median(usable):.2g}") if len(usable) else beta
    rules, apart = _rules_section(cached, outcomes, resamples, seed)
    best, past_peak = _best_of_section(cached, resamples)
    sections = [
        rules,
        _tilt_section(cached, on_scale, k, beta, edge, limit, top, resamples, seed),
        best,
        _agreement_section(cached, outcomes[0], top, scale, resamples),
        _length_section(cached, resamples),
    ]
    biases = [] if cached.orders is None else query(cached.catalog, queries.text("position_bias")).to_pylist()
    sizes, distinct = groups.sizes, cached.distinct / groups.sizes
    facts = {
        "candidates": f"{len(groups.values):,} of {len(sizes):,} prompts: {np.median(sizes):.0f} of each (median), of "
        f"which {np.median(cached.distinct):.0f} are different",
        "rewards": f"{step.inputs['rewards'].name}; standard deviation {_deviation(groups, groups.values):.3g} within "
        "a prompt",
        "selection": f"{step.name}: {label_of(rule, scale)}",
        "gold": cached.gold_name or "none",
    }
    result = Diagnosis(
        name=name,
        facts=facts,
        sections={section.id: section for section in sections if section.rows},
        k=k,
        n=int(np.median(sizes)),
        beta=beta,
        limit=limit,
        edge=edge,
        distinct=float(np.median(distinct)),
        flat=float((groups.range == 0).mean()),
        labels=cached.rewards["label_threshold"].null_count < cached.rewards.num_rows,
        gold=cached.gold is not None,
        weighing={item.label for item in outcomes if item.rule.metadata.get("weighs")},
        apart=apart,
        past_peak=past_peak,
        position_bias=biases[0] if biases else None,
        asks_for_baselines=cached.orders is not None and not cached.repeats,
    )
    result.findings = list(findings(result))
    return result


def _cells(name: str, estimate: Estimate, factor: float = 1.0, interval: bool = True) -> Row:
    """Return the cells of an estimate, None where it has no value."""
    values = {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}
    cells = {key: None if np.isnan(value) else factor * value for key, value in values.items()}
    return cells if interval else {name: cells[name]}


def _kept_mean(cached: CachedCandidates, outcome: RuleOutcome, values: Floats) -> Floats:
    """Return the mean of values in what a rule keeps of each prompt, [G]; nan where it keeps nothing."""
    total = cached.groups.sum(np.where(outcome.shares > 0, outcome.shares * values, 0.0))
    return np.where(outcome.number > 0, total, np.nan)


def _deviation(groups: RewardGroups, values: Floats) -> float:
    """Return the standard deviation within a prompt, mean over prompts."""
    mean = groups.broadcast(groups.mean(values))
    return float(np.sqrt(groups.mean((values - mean) ** 2)).mean())


def _pairs_of_kept(groups: RewardGroups, values: Floats, outcome: RuleOutcome) -> Floats:
    """Return columns of which `ratio` is the share of pairs in the same order, among what a rule keeps, [G, 2]."""
    return np.sum([measures.agreement(groups, values, weight)[:, 0] for weight in outcome.weights], axis=0)


def _rules_section(
    cached: CachedCandidates, outcomes: list[RuleOutcome], resamples: Resamples, seed: int
) -> tuple[Section, list[Estimate]]:
    """Return what rules keep, best first by gold or else by reward, and by how much each row is ahead of the next."""
    groups, gold = cached.groups, cached.gold
    shares = [item.shares for item in outcomes]
    predictions = [] if gold is None else measures.curve_prediction(groups, gold, shares, seed)
    rows: list[tuple[Row, Floats]] = []
    for number, item in enumerate(outcomes):
        rewards = _kept_mean(cached, item, groups.values)
        row: Row = {"rule": item.label} | _cells("reward", resamples.mean(rewards))
        if gold is not None:
            golds = _kept_mean(cached, item, gold)
            row |= _cells("gold", resamples.mean(golds))
            row |= _cells("predicted", resamples.mean(predictions[number]), interval=False)
            row |= _cells("right %", resamples.estimate(_pairs_of_kept(groups, gold, item)), 100.0)
        nats = measures.share_divergence(groups, item.shares, item.number, item.repetitions)
        row |= _cells("nats", resamples.mean(nats), interval=False)
        some = groups.broadcast(item.number > 0)  # the others have no effective size
        sizes = [groups.effective_sample_size(np.where(some, weight, 1.0)) for weight in item.weights]
        ess = np.where(item.number > 0, np.mean(sizes, axis=0), np.nan)
        row |= _cells("ess", resamples.mean(ess), interval=False)
        row |= _cells("tokens", resamples.mean(_kept_mean(cached, item, cached.tokens)), interval=False)
        row["prompts"] = int((item.number > 0).sum())
        rows.append((row, rewards if gold is None else golds))
    key = "reward" if gold is None else "gold"
    rows.sort(key=lambda item: -np.inf if item[0][key] is None else item[0][key], reverse=True)
    apart = [resamples.mean(before - after) for (_, before), (_, after) in pairwise(rows)]
    about = (
        "Means per prompt of what a rule keeps, weights included, over repetitions with other seeds; with the k and "
        "beta of the recipe. nats: divergence of what is kept from all candidates. ess: number of candidates that "
        "carry the weight. prompts: of which something is kept."
    )
    if gold is not None:
        about += (
            " right: pairs of what is kept that the reward orders as gold does. predicted: gold expected from the "
            "ranks that the rule keeps and the gold by rank of other prompts, without a look at the prompt's own."
        )
    short = ("rule", "reward", "gold", "gold low", "gold high", "predicted", "right %", "nats", "tokens")
    return Section("rules", "What rules keep", about, [row for row, _ in rows], short), apart


def _tilt_section(
    cached: CachedCandidates,
    on_scale: RewardGroups,
    k: int,
    beta: float,
    edge: float,
    limit: float,
    top: RuleOutcome,
    resamples: Resamples,
    seed: int,
) -> Section:
    """Return what temperatures ask for and what Algorithm 1 achieves at them."""
    rows = []
    for value in sorted({factor * beta for factor in GRID} | {edge}):
        target, of_n = measures.asked_tilt(on_scale, value, seed)
        if value == 0:  # no number of candidates shows what a temperature of 0 asks for
            target = replace(target, kl=np.full_like(target.kl, np.nan), reward=np.full_like(target.reward, np.nan))
        rule = selection_rule.bind(dict(name="rejection_sample", k=k, beta=float(value)))
        outcome = keep(cached, rule, cached.select.options["scale"])
        nats = measures.share_divergence(cached.groups, outcome.shares, outcome.number, outcome.repetitions)
        row: Row = {"beta": float(f"{value:.3g}")} | _cells("asked", resamples.mean(target.kl))
        row |= _cells("of n", resamples.mean(of_n.kl), interval=False)
        row |= _cells("kept", resamples.mean(nats))
        row |= _cells("ess", resamples.mean(of_n.ess), interval=False)
        row |= _cells("accepted %", resamples.mean(of_n.acceptance), 100.0, interval=False)
        row |= _cells("asked reward", resamples.mean(target.reward), interval=False)
        row |= _cells("kept reward", resamples.mean(_kept_mean(cached, outcome, on_scale.values)))
        in_top = _kept_mean(cached, outcome, (top.shares > 0).astype(np.float64))
        rows.append(row | _cells("top k %", resamples.mean(in_top), 100.0, interval=False))
    about = (
        f"rejection_sample, k = {k}, on the recipe's scale. asked: nats by which exp(reward / beta) moves the policy. "
        "of n: the same of the candidates alone, log n at most. kept: nats by which Algorithm 1 moves what it keeps, "
        f"at most log(n / k) = {limit:.2f}. ess: of the weights exp(reward / beta). accepted: share that the first "
        "pass accepts. asked reward: mean under exp(reward / beta); kept reward: of what is kept. top k: share of "
        "what is kept that is among the k best. asked and asked reward are extrapolated from half of the candidates "
        "and all, and still too small where ess is below about 5."
    )
    short = ("beta", "asked", "of n", "kept", "ess", "accepted %", "asked reward", "kept reward", "top k %")
    return Section("tilt", "Asked and achieved tilt", about, rows, short, {"limit": limit, "beta": beta})


def _best_of_section(cached: CachedCandidates, resamples: Resamples) -> tuple[Section, Estimate | None]:
    """Return the best of n for several n, and what gold loses (below 0) from its highest n to the last."""
    groups = cached.groups
    sizes = measures.subset_sizes(int(groups.sizes.max()))
    rewards = measures.best_of_n(groups, groups.values, sizes)
    # An n that most prompts have: of the few others the rows could not be compared.
    sizes = [size for column, size in enumerate(sizes) if np.isnan(rewards[:, column]).mean() <= 0.5]
    golds = None if cached.gold is None else measures.best_of_n(groups, cached.gold, sizes)
    tokens = measures.best_of_n(groups, cached.tokens, sizes)
    rows = []
    for column, size in enumerate(sizes):
        row: Row = {"n": size, "nats": float(np.log(size) - (size - 1) / size)}
        for name, values in (("reward", rewards), ("gold", golds)):
            if values is not None:
                row |= _cells(name, resamples.mean(values[:, column]))
                before = values[:, column - 1] if column else np.full(len(values), np.nan)
                row |= _cells(f"{name} gain", resamples.mean(values[:, column] - before))
        rows.append(row | _cells("tokens", resamples.mean(tokens[:, column]), interval=False))
    past_peak = None
    if golds is not None:
        peak = max(range(len(sizes)), key=lambda column: rows[column]["gold"])
        past_peak = resamples.mean(golds[:, -1] - golds[:, peak])
    about = (
        "Expected reward of the best of n by reward, over all subsets of n of a prompt's candidates. nats: its "
        "divergence from the policy, log n - (n - 1) / n where no two rewards are equal. gain: against the row above."
    )
    deviations = {"reward": _deviation(groups, groups.values)}
    deviations |= {} if cached.gold is None else {"gold": _deviation(groups, cached.gold)}
    short = ("n", "nats", "reward", "reward gain", "gold", "gold low", "gold high", "gold gain", "tokens")
    return Section("best-of", "Best of n", about, rows, short, {"deviations": deviations}), past_peak


def _agreement_section(
    cached: CachedCandidates, of_recipe: RuleOutcome, top: RuleOutcome, scale: Bound, resamples: Resamples
) -> Section:
    """Return how far the order of the rewards agrees with other orders, of all candidates and of what rules keep."""
    groups, edges = cached.groups, measures.distances(cached.groups, DISTANCE_BINS)
    # By source: groups whose rewards order the pairs, what they are held against, and what the two rules keep. An order
    # of reading is held against what the other one selects: among what their mean selects, chance sets one against the
    # other, for where one is high by chance, the other need not be.
    two = list({item.label: item for item in (of_recipe, top)}.values())
    sources: dict[str, tuple[RewardGroups, Floats, list[RuleOutcome]]] = {}
    if cached.orders is not None:
        first, second = cached.orders
        column = cached.rewards.column_names.index("reward")
        table = cached.rewards.set_column(column, "reward", pa.array(first))
        sources[OTHER_ORDER] = (
            replace(groups, values=first),
            second,
            [keep(cached, it.rule, scale, table) for it in two],
        )
    sources |= {what: (groups, values, two) for what, values in cached.repeats.items()}
    if cached.gold is not None:
        sources["gold"] = (groups, cached.gold, two)
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    for what, (ranked, values, rules) in sources.items():
        pairs = measures.agreement(ranked, values, edges=edges)
        row: Row = {"against": what, "pairs": int(pairs[..., 1].sum())}
        row |= _cells("alike %", resamples.estimate(pairs.sum(axis=1)), 100.0)
        for item, label in zip(rules, two, strict=True):
            row |= _cells(f"in {label.label}: %", resamples.estimate(_pairs_of_kept(ranked, values, item)), 100.0)
        gains = [_kept_mean(cached, rules[0], one) - groups.mean(one) for one in (values, ranked.values)]
        valid = ~np.isnan(gains[0]) & ~np.isnan(gains[1])
        columns = np.where(valid[:, None], np.stack(gains, axis=1), 0.0)
        row |= dict.fromkeys(f"confirmed %{end}" for end in ("", *ENDS))
        if what != "gold" and columns[:, 1].sum() > 0:  # in other units
            row |= _cells("confirmed %", resamples.estimate(columns), 100.0)
        rows.append(row)
        curves[what] = (100 * measures.ratio(pairs.sum(axis=0))).tolist()
    if cached.comparisons is not None:
        left, right, logit = cached.comparisons
        difference = groups.values[left] - groups.values[right]
        decided = (difference != 0) & (logit != 0)
        prompt = groups.broadcast(np.arange(len(groups.sizes)))[left[decided]]
        columns = np.zeros((len(groups.sizes), 2))
        np.add.at(columns, (prompt, 0), (np.sign(logit) == np.sign(difference))[decided])
        np.add.at(columns, (prompt, 1), 1.0)
        compared = {"against": "direct comparisons", "pairs": int(decided.sum())}
        rows.append(compared | _cells("alike %", resamples.estimate(columns), 100.0))
    rows = [{name: row.get(name) for name in max(rows, key=len)} for row in rows]
    about = (
        "Share of a prompt's pairs that the reward orders as another source does, where that tells them apart: of "
        "all candidates, and of what two rules keep. Half is chance. The other order: the reward by the order of "
        "reading in which the baseline is first, against that in which it is second. Another baseline: of another "
        "random candidate of the prompt. Direct comparisons: of step compare. confirmed: share of the gain in reward "
        "of what the recipe's rule keeps that the other source sees. A ranker that agrees with itself may still be "
        "wrong."
    )
    short = ("against", "pairs", "alike %", *(f"in {item.label}: %" for item in two), "confirmed %")
    plot = {"edges": edges, "curves": curves}
    return Section("agreement", "Agreement of the ranker's order", about, rows, short, plot)


def _length_section(cached: CachedCandidates, resamples: Resamples) -> Section:
    """Return how reward and gold go with the number of tokens, within prompts."""
    groups, tokens = cached.groups, cached.tokens
    by_length = replace(groups, values=tokens)
    tenth = np.minimum((10 * (quantile(by_length) - 1e-9)).astype(int), 9)
    rows: list[Row] = []
    curves = {}
    for what, values in {"reward": groups.values, "gold": cached.gold}.items():
        if values is None:
            continue
        squares = measures.squares(groups, values, tokens)
        row: Row = {"length and": what} | _cells("correlation", resamples.estimate(squares, measures.correlation))
        longer = measures.agreement(by_length, values)[:, 0]
        rows.append(row | _cells("longer ahead %", resamples.estimate(longer), 100.0))
        mean = groups.broadcast(groups.mean(values))
        deviation = groups.broadcast(np.sqrt(groups.mean((values - mean) ** 2)))
        standard = np.divide(values - mean, deviation, out=np.zeros_like(values), where=deviation > 0)
        total, count = np.bincount(tenth, standard, minlength=10), np.bincount(tenth, minlength=10)
        curves[what] = np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()
    about = (
        "Within prompts: correlation with the number of tokens, and share of pairs in which the longer response is "
        "ahead, an equal length being half."
    )
    short = ("length and", "correlation", "correlation low", "correlation high", "longer ahead %")
    return Section("length", "Length", about, rows, short, {"curves": curves})

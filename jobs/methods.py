"""Methods on the leaderboard: runs that differ in seeds alone are replicates of one (pipeline/sql/replicates.py).

A figure of a method with several seeds has an interval over seeds and prompts. Of two methods, the interval of their
difference decides: where it contains zero, they cannot be told apart. A run of one seed is not compared: its interval
over prompts says how well one policy was measured, and nothing about another training of the same method.

**Interval.** All seeds answer the same prompts, so a table [seeds, prompts] has variance from both. The half-width is
the root of the sum of squares of two t intervals: over the means of the seeds, and over the means of the prompts
(MOVER: Zou and Donner, Statistics in Medicine 27, 2008). It is not a hierarchical bootstrap, which resamples two or
three seeds into too few different sets: simulated with seeds that matter more than prompts, 95 % intervals of the
bootstrap covered 76 % (2 seeds) and 83 % (3), these 96 to 97 %; where seeds hardly matter, these cover 98 to 99 %. The
known weakness is width: t is 12.7 for 2 seeds, 4.3 for 3, 2.8 for 5. Where seeds of both methods spread by 2 points and
there are 200 prompts, a difference of 10 points is seen by 2 seeds each in 14 stores of 100, by 3 in 65, by 5 in 98.
Of seeds that were not varied (`optimize.seed` alone leaves the candidates as they are) no interval says anything.

**Difference.** On the prompts that both have. Seeds are paired where the pair shares a step that the other seeds do not
have, such as its candidates under `--over sample.seed=0,1,2`; otherwise their variances add up, with the degrees of
freedom of Welch and Satterthwaite.

**Several comparisons.** The method with the highest mean is compared with each of M - 1 others at the level
1 - 0.05 / (M - 1) (Bonferroni). The truly best method is then called lower with a probability of at most 5 %, although
the highest mean was chosen from the same data (Gupta's argument for subsets: it suffices that none of the M - 1 others
beats the truly best by chance). That is all that holds together: among many methods, one that is not the best may be
called lower than the highest by chance, and the size of a difference from a chosen highest is somewhat exaggerated.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs import queries
from pipeline.config.keys import key_of
from pipeline.sql.catalog import Catalog, query
from pipeline.sql.replicates import drawn_from, keys_behind, method_keys, without_seeds
from pipeline.store.store import Json

Values = NDArray[np.float64]  # [seeds, prompts], NaN where a prompt has no figure
WINS = ("gold_win", "proxy_win")  # in the order in which methods are compared by them
COLUMNS = dict(zip(WINS, WINS, strict=True)) | {"gold": "gold_reward", "kl": "kl_nats", "n_tokens": "tokens"}
# Steps that evaluate at other temperatures than 1, by the ends of the leaderboard's columns for them.
TEMPERATURES = {"_as_sampled": "evaluate_as_sampled", "_greedy": "evaluate_greedy"}
EVALUATED = """
SELECT DISTINCT run || coalesce('@' || round, '') AS run, runs.run AS run_name, method, stage, key,
    (SELECT any_value(gold.key) FROM runs AS gold WHERE gold.step = 'evaluate_by_gold' AND gold.run = runs.run
        AND gold.round IS NOT DISTINCT FROM runs.round) AS judged -- by a judge called gold
FROM runs JOIN evaluations USING (stage, key) WHERE NOT starts_with(step, 'evaluate_') ORDER BY ALL
"""
OTHER_TEMPERATURES = f"""
SELECT run || coalesce('@' || round, '') AS run, step, key FROM runs JOIN steps USING (stage, key)
WHERE step IN {tuple(TEMPERATURES.values())}
"""
PROMPTS_OF_RUNS = """
SELECT run || coalesce('@' || round, '') AS run, list(DISTINCT prompt_id ORDER BY prompt_id) AS prompts
FROM runs JOIN outcomes USING (stage, key) WHERE NOT starts_with(step, 'evaluate_') GROUP BY ALL ORDER BY ALL
"""
NAMES_OF_EVALUATIONS = """
SELECT list(DISTINCT run || coalesce('@' || round, '') ORDER BY run || coalesce('@' || round, '')) AS names
FROM runs JOIN (SELECT DISTINCT stage, key FROM evaluations WHERE stage != 'win_rate') USING (stage, key)
WHERE NOT starts_with(step, 'evaluate_') GROUP BY key HAVING count(DISTINCT run) > 1 ORDER BY names
"""
MOST = 0.9  # share of held-out prompts in common from which rows are taken to be of the same ones: some lack a response
SEED_LABEL = r"(?:[\w@]+\.)*seed=\d+"  # in a run's name
ERROR = 0.05


@dataclass
class Method:
    """Method with several seeds; of each replicate, a row of `values` by metric, and the keys of all its steps."""

    name: str
    runs: list[str]
    yardsticks: dict[str, str]  # by metric: what a figure depends on beside the policy; only equal ones are compared
    steps: list[set[str]] = field(default_factory=list)
    values: dict[str, Values] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Difference:
    """Difference of a method from the best, with the ends of its interval."""

    method: Method
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Methods that are measured alike, by one metric: the one with the highest mean, and the others beside it."""

    metric: str
    best: Method
    differences: list[Difference]


# The laws.


def interval(values: Values, level: float = 1 - ERROR) -> tuple[float, float, float]:
    """Return mean and interval over seeds and prompts of [seeds > 1, prompts], each seed with the same weight.

    The interval is NaN for one prompt.
    """
    seed_means, prompt_means = _means(values)
    variance = seed_means.var(ddof=1) / len(seed_means)
    mean, half = float(seed_means.mean()), _half_width(variance, len(seed_means) - 1, prompt_means, level)
    return mean, mean - half, mean + half


def difference_interval(
    a: Values, b: Values, pairs: list[tuple[int, int]] | None = None, level: float = 1 - ERROR
) -> tuple[float, float, float]:
    """Return mean and interval of a - b on the prompts that both have; `pairs` are the rows that belong together.

    The interval is NaN for fewer than two such prompts.
    """
    shared = ~np.isnan(a).all(axis=0) & ~np.isnan(b).all(axis=0)
    if shared.sum() < 2:
        return np.nan, np.nan, np.nan
    a, b = a[:, shared], b[:, shared]
    if pairs is not None:
        return interval(np.stack([a[i] - b[j] for i, j in pairs]), level)
    (seeds_a, prompts_a), (seeds_b, prompts_b) = _means(a), _means(b)
    of_a, of_b = seeds_a.var(ddof=1) / len(seeds_a), seeds_b.var(ddof=1) / len(seeds_b)
    lower = min(len(seeds_a), len(seeds_b)) - 1  # where no seed makes a difference
    weights = of_a**2 / (len(seeds_a) - 1) + of_b**2 / (len(seeds_b) - 1)
    freedom = (of_a + of_b) ** 2 / weights if weights else lower
    mean, half = float(seeds_a.mean() - seeds_b.mean()), _half_width(of_a + of_b, freedom, prompts_a - prompts_b, level)
    return mean, mean - half, mean + half


def _means(values: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of each seed, and of each prompt that has a figure."""
    values = values[:, ~np.isnan(values).all(axis=0)]
    return np.nanmean(values, axis=1), np.nanmean(values, axis=0)


def _half_width(seed_variance: float, freedom: float, prompts: NDArray[np.float64], level: float) -> float:
    """Return the half-width from the variance of the mean over seeds, its degrees of freedom, and means of prompts."""
    from scipy.special import stdtrit  # the quantile of t

    if len(prompts) < 2:
        return np.nan
    prompt_variance = prompts.var(ddof=1) / len(prompts)
    t_seeds, t_prompts = (float(stdtrit(df, (1 + level) / 2)) for df in (freedom, len(prompts) - 1))
    return float(np.sqrt(t_seeds**2 * seed_variance + t_prompts**2 * prompt_variance))


# From a store to methods.


def methods_of(catalog: Catalog) -> list[Method]:
    """Return the methods of which several policies, trained with different seeds, were evaluated.

    Runs that evaluate one policy with other seeds of the evaluation are one replicate, the mean of them.
    """
    identities = {
        manifest["key"]: {"stage": manifest["stage"]} | manifest["identity"] for manifest in catalog.manifests
    }
    evaluated = query(catalog, EVALUATED).to_pylist()
    groups: dict[str, dict[str, dict[str, list[str]]]] = {}  # method -> policy -> key of evaluate -> runs
    for row in evaluated:
        candidates = identities[row["key"]]["inputs"].get("candidates", row["key"])
        policy = drawn_from(identities[candidates]) if candidates in identities else candidates
        groups.setdefault(row["method"], {}).setdefault(policy, {}).setdefault(row["key"], []).append(row["run"])
    groups = {method: policies for method, policies in groups.items() if len(policies) > 1}
    if not groups:
        return []

    method_by_key = method_keys(catalog.manifests)
    golds: dict[str, set[str | None]] = {}
    for row in evaluated:
        golds.setdefault(row["key"], set()).add(row["judged"])
    judged = {key: gold for key, (gold, *others) in golds.items() if gold and not others}
    evaluations = [key for policies in groups.values() for keys in policies.values() for key in keys]
    values = values_by_key(catalog, evaluations, judged)
    compared = {row["run"] for row in evaluated if row["method"] in groups}
    steps = query(catalog, OTHER_TEMPERATURES).to_pylist()
    others = {(row["run"], row["step"]): row["key"] for row in steps if row["run"] in compared}
    other_values = values_by_key(catalog, list(dict.fromkeys(others.values()))) if others else {}
    methods = []
    for policies in groups.values():
        runs = [run for keys in policies.values() for labels in keys.values() for run in labels]
        first = next(iter(next(iter(policies.values()))))
        method = Method(_name(runs), runs, _yardsticks(first, identities, method_by_key, judged.get(first)))
        for keys in policies.values():
            method.steps.append(set().union(*(keys_behind(key, identities) for key in keys)))
        tables = {metric: [[values[key][metric] for key in keys] for keys in policies.values()] for metric in COLUMNS}
        for end, step in TEMPERATURES.items():
            of_policies = [
                dict.fromkeys(others[run, step] for labels in keys.values() for run in labels if (run, step) in others)
                for keys in policies.values()
            ]
            if all(of_policies):
                tables |= {f"{metric}{end}": [[other_values[key][metric] for key in keys] for keys in of_policies]
                           for metric in WINS}  # fmt: skip
        for metric, of_replicates in tables.items():
            table = np.stack([_nanmean(np.stack(rows)) for rows in of_replicates])
            if not np.isnan(table).all(axis=1).any():  # a figure that a replicate lacks is none of the method
                method.values[metric] = table
        methods.append(method)
    of_methods = {run for method in methods for run in method.runs}
    single_runs = [run for run in dict.fromkeys(row["run"] for row in evaluated) if run not in of_methods]
    names = Counter([method.name for method in methods] + single_runs)
    for method in methods:
        if names[method.name] > 1:
            method.name = f"{method.name} ({method.runs[0]} and {len(method.runs) - 1} more)"
    return methods


def values_by_key(
    catalog: Catalog, keys: list[str], judged: dict[str, str] | None = None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return key of evaluate -> metric -> mean per prompt, NaN for a prompt without; all keys have the same prompts.

    judged: key of evaluate -> that of the win rate by a judge called gold, which counts where there is no gold reward.
    """
    judged = judged or {}
    means = ", ".join(f"avg({metric}) AS {metric}" for metric in COLUMNS)
    listed = ", ".join(f"'{key}'" for key in keys)  # hashes, which manifests are checked for
    sql = f"SELECT key, prompt_id, {means} FROM outcomes WHERE key IN ({listed}) GROUP BY key, prompt_id ORDER BY ALL"
    table = query(catalog, sql)
    prompts, columns = np.unique(table["prompt_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    of_key = table["key"].to_numpy(zero_copy_only=False)
    figures = {metric: table[metric].cast(pa.float64()).to_numpy(zero_copy_only=False) for metric in COLUMNS}
    result = {}
    for key in keys:
        here = of_key == key
        result[key] = {metric: np.full(len(prompts), np.nan) for metric in COLUMNS}
        for metric, column in figures.items():
            result[key][metric][columns[here]] = column[here]
    listed = ", ".join(f"'{judged[key]}'" for key in keys if key in judged)
    if listed:
        sql = f"SELECT key, prompt_id, avg(win) AS win FROM wins WHERE key IN ({listed}) GROUP BY ALL"
        wins = {(row["key"], row["prompt_id"]): row["win"] for row in query(catalog, sql).to_pylist()}
        for key in keys:
            if key in judged and np.isnan(result[key]["gold_win"]).all():
                of_prompts = [wins.get((judged[key], prompt)) for prompt in prompts]
                result[key]["gold_win"] = np.array(of_prompts, dtype=np.float64)
    return result


def _nanmean(rows: Values) -> NDArray[np.float64]:
    """Return the mean of each column over the rows that have a figure, NaN where none has."""
    counts = (~np.isnan(rows)).sum(axis=0)
    return np.where(counts > 0, np.nansum(rows, axis=0) / np.maximum(counts, 1), np.nan)


def _yardsticks(
    key: str, identities: dict[str, Json], method_by_key: dict[str, str], gold: str | None
) -> dict[str, str]:
    """Return by metric what its figures depend on beside the policy: gold reward, baseline and prompts; the ranker."""

    def of(key: str, names: Iterable[str]) -> Json:
        identity = identities[key]
        inputs = {name: method_by_key[identity["inputs"][name]] for name in names if name in identity["inputs"]}
        return identity | {"options": without_seeds(identity["options"]), "inputs": inputs}

    def judged_by(key: str) -> Json | str | None:
        judge = identities[key]["inputs"].get("judgements")
        return of(judge, identities[judge]["inputs"].keys() - {"candidates"}) if judge in identities else judge

    evaluate = of(key, ("prompts", "baseline"))
    of_gold = key_of([evaluate, judged_by(gold)]) if gold in identities else key_of(evaluate)
    return {"gold_win": of_gold, "proxy_win": key_of([evaluate, judged_by(key)])}


def _name(runs: list[str]) -> str:
    """Return what the names of runs are without seeds: `rso n=16` of `rso n=16 seed=0`; the most frequent."""
    names = []
    for run in runs:
        name = re.sub(rf" {SEED_LABEL}(?=[ @]|$)", "", run)
        items = re.search(r"\[(.*)\]", name)
        if items:
            rest = [item for item in items[1].split(",") if not re.fullmatch(SEED_LABEL, item)]
            name = name.replace(items[0], f"[{','.join(rest)}]" if rest else "")
        names.append(name)
    return min(names, key=lambda name: (-names.count(name), len(name), name))


# Comparisons.


def comparisons(methods: list[Method]) -> list[Comparison]:
    """Return a comparison for each set of methods that are measured alike, by gold wins if there are any."""
    metric = next((metric for metric in WINS if any(metric in method.values for method in methods)), WINS[0])
    alike: dict[str, list[Method]] = {}
    for method in methods:
        if metric in method.values:
            alike.setdefault(method.yardsticks[metric], []).append(method)
    result = []
    for members in alike.values():
        members = sorted(members, key=lambda method: -_means(method.values[metric])[0].mean())
        best, *others = members
        differences = []
        for other in others:
            level = 1 - ERROR / len(others)
            pairs = shared_seeds(other.steps, best.steps)
            differences.append(
                Difference(other, *difference_interval(other.values[metric], best.values[metric], pairs, level))
            )
        result.append(Comparison(metric, best, differences))
    return result


def shared_seeds(a: list[set[str]], b: list[set[str]]) -> list[tuple[int, int]] | None:
    """Return which replicates of two methods share a step that no other replicate has, if that pairs all of them."""

    def single_keys(steps: list[set[str]]) -> list[set[str]]:
        counts = Counter(key for keys in steps for key in keys)
        return [{key for key in keys if counts[key] == 1} for keys in steps]

    keys_a, keys_b = single_keys(a), single_keys(b)
    pairs = [(i, j) for i, keys in enumerate(keys_a) for j, others in enumerate(keys_b) if keys & others]
    is_matching = len(pairs) == len(a) == len(b) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
    return pairs if is_matching else None


def comparison_statement(methods: list[Method], single: list[str]) -> list[str]:
    """Return in words which methods cannot be told apart from the best one, and which are lower.

    `single` are runs of one seed, which are not compared.
    """
    lines: list[str] = []
    compared = comparisons(methods)
    for comparison in compared:
        best, differences = comparison.best, comparison.differences
        if not differences:
            if len(methods) > 1:
                lines.append(f"no other method has the gold reward, ranker, baseline and prompts of {best.name}")
            continue
        lines.append(f"{comparison.metric}, methods with several seeds: the highest mean is that of {best.name}")
        unclear = [_in_points(item) for item in differences if item.high >= 0]
        lower = [_in_points(item) for item in differences if item.high < 0]
        unknown = [item.method.name for item in differences if np.isnan(item.high)]
        lines += [f"  cannot be told apart from it: {', '.join(unclear)}"] if unclear else []
        lines += [f"  lower: {', '.join(lower)}"] if lower else []
        lines += [f"  no two prompts in common with it: {', '.join(unknown)}"] if unknown else []
        n = len(differences)
        widened = f", widened for {n} comparisons (Bonferroni)" if n > 1 else ""
        lines.append(f"  differences in points with 95 % intervals over seeds and prompts{widened}")
    if unmeasured := [method.name for method in methods if compared and compared[0].metric not in method.values]:
        lines.append(f"no {compared[0].metric}, so not compared: {', '.join(unmeasured)}")
    if methods and single:
        lines.append(f"one seed each, so not compared: {', '.join(single)}")
    elif len(single) > 1:
        lines.append("one seed each: their order is no evidence about the methods; `winnow sweep` runs several seeds")
    return lines


def _in_points(difference: Difference) -> str:
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    return f"{difference.method.name} ({value:+.1f} [{low:+.1f}, {high:+.1f}])"


def names_statement(catalog: Catalog) -> list[str]:
    """Return a line for each evaluation that has several lines on the leaderboard, as those of other judges have."""
    names = [row["names"] for row in query(catalog, NAMES_OF_EVALUATIONS).to_pylist()]
    return [f"one evaluation under several names, whose figures are the same: {', '.join(runs)}" for runs in names]


# The leaderboard.


def prompts_statement(catalog: Catalog) -> list[str]:
    """Return a line if the rows of a leaderboard are of different held-out prompts: their order then says nothing."""
    groups: list[tuple[set[str], list[str]]] = []
    for row in query(catalog, PROMPTS_OF_RUNS).to_pylist():
        prompts = set(row["prompts"])
        for others, runs in groups:
            if len(prompts & others) >= MOST * max(len(prompts), len(others)):
                runs.append(row["run"])
                break
        else:
            groups.append((prompts, [row["run"]]))
    if len(groups) < 2:
        return []
    listed = [f"{_first_names(runs)} on {len(prompts):,} prompts" for prompts, runs in groups]
    return [f"evaluated on different held-out prompts, so that no order follows: {'; '.join(listed)}"]


def rankers_statement(catalog: Catalog, methods: list[Method]) -> list[str]:
    """Return a line if the proxy figures of a leaderboard are by different rankers: they stand in one column.

    Rankers that were trained with different seeds are one, and so is one that computes in another dtype.
    """
    manifests = {manifest["key"]: manifest for manifest in catalog.manifests}
    method_by_key = method_keys(catalog.manifests)
    row_by_run = {run: method.name for method in methods for run in method.runs}
    groups: dict[str, tuple[str, Json, dict[str, None]]] = {}  # a ranker's name, what else it is, rows of the board
    for row in query(catalog, EVALUATED).to_pylist():
        judge = manifests.get(manifests[row["key"]]["identity"]["inputs"].get("judgements"))
        if judge is None or "by" not in judge["identity"]["options"]:
            continue
        ranker = without_seeds(judge["identity"]["options"]["by"])
        ranker = {option: value for option, value in ranker.items() if option != "dtype"}
        if plugins := judge["identity"].get("plugins"):
            ranker["file"] = ", ".join(sorted({digest[:12] for digest in plugins.values()}))
        name, key = ranker.pop("name"), judge["identity"]["inputs"].get("ranker")
        identity, model = [name, ranker, key], manifests.get(key)
        if model:
            # A model that was given is its content: a new version of stage `model` reads the same one.
            identity[-1] = method_by_key[key] if model["identity"]["inputs"] else model["model"]
            steps = (step for step, link in catalog.runs[row["run_name"]].items() if link["key"] == key)
            name += f" of {(model.get('sources') or {}).get('path') or next(steps, key)}"
        ranker_and_model = ranker | ({"model": ((model and model["model"]) or key)[:12]} if key else {})
        _, _, board_rows = groups.setdefault(key_of(identity), (name, ranker_and_model, {}))
        board_rows[row_by_run.get(row["run"], row["run"])] = None
    if len(groups) < 2:
        return []
    listed = []
    for name, ranker, board_rows in groups.values():
        namesakes = [other for other_name, other, _ in groups.values() if other_name == name]
        differing = [option for option in ranker if any(other.get(option) != ranker[option] for other in namesakes)]
        details = ", ".join(f"{option}: {str(ranker[option])[:40]}" for option in differing)
        listed.append(f"{_first_names([*board_rows])} by {name}{f' ({details})' if details else ''}")
    return [f"proxy figures are by different rankers, and only those by one can be compared: {'; '.join(listed)}"]


def baselines_statement(catalog: Catalog, methods: list[Method]) -> list[str]:
    """Return a line if win rates of a leaderboard are against different policies: they stand in one column.

    Policies that were trained with different seeds are one. A run that was compared with the target texts is another.
    """
    manifests = {manifest["key"]: manifest for manifest in catalog.manifests}
    method_by_key = method_keys(catalog.manifests)
    row_by_run = {run: method.name for method in methods for run in method.runs}
    groups: dict[str, tuple[str, str, dict[str, None]]] = {}  # a policy's name, the key of its model, rows of the board
    for row in query(catalog, EVALUATED).to_pylist():
        draws = manifests.get(manifests[row["key"]]["identity"]["inputs"].get("baseline"))
        if draws is None:
            continue
        key = draws["identity"]["inputs"].get("policy")
        model = manifests.get(key)
        identity, name = draws["stage"], f"the responses of stage {draws['stage']}"
        if model:
            identity = method_by_key[key] if model["identity"]["inputs"] else model["model"]
            steps = (step for step, link in catalog.runs[row["run_name"]].items() if link["key"] == key)
            name = str((model.get("sources") or {}).get("path") or next(steps, key))
        _, _, board_rows = groups.setdefault(identity, (name, key or "", {}))
        board_rows[row_by_run.get(row["run"], row["run"])] = None
    if len(groups) < 2:
        return []
    names = [name for name, _, _ in groups.values()]
    listed = [
        f"{_first_names([*board_rows])} against {name}{f' ({key[:12]})' if names.count(name) > 1 else ''}"
        for name, key, board_rows in groups.values()
    ]
    return [f"win rates are against different policies, so that no order follows: {'; '.join(listed)}"]


def _first_names(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def make_leaderboard(catalog: Catalog) -> tuple[pa.Table, list[str]]:
    """Return the query `leaderboard` with one row for each method of several seeds, and the statement about them.

    Such a row has the mean over seeds, intervals over seeds and prompts, and seconds per run; `seeds` is the number of
    policies. Where every run is alone, the table is that of the query.
    """
    table = query(catalog, queries.text("leaderboard"))
    rows = table.to_pylist()
    methods = methods_of(catalog)
    of_methods = {run for method in methods for run in method.runs}
    single = [row["run"] for row in rows if row["run"] not in of_methods]
    lines = comparison_statement(methods, single) + names_statement(catalog)
    lines += prompts_statement(catalog) + baselines_statement(catalog, methods) + rankers_statement(catalog, methods)
    if not methods:
        return table, lines
    by_run = {row["run"]: row for row in rows}
    rows = [row | {"seeds": 1} for row in rows if row["run"] not in of_methods]
    for method in methods:
        row = dict.fromkeys(table.column_names) | {"run": method.name, "seeds": method.seeds}
        for metric, values in method.values.items():
            mean, low, high = interval(values)
            column = COLUMNS.get(metric, metric)
            row[column] = mean
            row["prompts"] = max(row["prompts"] or 0, int((~np.isnan(values).all(axis=0)).sum()))
            if f"{column}_low" in row:
                if metric.startswith(WINS):  # shares
                    low, high = max(low, 0.0), min(high, 1.0)
                row |= {f"{column}_low": low, f"{column}_high": high}
        for name in ("seconds", "own_seconds"):
            row[name] = float(np.mean([by_run[run][name] for run in method.runs]))
        rows.append(row)
    rows.sort(key=lambda row: [(row[name] is None, -(row[name] or 0)) for name in WINS] + [row["run"]])
    return pa.Table.from_pylist(rows, table.schema.append(pa.field("seeds", pa.int64()))), lines

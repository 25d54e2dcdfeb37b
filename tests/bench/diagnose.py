"""Does `winnow diagnose` predict which selection rule keeps more gold? On the demo, and on real candidates.

A rule's gold is measured without it: a run applies the rule (stage `select`), and a program reads what is kept.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.demo import OVERLAY, data
from jobs.demo.gold import concierge
from jobs.diagnosis.cached import read_cached, source_of
from jobs.diagnosis.kept import label_of
from jobs.diagnosis.sections import Diagnosis, make_diagnosis
from jobs.recipes import plan_named, plan_with_gold
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.schedule import Reporter
from pipeline.store.store import Store
from schemas.tables import CANDIDATES, PROMPTS, SELECTIONS
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from tests.bench.page import commit, facts, written

Gold = Callable[[str, str], float]
RULES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"name": "best_of", "k": 1}, "raw"),
    ({"name": "best_of", "k": 8}, "raw"),
    ({"name": "above", "threshold": 0.7}, "unit"),
    ({"name": "rejection_sample", "k": 8, "beta": 0.5}, "raw"),
    ({"name": "softmax_weights", "beta": 1.0}, "standardized"),
    ({"name": "advantage_weights", "beta": 1.0}, "raw"),
    ({"name": "plain", "k": 8}, "raw"),
)
METHOD = """\
`gold kept` is the gold of what a run's `select` kept, read by a program that knows nothing of the diagnosis; mean
over prompts. `gold` and its interval, `predicted` and `reward` are columns of `winnow diagnose`: `predicted` reads
no gold of the prompt that it is about, `reward` none at all. Kendall's tau compares an order of the rules with
that of `gold kept`: 1 is the same order. The real candidates are the responses of 58 models to 407 instructions
(tatsu-lab/alpaca_eval, Apache-2.0): gold is the logit of a GPT-4 annotator's preference over a fixed baseline. The
rewards are those of a ridge regression on words and style that was fitted to the other half of the prompts, and,
as a reward to be exploited, the number of words."""
GOLD_PROGRAM = """
import json

scores = json.load(open({file!r}))


def judged(prompt, response):
    return scores[prompt + chr(0) + response]
"""


@dataclass
class World:
    """Candidates with rewards in a store, and the program that is their gold."""

    name: str
    recipe: str
    config: Path
    sets: list[str]
    store: Store
    scored: str  # step of the rewards
    gold: Gold

    def run(self, target: str, reporter: Reporter, *sets: str) -> Any:
        """Return the plan that ends with a step, after running it."""
        plan = plan_named(self.recipe, [self.config], [*self.sets, *sets, f"target={target}"])
        run(plan, self.store, LocalExecutor(), reporter)
        return plan


def demo_world(folder: Path) -> World:
    """Return the demo, at its own size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.files().items():
        (folder / name).write_bytes(content)
    config = Path(shutil.copyfile(OVERLAY, folder / OVERLAY.name))
    return World("demo", "rso", config, [], Store(folder / "store"), "reward", concierge)


def real_worlds(folder: Path, candidates: Path) -> list[World]:
    """Return real candidates with two rewards: a ridge regression, and the number of words.

    candidates: a Parquet file with columns prompt, response and p_beats_baseline.
    """
    rows = pq.read_table(candidates, columns=["prompt", "response", "p_beats_baseline"]).to_pylist()
    rows = [row for row in rows if row["response"].strip()]
    p = np.clip([row["p_beats_baseline"] for row in rows], 1e-6, 1 - 1e-6)
    golds = np.log(p) - np.log1p(-p)
    words = np.array([float(len(row["response"].split())) for row in rows])
    ridge = _fitted(rows, golds)
    folder.mkdir(parents=True, exist_ok=True)
    rewarded = [
        row | dict(ridge=float(a), words=float(b)) for row, a, b in zip(rows, ridge, np.log1p(words), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rewarded), folder / "candidates.parquet")
    scores = {f"{row['prompt']}\0{row['response']}": gold for row, gold in zip(rows, golds.tolist(), strict=True)}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "gold.py").write_text(GOLD_PROGRAM.format(file=str(folder / "scores.json")))
    columns = "corpus: ./candidates.parquet, columns: [prompt, response], vocabulary: 4096, context: 100000"
    config = folder / "real.yaml"
    config.write_text(
        f"sft: {{use: untrained, with: {{{columns}, hidden: 16, layers: 1, heads: 1}}}}\n"
        "own_candidates: {with: {path: ./candidates.parquet, max_tokens: 90000}}\n"
        "evaluate: {with: {gold: {name: python, file: ./gold.py, function: judged}}}\n"
    )

    def gold(prompt: str, response: str) -> float:
        return scores[f"{prompt}\0{response}"]

    store = Store(folder / "store")
    return [
        World(f"real candidates, reward {column}", "own_candidates", config, [f"own_candidates.reward={column}"], store,
              "own_candidates", gold)
        for column in ("ridge", "words")
    ]  # fmt: skip


def _fitted(rows: list[dict[str, Any]], golds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a reward for each row by a regression that was fitted to the other half of the prompts."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import Ridge

    texts = [row["response"] for row in rows]
    style = np.array([[np.log1p(len(text)), text.count("\n"), text.count("**"), text.count("\n- ")] for text in texts])
    style = (style - style.mean(axis=0)) / style.std(axis=0)
    words = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), alternate_sign=False).transform(texts)
    features = csr_matrix(hstack([3.0 * words, csr_matrix(style)]))
    number = {prompt: n for n, prompt in enumerate(sorted({row["prompt"] for row in rows}))}
    prompts = np.array([number[row["prompt"]] for row in rows])
    means = np.bincount(prompts, golds) / np.bincount(prompts)
    rewards = np.zeros(len(rows))
    for half in (0, 1):
        other = prompts % 2 != half
        model = Ridge(alpha=3.0).fit(features[other], (golds - means[prompts])[other])
        rewards[~other] = model.predict(features[~other])
    return rewards


def measure(world: World, reporter: Reporter) -> tuple[list[dict[str, Any]], Diagnosis]:
    """Return a row per rule, with most gold first, and the diagnosis."""
    world.run(world.scored, reporter)
    plan, gold = plan_with_gold(world.recipe, [world.config], world.sets)
    extra = [selection_rule.bind(rule) for rule, scale in RULES if scale == "raw"]
    found = make_diagnosis(read_cached(plan, world.store, gold, None, None), plan.name, extra)
    diagnosed = {row["rule"]: row for row in found.sections["rules"].rows}
    rows = []
    for rule, scale in RULES:
        selected = world.run("select", reporter, f"select.rule={json.dumps(rule)}", f"select.scale={scale}")
        label = label_of(selection_rule.bind(rule), reward_scale.bind(scale))
        names = ("gold", "gold low", "gold high", "predicted", "reward")
        kept = {"rule": label, "gold kept": _gold_kept(world, selected)}
        rows.append(kept | {name: diagnosed[label][name] for name in names})
    return sorted(rows, key=lambda row: -row["gold kept"]), found


def _gold_kept(world: World, plan: Any) -> float:
    """Return the mean over prompts of the weighted mean gold of what the plan's `select` kept."""
    steps = {step.name: step for step in plan.steps}
    scored = steps[world.scored]
    prompts, candidates = (
        world.store.folder(source_of(scored, schema)).read(schema) for schema in (PROMPTS, CANDIDATES)
    )
    texts = dict(zip(prompts["prompt_id"].to_pylist(), prompts["text"].to_pylist(), strict=True))
    responses = dict(zip(candidates["candidate_id"].to_pylist(), candidates["text"].to_pylist(), strict=True))
    sums: dict[str, list[float]] = {}
    for row in world.store.folder(steps["select"]).read(SELECTIONS).to_pylist():
        total = sums.setdefault(row["prompt_id"], [0.0, 0.0])
        total[0] += row["weight"] * world.gold(texts[row["prompt_id"]], responses[row["candidate_id"]])
        total[1] += row["weight"]
    return float(np.mean([gold / weight for gold, weight in sums.values()]))


def tau(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Return Kendall's tau between the order of the rules by a column and by the gold that they kept."""
    from scipy.stats import kendalltau

    return float(kendalltau([row[name] for row in rows], [row["gold kept"] for row in rows]).statistic)


def page(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page of the measurements by world."""
    tables = {}
    for name, rows in results.items():
        taus = ", ".join(f"{column} {tau(rows, column):.2f}" for column in ("gold", "predicted", "reward"))
        digits = [
            {key: value if isinstance(value, str) else f"{value:.2f}" for key, value in row.items()} for row in rows
        ]
        tables[f"{name}: Kendall's tau of {taus}"] = pa.Table.from_pylist(digits)
    return written("Which rule keeps more gold", facts(commit(), ["numpy", "scikit-learn"]), METHOD, tables)

"""A plugin with one function of each kind, named in a config: the command runs every one, from data to policy."""

import shutil

import pytest

from pipeline.plugins import unload_plugins
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store

PLUGIN = '''
from collections.abc import Iterator

import numpy as np

from stages.data.formats import PreferencePair, preference_reader
from stages.evaluation.evaluate import gold_reward
from stages.head.relu import ReluHead
from stages.head.train import head
from stages.ranking.base import Scorer
from stages.ranking.rankers import ranker, verifiable
from stages.selection.pair import Preference, pair_rule
from stages.selection.rules import Selection, selection_rule
from stages.selection.scales import reward_scale
from stages.training.mixing import mix
from stages.training.objectives import Batch, log_sigmoid, objective


@preference_reader(columns=("prompt", "chosen", "rejected"))
def my_reader(row):
    """Read a row whose sides are in columns, spaces removed."""
    return PreferencePair(row["prompt"], row["chosen"].strip(), row["rejected"].strip())


@verifiable(version=3)
def my_reward(prompt, response, *, word: str = "Gladly"):
    """Count a word, then prefer short responses."""
    return response.count(word) - len(response) / 1000


class Length(Scorer):
    def score(self, context, texts):
        return np.array([float(len(text)) for text in texts])


@ranker(reads_model=False)
def my_ranker(model):
    """Prefer the longer response."""
    return Length()


@reward_scale()
def my_scale(groups):
    """Return twice the reward."""
    return 2 * groups.values


@selection_rule()
def my_rule(groups, *, k: int = 4) -> Selection:
    """Keep the first k candidates of each prompt."""
    keep = groups.position < k
    return Selection(np.flatnonzero(keep), groups.position[keep])


@pair_rule(reads="selections")
def my_pairs(rows) -> Iterator[Preference]:
    """Pair the highest reward with each other one."""
    best, *rest = sorted(rows, key=lambda row: -row["reward"])
    for row in rest:
        yield Preference(best["candidate_id"], row["candidate_id"], best["reward"] - row["reward"])


@objective(reads=("ref", "length"), per="pairs", aliases=("mine",))
def my_objective(b: Batch, *, beta: float = 2.0):
    """DPO on log-ratios per token."""
    return -log_sigmoid(beta * b.margin(b.logratio / b.length))


@mix(uses_losses=True)
def my_mix(state, *, floor: float = 0.5):
    """Take the preference objective while its loss is the larger one, at least with this weight."""
    return 1.0 if state.preference_excess > state.imitation_excess else floor


@head()
def my_head(sides, progress, *, scale: float = 1.0):
    """Score by the difference of the mean features of both sides."""
    w = scale * (sides.chosen - sides.rejected).mean(0)
    return ReluHead(np.stack([w, -w]), np.zeros(2), np.array([1.0, -1.0])), {"norm": float(np.linalg.norm(w))}


@gold_reward()
def my_gold(prompt, response):
    """Prefer short responses."""
    return -float(len(response))
'''
SETS = {
    "rso": [
        "reward.by=my_reward",
        "select.rule={name: my_rule, k: 4}",
        "select.scale=my_scale",
        "pair.rule=my_pairs",
        "optimize.objective=mine",
        "judge.by=my_ranker",
    ],
    "mixture": ["optimize.mix={name: my_mix, floor: 0.25}", "judge.by=my_ranker"],
    "cvx_dpo": ["preference_head.head={name: my_head, scale: 2.0}", "judge.by=my_ranker"],
}
WITHOUT_RANKER = "reward: {from: {ranker: null}}\njudge: {from: {ranker: null}}\n"
PAIRS_OF_SELECTIONS = "pair: {from: {selections: select, comparisons: null}}\n"


@pytest.mark.parametrize("recipe", SETS)
def test_functions_of_a_plugin_run_from_data_to_leaderboard(recipe, data_dir, finished, winnow, tmp_path):
    """One each: reader, program, ranker, scale, selection rule, pair rule, objective, mix, head, gold reward."""
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    for file in data_dir.glob("*.jsonl"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "my_code.py").write_text(PLUGIN)
    config = "plugins: [./my_code.py]\n" + (data_dir / "demo.yaml").read_text().replace(
        "gold: concierge", "gold: my_gold"
    )
    (tmp_path / "my.yaml").write_text(config)
    own = WITHOUT_RANKER + (PAIRS_OF_SELECTIONS if recipe == "rso" else "")
    (tmp_path / f"my_{recipe}.yaml").write_text(f"extends: {recipe}\n{own}")
    sets = [*SETS[recipe], "preferences.reader=my_reader", "optimize.epochs=2"]
    try:
        words = [word for item in sets for word in ("--set", item)]
        code, text = winnow("run", f"my_{recipe}.yaml", "--config", "my.yaml", "--store", store, *words)
        assert code == 0, text
    finally:
        unload_plugins()
    (run,) = (name for name in Store(store).runs() if name.startswith("my_"))
    evaluations = query(open_catalog(Store(store), run), "SELECT metric, value FROM evaluations").to_pylist()
    assert {"gold_win", "proxy_win"} <= {row["metric"] for row in evaluations}

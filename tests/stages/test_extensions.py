"""A plugin with one function of each kind, named in a config: the command runs every one, from data to policy.

And what such functions must not do: the stage that calls one names it, its file and its line.
"""

import shutil

import pyarrow as pa
import pytest

from pipeline.plugins import load_source, unload_plugins
from pipeline.registry import Entry
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.fingerprints import DataPath
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import COMPARISONS, FEATURES, REWARDS
from stages.data.preferences import preferences
from stages.evaluation.evaluate import evaluate
from stages.head.train import preference_head
from stages.ranking.reward import reward
from stages.ranking.score import score
from stages.selection.pair import pair
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select
from tests.conftest import write_jsonl
from tests.material import bound, cache, context, imitate, random_rows, table, train
from tests.stages.test_stages import candidates_of, judged, pairs_of, prompts_of, selections_of

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
        code, text = winnow(
            "run", f"my_{recipe}.yaml", "--config", "my.yaml", "--plugin", "my_code.py", "--store", store, *words
        )
        assert code == 0, text
    finally:
        unload_plugins()
    (run,) = (name for name in Store(store).runs() if name.startswith("my_"))
    evaluations = query(open_catalog(Store(store), run), "SELECT metric, value FROM evaluations").to_pylist()
    assert {"gold_win", "proxy_win"} <= {row["metric"] for row in evaluations}


# Functions that fail, or return what cannot be used. Each is on line 2 to 4 of a file of its own, and returns RESULT.

IMPORTS = """import numpy as np; from stages.data.formats import *; from stages.evaluation.evaluate import *; \
from stages.head.train import *; from stages.ranking.base import *; from stages.ranking.rankers import *; \
from stages.ranking.score import *; from stages.selection.pair import *; from stages.selection.rules import *; \
from stages.selection.normalisers import *; from stages.selection.scales import *; \
from stages.training.mixing import *; from stages.training.objectives import *; from stages.head.relu import ReluHead
""".replace("\\\n", "")
FUNCTIONS = {
    "objective": '@objective(reads=("ref",), per="pairs")\ndef mine(b):\n    return RESULT\n',
    "mix": "@mix(uses_losses=False)\ndef mine(state):\n    return RESULT\n",
    "reward scale": "@reward_scale()\ndef mine(groups):\n    return RESULT\n",
    "selection rule": "@selection_rule()\ndef mine(groups):\n    return RESULT\n",
    "normaliser": "@normaliser(zero=True, pooled=False)\ndef mine(groups, beta):\n    return RESULT\n",
    "pair rule": '@pair_rule(reads="selections")\ndef mine(rows):\n    yield RESULT\n',
    "score method": "@score_method()\ndef mine(edges, logits):\n    return RESULT\n",
    "gold reward": "@gold_reward()\ndef mine(prompt, response):\n    return RESULT\n",
    "program": "@verifiable\ndef mine(prompt, response):\n    return RESULT\n",
    "ranker": "@ranker(reads_model=False)\ndef mine(model):\n    return RESULT\n",
    "scorer": "class Mine(Scorer):\n    def score(self, context, texts):\n        return RESULT\n"
    "\n@ranker(reads_model=False)\ndef mine(model):\n    return Mine()\n",
    "head": "@head()\ndef mine(pairs, progress):\n    return RESULT\n",
    "reader": '@preference_reader(columns=("prompt",))\ndef mine(row):\n    return RESULT\n',
}


@pytest.fixture
def plugin(tmp_path):
    """Return a function that loads one of FUNCTIONS with this result, and returns it without options."""

    def load(kind, result):
        unload_plugins()
        loaded = load_source(tmp_path / "mine.py", IMPORTS + FUNCTIONS[kind].replace("RESULT", result))
        ((registry, _),) = loaded.registered
        return registry.bind("mine")

    yield load
    unload_plugins()


@pytest.fixture(scope="module")
def scored(tiny):
    """Examples with a reference."""
    return table(cache(tiny, random_rows()))


@pytest.fixture
def run_stage(tiny, scored, tmp_path):
    """Return a function that runs the stage which calls a function of this kind, and returns the rejects."""
    counts = {"a": 2, "b": 3}
    rewards = [dict(prompt_id=p, candidate_id=f"{p}-{k}", reward=float(k)) for p, n in counts.items() for k in range(n)]
    rewards = pa.Table.from_pylist(rewards, schema=REWARDS)
    one_comparison = [dict(prompt_id="a", left_id="a-0", right_id="a-1", logit=1.0, round=0)]
    vectors = [dict(prompt_id="a", candidate_id=f"a-{k}", features=[float(k), 1.0]) for k in range(4)]
    vectors = pa.Table.from_pylist(vectors, schema=FEATURES)
    everything, raw = bound(selection_rule, "everything"), bound(reward_scale, "raw")
    file = DataPath(str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {n}."} for n in range(2)])))

    def run(kind, function):
        ctx = context()
        ranked = (prompts_of(counts), candidates_of(counts), ctx)
        if kind == "objective":
            train(tiny, scored, tmp_path / "optimize", objective=function)
        elif kind == "mix":
            inputs = {"demonstrations": table(imitate([row | {"pairs": []} for row in random_rows()], 0))}
            train(tiny, scored, tmp_path / "optimize", mix=function, inputs=inputs)
        elif kind == "reward scale":
            select(rewards, ctx, rule=everything, scale=function)
        elif kind == "selection rule":
            select(rewards, ctx, rule=function, scale=raw)
        elif kind == "normaliser":
            select(
                rewards, ctx, rule=bound(selection_rule, "softmax_weights", beta=1.0, normaliser=function), scale=raw
            )
        elif kind == "pair rule":
            pair(candidates_of(counts), ctx, selections_of({"a": [1, 2], "b": [1, 2, 3]}), rule=function)
        elif kind == "score method":
            score(pa.Table.from_pylist(one_comparison, schema=COMPARISONS), ctx, method=function)
        elif kind == "gold reward":
            evaluate(*judged({"a": [1.0]}), context(), gold=function, resamples=1)
        elif kind in ("program", "ranker", "scorer"):
            reward(*ranked, by=function)
        elif kind == "head":
            preference_head(prompts_of("a"), vectors, pairs_of([(0, 1), (2, 3)]), ctx, head=function)
        else:
            preferences(tiny, ctx, path=file, reader=function, heldout=0.0)
        return ctx.rejects.to_pylist()

    return run


def refusal(run_stage, kind, function):
    """Return the one line in which a stage refuses a function."""
    if kind == "reader":  # it refuses a row, and the step fails if all are
        reasons = {row["reason"] for row in run_stage(kind, function)}
        assert len(reasons) == 1
        return reasons.pop()
    with pytest.raises(WinnowError) as caught:
        run_stage(kind, function)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_a_function_raises_is_one_line_that_names_it(kind, plugin, run_stage, tmp_path):
    """KeyError is every mistake of the user's code; SystemExit would end the command without a word."""
    line = 1 + FUNCTIONS[kind][: FUNCTIONS[kind].index("RESULT")].count("\n") + 1
    name = {"program": "ranker", "scorer": "ranker"}.get(kind, kind)
    for result, cause in {'{}["x"]': "KeyError: 'x'", "exit(3)": "SystemExit: 3"}.items():
        text = refusal(run_stage, kind, plugin(kind, result))
        assert text == f"{name} mine of {tmp_path / 'mine.py'}, line {line}: {cause}"


def test_a_reader_rejects_rows_by_value_error_with_its_own_reason(plugin, run_stage):
    assert refusal(run_stage, "reader", plugin("reader", "int('x')")).startswith("invalid literal for int()")


@pytest.mark.parametrize("method", ["read(self, context, response)", "fits(self, context, first, second)"])
def test_a_ranker_rejects_responses_by_value_error_with_its_own_reason(monkeypatch, plugin, run_stage, method):
    """As `Ranker` promises of `read` and `fits`: a response is rejected, and the step goes on."""
    source = f"class Mine(Scorer):\n    def {method}:\n        raise ValueError('it shouts')\n"
    source += "    def score(self, context, texts):\n        return [0.0] * len(texts)\n"
    source += "\n@ranker(reads_model=False)\ndef mine(model):\n    return Mine()\n"
    monkeypatch.setitem(FUNCTIONS, "scorer", source)
    reasons = {row["reason"] for row in run_stage("scorer", plugin("scorer", ""))}
    assert reasons == {"the ranker cannot read it: it shouts"}


def test_a_refusal_of_a_ranker_ends_the_step_whatever_caused_it(monkeypatch, plugin, run_stage):
    """A WinnowError is no reason to reject a response, also if a ValueError is behind it."""
    source = "from schemas import WinnowError\nclass Mine(Scorer):\n    def read(self, context, response):\n"
    source += "        raise WinnowError('no server') from ValueError('url')\n"
    source += "    def score(self, context, texts):\n        return [0.0] * len(texts)\n"
    source += "\n@ranker(reads_model=False)\ndef mine(model):\n    return Mine()\n"
    monkeypatch.setitem(FUNCTIONS, "scorer", source)
    assert refusal(run_stage, "scorer", plugin("scorer", "")) == "no server"


def test_a_failure_of_ours_keeps_its_traceback(monkeypatch, run_stage):
    entry = selection_rule.entries["everything"]
    monkeypatch.setitem(selection_rule.entries, "everything", Entry("everything", lambda groups: {}["x"], {}, "rule"))
    with pytest.raises(KeyError):
        run_stage("selection rule", bound(selection_rule, "everything"))
    assert entry.plugin_file is None


H = "b.margin(b.logratio)"
GROUPS = "Selection(np.arange(5), groups.position"  # what `everything` selects, to be continued
FIRST = 'rows[0]["candidate_id"], rows[1]["candidate_id"]'
WRONG = {  # by kind: a result, and facts that the message holds
    "objective": [
        (f"{H}.mean()", ["one per pair", "shape []"]),
        (f"{H}[:, None]", ["one per pair", ", 1]"]),
        ("b.logp", ["one per pair"]),
        (f"{H}.detach()", ["with the gradient"]),
        (f"float({H}.sum())", ["a tensor"]),
        ("None", ["a tensor", "None"]),
        (f"{H}.long()", ["int64"]),
        (f"{H} * float('nan')", ["not finite where the policy is the reference", "correct the objective"]),
        (f"{H} * 0 + float('inf')", ["not finite where the policy is the reference"]),
        ("b.label * 1", ["line 4: TypeError"]),  # a field that it does not declare
    ],
    "mix": [(value, ["step 0", "from 0 to 1", value]) for value in ("2.0", "-1.0", "None", "'0.5'")]
    + [("float('nan')", ["from 0 to 1", "nan"])],
    "reward scale": [
        ("np.where(groups.values > 1, np.nan, groups.values)", ["finite", "nan"]),
        ("-groups.values", ["never fall", "[0.0, 1.0]"]),
        ("groups.values[:-1]", ["shape [5]", "[4]"]),
        ("groups.values.astype(str)", ["shape [5]"]),
        ("None", ["None"]),
    ],
    "selection rule": [
        ("None", ["a Selection", "None"]),
        (f"{GROUPS}, weight=np.full(5, np.nan))", ["`weight`", "nan"]),
        (f"{GROUPS}, weight=-1.0)", ["`weight`", "-1.0"]),
        (f"{GROUPS}, weight=np.ones(4))", ["`weight`", "[5]"]),
        (f"{GROUPS}[:-1])", ["`draw`"]),
        (f"{GROUPS}, beta=np.ones(5))", ["`beta`", "[2]"]),
        ("Selection(np.array([0.0]), np.array([0]))", ["`index`", "integers"]),
        ("Selection(np.array([5]), np.array([0]))", ["`index`", "below 5", "got 5"]),
        ("Selection(np.array([-1]), np.array([0]))", ["`index`", "-1"]),
        ("Selection(np.array([1, 1]), np.array([0, 1]))", ["`index`", "once"]),
        ("Selection(np.array([3, 0]), np.array([0, 0]))", ["prompt by prompt"]),
        ("replace(groups, values=groups.values * np.nan)", ["line 4"]),
    ],
    "normaliser": [("np.zeros(5)", ["[2]", "per prompt"]), ("None", ["None"])],
    "pair rule": [
        ("None", ["Preferences", "None"]),
        (FIRST, ["Preferences"]),
        (f"Preference({FIRST}, float('nan'))", ["gap", "nan"]),
        (f"Preference({FIRST}, -1)", ["gap", "-1"]),
        (f"Preference({FIRST}, '1')", ["gap", "'1'"]),
        (f"Preference({FIRST}, 1, float('nan'))", ["weight", "nan"]),
        (f"Preference({FIRST}, 1, -3)", ["weight", "-3"]),
        ("Preference('a-0', 'b-1', 1)", ["prompt's candidates", "b-1", "prompt a"]),
        ("Preference('a-0', 'nobody', 1)", ["prompt's candidates", "nobody", "prompt a"]),
    ],
    "score method": [("np.zeros(3)", ["[2]"]), ("np.array([np.nan, 0])", ["finite"]), ("None", ["None"])],
    "gold reward": [
        (value, ["prompt a", "a-0", shown, "finite number"])
        for value, shown in {"float('nan')": "nan", "float('inf')": "inf", "None": "None", "'1'": "'1'"}.items()
    ]
    + [("10**400", ["finite number", "1000"])],
    "program": [("None", ["number", "None"]), ("'1'", ["number", "'1'"])],
    "ranker": [("3", ["a Ranker", "3"])],
    "scorer": [("[0.0]", ["[2]", "[1]", "score"]), ("None", ["score", "None"])],
    "head": [
        ("None", ["ReluHead"]),
        ("(ReluHead(np.ones((1, 3)), np.ones(1), np.ones(1)), {})", ["`inner`", "[1, 2]"]),
        ("(ReluHead(np.ones((1, 2)), np.ones(1), np.array([np.nan])), {})", ["`outer`", "nan"]),
        ("(ReluHead(np.ones((1, 2)), np.ones(1), np.ones(1)), {'loss': None})", ["number", "None", "loss"]),
    ],
    "reader": [
        ("None", ["PreferencePair", "None"]),
        ("('p', 'c', 'r')", ["PreferencePair"]),
        ("PreferencePair(3, 'c', 'r')", ["prompt is not text"]),
        ("PreferencePair('p', None, 'r')", ["no chosen"]),
        ("PreferencePair('p', 'c', chr(0xd800))", ["rejected is not valid Unicode"]),
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_result_that_cannot_be_used_is_refused(kind, plugin, run_stage):
    """Shape, type, range, ids: what would be computed with, or end in a traceback of ours, is one line."""
    for result, facts in WRONG[kind]:
        text = refusal(run_stage, kind, plugin(kind, result))
        assert [fact for fact in facts if fact not in text] == [], (result, text)
        if kind != "reader":
            assert "mine of" in text


def test_an_objective_that_is_not_finite_later_is_named(plugin, scored, tiny, tmp_path):
    """Its log-probs are finite: neither the data nor the learning rate alone can be the cause."""
    objective = plugin("objective", f"{H} * float('nan')")
    with pytest.raises(WinnowError, match=r"step 0: .*objective mine of .*mine\.py, line 2 of finite log-probs is nan"):
        train(tiny, scored, tmp_path / "optimize", objective=objective, reference="other")


def test_the_same_pair_again_is_rejected(plugin, run_stage):
    """Twice in the data is twice the weight in the loss."""
    rows = run_stage("pair rule", plugin("pair rule", f"from [Preference({FIRST}, 1.0)] * 2"))
    assert [(row["reason"], row["prompt_id"]) for row in rows] == [("the same pair again", name) for name in "ab"]

"""Names of runs: what has finished keeps its name, an edit makes another run beside it."""

import shutil
from pathlib import Path

import pytest

from jobs.commands.app import parsed_tags
from jobs.recipes import plans
from jobs.sweeps import plan_sweep
from pipeline.config.recipe import default_run_name
from pipeline.store.store import Store
from schemas import WinnowError

OTHER = "evaluate: {with: {seed: 5}}\n"


@pytest.fixture
def words(data_dir: Path, finished: Path, tmp_path: Path) -> list[str]:
    """`rso` on a store where all of it has finished."""
    store = shutil.copytree(finished, tmp_path / "store")
    return ["rso", "--config", str(data_dir / "demo.yaml"), "--store", str(store)]


def test_an_edited_config_makes_another_run_beside_the_first(winnow, words: list[str], tmp_path: Path):
    """The first keeps its results and its row; each of the two is found again under its own name."""
    store, other = Store(tmp_path / "store"), tmp_path / "other.yaml"
    other.write_text(OTHER)
    assert winnow("run", *words)[0] == 0
    first = store.run("rso")
    code, text = winnow("plan", *words, "--config", other)
    assert (code, "rso-2: rso stands for" in text, "seed: 0 -> 5" in text) == (0, True, True), text
    code, text = winnow("run", *words, "--config", other)
    assert (code, "rso-2" in text) == (0, True)
    assert store.run("rso") == first != store.run("rso-2")
    for config in ([], ["--config", other]):  # each once more
        assert winnow("run", *words, *config)[0] == 0
    assert sorted(store.runs()) == ["rso", "rso-2", "run"]
    rows = winnow("sql", "leaderboard", "--store", tmp_path / "store", "--format", "csv")[1].splitlines()
    assert {row.partition(",")[0] for row in rows[1:]} >= {"rso", "rso-2"}


def test_a_result_adopted_under_an_edited_config_leaves_the_first_run_its_name(
    winnow, words: list[str], tmp_path: Path
):
    """The run that goes on from it has the name that the adoption gave."""
    store, other = Store(tmp_path / "store"), tmp_path / "other.yaml"
    other.write_text(OTHER)
    assert winnow("run", *words)[0] == 0
    first = store.run("rso")
    folder = store.at("evaluate", first["evaluate"]["key"]).path
    code, text = winnow("adopt", "rso", "evaluate", folder, *words[1:], "--config", other)
    assert (code, "rso-2: rso stands for" in text, store.run("rso") == first) == (0, True, True), text
    second = store.run("rso-2")
    assert winnow("run", *words, "--config", other)[0] == 0
    assert (store.run("rso"), store.run("rso-2")) == (first, second)


def test_a_run_that_has_not_reached_its_target_gives_up_its_name(winnow, words: list[str], tmp_path: Path):
    store, other = Store(tmp_path / "store"), tmp_path / "other.yaml"
    other.write_text(OTHER)
    assert winnow("run", *words, "--config", other, "--until", "judge")[0] == 0
    unfinished = store.run("rso")
    assert winnow("run", *words)[0] == 0
    assert sorted(store.runs()) == ["rso", "run"]
    assert store.run("rso") != unfinished


JUDGES = "judges: {words: {ranker: {use: brevity, with: {words: 9}}}}\n"


def test_a_run_of_which_a_judge_failed_gives_up_its_name_to_the_same_evaluation(
    winnow, words: list[str], tmp_path: Path
):
    """Both would have the same figures on the leaderboard; to another evaluation it does not, which would lose them."""
    store, judged, other = Store(tmp_path / "store"), tmp_path / "judged.yaml", tmp_path / "other.yaml"
    judged.write_text(JUDGES)
    other.write_text(OTHER)
    assert winnow("run", *words, "--config", judged)[0] == 0
    shutil.rmtree(tmp_path / "store" / "judge" / store.run("rso")["judge_by_words"]["key"])
    code, text = winnow("plan", *words, "--config", other)
    assert (code, "rso-2: rso stands for" in text) == (0, True), text
    assert winnow("run", *words)[0] == 0
    assert sorted(store.runs()) == ["rso", "run"]
    assert "judge_by_words" not in store.run("rso")


def test_one_evaluation_under_two_names_is_said_to_be_one(winnow, words: list[str], tmp_path: Path):
    """Without the judges of a finished run, which keep their rows: where the name is chosen, and on the leaderboard."""
    (tmp_path / "judged.yaml").write_text(JUDGES)
    assert winnow("run", *words, "--config", tmp_path / "judged.yaml")[0] == 0
    code, text = winnow("run", *words)
    assert (code, "rso-2: rso has the same evaluate and other results beside it" in text) == (0, True), text
    line = "one evaluation under several names, whose figures are the same: rso, rso-2, run"
    code, text = winnow("leaderboard", "--store", tmp_path / "store")
    assert (code, line in text) == (0, True), text


def test_a_run_that_ended_before_what_could_not_be_run_goes_on_under_its_name(winnow, words: list[str], tmp_path: Path):
    """Its plan ended with the step of --until; with the mistake mended, the steps behind it are added."""
    store, mistaken = Store(tmp_path / "store"), tmp_path / "mistaken.yaml"
    mistaken.write_text("eval_sample: {with: {max_tokens: 100000}}\n")
    assert winnow("run", *words, "--config", mistaken, "--until", "optimize")[0] == 0
    assert not [step for step in store.run("rso") if step.startswith("eval")]
    assert winnow("run", *words)[0] == 0
    assert sorted(store.runs()) == ["rso", "run"]
    assert store.run("rso") == store.run("run")


def test_a_name_of_ones_own(winnow, words: list[str], tmp_path: Path):
    assert winnow("run", *words, "--name", "baseline")[0] == 0
    assert "baseline" in Store(tmp_path / "store").runs()
    code, text = winnow("run", "rso", "dpo", *words[1:], "--name", "x")
    assert (code, "--name 'x'" in text) == (2, True)


@pytest.mark.parametrize(
    "name", ["raft@1", "a@", ".", "..", ".rso", "-x", "a\nb", "a\x1b[31m", "a/b", "", " ", "x" * 200]
)
def test_a_name_that_a_round_a_file_or_an_option_could_have_is_refused(name: str, data_dir: Path):
    """`raft@1` would stand in the place of what round 1 of raft trained; a slash would make a folder."""
    with pytest.raises(WinnowError, match=r"--name .*give another"):
        plans(["rso"], [data_dir / "demo.yaml"], [], name)
    with pytest.raises(WinnowError, match="--tag"):
        parsed_tags([name])


def test_the_file_of_a_recipe_that_would_give_a_run_the_name_of_a_round_is_refused(data_dir: Path, tmp_path: Path):
    (tmp_path / "raft@1.yaml").write_text("extends: rso\n")
    with pytest.raises(WinnowError, match=r"raft@1\.yaml: its name.*--name"):
        plans([str(tmp_path / "raft@1.yaml")], [data_dir / "demo.yaml"], [])
    assert plans([str(tmp_path / "raft@1.yaml")], [data_dir / "demo.yaml"], [], "mine")[0].name == "mine"


def test_a_line_break_of_an_option_is_none_in_the_name_of_its_run():
    name = default_run_name(Path("rso.yaml"), ['reward.by.regex="a\nb"'])
    assert name.isprintable()


SERVED = "sample.engine={name: endpoint, url: 'http://one/v1', model: sft}"


@pytest.mark.filterwarnings("ignore:.*engine endpoint, and its policy")
@pytest.mark.parametrize(
    ("sets", "execution"),
    [
        ([], "optimize.tokens_per_pass=64"),
        (["sample.engine=vllm"], "sample.engine_options.max_num_seqs=8"),
        ([SERVED], "sample.engine.url=http://two/v1"),
    ],
)
def test_what_does_not_change_a_result_makes_no_other_run(sets: list[str], execution: str, data_dir: Path):
    """An option of execution is not in the name, and the keys are the same; also one of a function or of a mapping."""
    config = [data_dir / "demo.yaml"]
    (plain,), (fast,) = plans(["rso"], config, sets), plans(["rso"], config, [*sets, execution])
    assert (fast.name, [step.key for step in fast.steps]) == (plain.name, [step.key for step in plain.steps])


@pytest.mark.parametrize("text", ["select.rule.beta=0.5", "shards=8"])
def test_a_value_that_is_set_already_makes_no_other_run(text: str, data_dir: Path):
    """One that the config or the recipe has, or that is no part of a result; another value is in the name."""
    config = [data_dir / "demo.yaml"]
    (same,) = plans(["rso"], config, ["sample.n=5", text])
    (plain,) = plans(["rso"], config, ["sample.n=5"])
    assert (same.name, [step.key for step in same.steps]) == ("rso[n=5]", [step.key for step in plain.steps])


def test_of_an_option_that_is_set_twice_the_value_that_counts_is_in_the_name(data_dir: Path):
    (plan,) = plans(["rso"], [data_dir / "demo.yaml"], ["select.rule.beta=0.2", "select.rule.beta=0.3"])
    assert plan.name == "rso[rule.beta=0.3]"


@pytest.mark.parametrize(
    ("recipe", "option", "label"),
    [
        ("rso", "select.rule.beta=0.1", "rule.beta=0.1"),
        ("rso", "optimize.objective.beta=0.1", "objective.beta=0.1"),
        ("raft", "select.rule.k=2", "k=2"),
        ("dpo", "optimize.objective.beta=0.2", "beta=0.2"),  # whose plan has no step `select`
        ("rso", "optimize.seed=1", "seed=1"),  # which the recipe sets of its evaluation alone
        ("rso", "sample.n=6", "n=6"),
        ("rso", "eval_sample.n=6", "eval_sample.n=6"),
        ("rso", "sft.learning_rate=1e-5", "sft.learning_rate=1e-5"),
    ],
)
def test_a_name_tells_the_option_from_those_of_the_recipe_that_end_alike(recipe, option, label, data_dir: Path):
    """Else two options of one value would give one name to two runs; of the evaluation's options, the step is named."""
    (plan,) = plans([recipe], [data_dir / "demo.yaml"], [option])
    assert plan.name == f"{recipe}[{label}]"
    sweep = plan_sweep([recipe], [data_dir / "demo.yaml"], [], [option])
    assert [plan.name for plan in sweep.plans] == [f"{recipe} {label}"]


def test_names_of_sweeps_are_short():
    """The last part of an option's path, in full where two end alike; what no file can be called is hashed."""
    name = default_run_name(Path("rso.yaml"), ["select.rule.beta=0.1", "sample.n=16"])
    assert name == "rso[beta=0.1,n=16]"
    name = default_run_name(Path("rso.yaml"), ["select.seed=1", "sample.seed=2"])
    assert name == "rso[select.seed=1,sample.seed=2]"
    long = [default_run_name(Path("rso.yaml"), [f"prompts.path=/{'x' * 200}{end}"]) for end in "ab"]
    assert long[0] != long[1]
    assert max(len(name.encode()) for name in long) < 200
    assert "/" not in long[0]


def test_tags_are_kept_shown_and_chosen_by(winnow, words: list[str], tmp_path: Path):
    """In `ls`, in SQL and on the report; a later command adds to them, and none is part of a key."""
    at = ["--store", str(tmp_path / "store")]
    keys = Store(tmp_path / "store").run("run")
    assert winnow("run", *words, "--tag", "baseline", "--tag", "team=search")[0] == 0
    assert winnow("run", *words, "--tag", "team=answers")[0] == 0
    assert Store(tmp_path / "store").tags() == {"rso": {"baseline": "", "team": "answers"}}
    assert Store(tmp_path / "store").run("rso") == keys
    for chosen in ("baseline", "team", "team=answers"):
        code, text = winnow("ls", *at, "--tag", chosen)
        assert (code, "baseline, team=answers" in text, "rso" in text) == (0, True, True)
        assert not any(line.split("│")[1].strip() == "run" for line in text.splitlines() if line.startswith("│"))
    code, text = winnow("ls", *at, "--tag", "team=search")
    assert (code, "team=answers" in text) == (2, True)
    sql = "SELECT DISTINCT run, tags['team'] AS team, tags['other'] AS other FROM runs WHERE tags['baseline'] = ''"
    assert winnow("sql", sql, *at, "--format", "csv")[1].split() == ["run,team,other", "rso,answers,"]
    assert winnow("report", *at, "--out", tmp_path / "page.html")[0] == 0
    assert "rso (baseline, team=answers)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("tags", [["=x"], ["team=a", "team=b"], [" "]])
def test_a_tag_that_says_nothing_or_two_things_is_refused(winnow, words: list[str], tags: list[str]):
    code, text = winnow("run", *words, *(word for tag in tags for word in ("--tag", tag)))
    assert (code, f"--tag {tags[-1]}" in text) == (2, True)


def test_a_forgotten_run_leaves_no_tags(winnow, words: list[str], tmp_path: Path):
    assert winnow("run", *words, "--tag", "baseline")[0] == 0
    assert winnow("gc", "--forget", "rso", "--yes", "--store", tmp_path / "store")[0] == 0
    assert Store(tmp_path / "store").tags() == {}


@pytest.mark.parametrize(("visible", "is_said"), [("0,1,2,3", True), ("1", False), ("", False)])
def test_a_run_in_this_process_says_that_other_gpus_are_idle(
    winnow, words: list[str], monkeypatch: pytest.MonkeyPatch, visible: str, is_said: bool
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, text = winnow("run", *words)
    assert (code, "of 4 GPUs, this process computes on one; `--executor ray`" in text) == (0, is_said), text

"""What was made elsewhere becomes a step's sealed result: all is checked before anything is written."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.adopt import adopt
from jobs.tables import status
from jobs.why import why
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.store.fingerprints import model_digest
from pipeline.store.gc import garbage
from pipeline.store.store import Store
from schemas import Model, WinnowError, prompt_id, shard_of
from schemas.tables import CANDIDATES, PROMPTS, REWARDS
from tests.chain import SHARDS, Luck, candidate, make, planned, recipe, step, toys
from tests.pipeline.execution.test_run import digests
from tests.pipeline.store.test_store import toy_stages
from tests.runs import local, plan_of


@pytest.fixture
def luck() -> Iterator[Luck]:
    with toys() as luck:
        yield luck


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(tmp_path: Path, luck: Luck) -> Plan:
    return planned(recipe(tmp_path))


def rows(n: int = 12, **changes: object) -> list[dict]:
    """Rewards as another system might have made them: without the columns that may be null."""
    return [dict(prompt_id=prompt_id(f"prompt {k}"), candidate_id=f"c{k}", reward=7.0 + k) | changes for k in range(n)]


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, None if rows else REWARDS), path)
    return path


def nothing_of(store: Store, plan: Plan, name: str) -> bool:
    return not local(store.folder(step(plan, name)).path).exists()


def test_a_file_becomes_the_step_and_what_follows_is_made_of_it(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """Rows are dealt to shards by prompt; the run goes on from them; plan, why and gc know where they are from."""
    make(planned(recipe(tmp_path), "target=draw"), store)
    made, manifest = adopt(plan, "rate", str(parquet(tmp_path / "ours.parquet", rows())), store)
    folder = store.folder(made)
    for shard in range(SHARDS):
        own = folder.read(REWARDS, shard)["prompt_id"].to_pylist()
        assert {shard_of(name, SHARDS) for name in own} <= {shard}
    assert sorted(folder.read(REWARDS)["reward"].to_pylist()) == [7.0 + n for n in range(12)]
    assert manifest["identity"] == made.identity
    assert manifest["adopted"]["from"] == "ours.parquet"
    assert str(tmp_path) not in json.dumps(manifest)
    assert "adopted from ours.parquet" in status(made, plan.name, store)
    assert [item.path for item in garbage(store).garbage] == []
    luck.calls.clear()
    assert make(plan, store) == ["keep"]
    assert why(store, "toy", "toy")[1:] == ["toy: rate is adopted from ours.parquet"] * 2


def test_a_folder_of_files_of_every_table(tmp_path: Path, store: Store, plan: Plan):
    """Several files of a table; another table's, whose name begins alike, is not taken for one."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    names = [prompt_id(str(n)) for n in range(5)]
    prompts = [dict(prompt_id=name, text="p", token_ids=[n], split="train") for n, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(prompts[:2], PROMPTS), folder / "prompts-00000.parquet")
    pq.write_table(pa.Table.from_pylist(prompts[2:], PROMPTS), folder / "prompts-00001.parquet")
    drawn = [candidate(name, n) for n, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(drawn, CANDIDATES), folder / "candidates.parquet")
    parquet(folder / "promptsof.parquet", [{"x": 1}])
    _, manifest = adopt(plan, "draw", str(folder), store)
    assert manifest["rows"] == {"prompts": 5, "candidates": 5, "rejects": 0}
    (folder / "candidates.parquet").unlink()
    with pytest.raises(WinnowError, match=r"lacks candidates \(files as candidates\.parquet"):
        adopt(planned(recipe(tmp_path), "draw.rows=3"), "draw", str(folder), store)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (rows()[:1] * 2 + rows()[2:], r"1 rows of rewards have a candidate_id that another row has"),
        (rows()[:11] + rows(13)[12:], r"1 of 12 rows of rewards have a prompt_id .* not among those of draw"),
        ([*rows(11), rows(12)[11] | {"candidate_id": "cx"}], r"1 of 12 rows .* candidate_id .* draw, such as cx"),
        ([*rows(11), rows(12)[11] | {"reward": math.nan}], r"1 rows of rewards\.reward are no finite number"),
        ([*rows(11), rows(12)[11] | {"reward": math.inf}], r"1 rows of rewards\.reward are no finite number"),
        ([*rows(11), rows(12)[11] | {"reward": None}], r"column 'reward' has 1 nulls"),
        (rows(12, reward="high"), r"column 'reward' is string, must be double"),
        (rows(12, score=1.0), r"unknown column 'score'"),
        (rows(0), r"rate: every row of rewards was left out"),
        ([{"prompt_id": "x"}], r"column 'candidate_id' is missing"),
    ],
    ids=["twice", "foreign prompt", "foreign candidate", "nan", "inf", "null", "type", "column", "empty", "missing"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, store: Store, plan: Plan, changed: list[dict], said: str
):
    make(planned(recipe(tmp_path), "target=draw"), store)
    with pytest.raises(WinnowError, match=said):
        adopt(plan, "rate", str(parquet(tmp_path / "wrong.parquet", changed)), store)
    assert nothing_of(store, plan, "rate")
    assert "toy" not in store.runs()


def test_a_step_whose_inputs_are_not_sealed_can_be_adopted(tmp_path: Path, store: Store, plan: Plan):
    """Nothing to check its ids against: what it was made of may lie elsewhere."""
    assert adopt(plan, "rate", str(parquet(tmp_path / "ours.parquet", rows())), store)[1]["rows"]["rewards"] == 12


def test_what_is_there_already_stays(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """Sealed, half made by a run, or at work; what an adoption left when it was cut short is taken up."""
    file = str(parquet(tmp_path / "ours.parquet", rows()))
    folder = store.folder(step(plan, "rate"))
    claim = folder.claim()
    assert claim
    with pytest.raises(WinnowError, match="another run is making it"):
        adopt(plan, "rate", file, store)
    claim.release()
    _, manifest = adopt(plan, "rate", file, store)
    folder.manifest_path.unlink()
    assert adopt(plan, "rate", file, store)[1]["files"] == manifest["files"]
    with pytest.raises(WinnowError, match="sealed already"):
        adopt(plan, "rate", file, store)
    shutil.rmtree(local(folder.path))
    make(planned(recipe(tmp_path), "target=rate"), store)
    folder.manifest_path.unlink()
    (local(folder.path) / "part-00001.json").unlink()
    with pytest.raises(WinnowError, match=r"2 of 3 parts are made already; winnow run --only rate"):
        adopt(plan, "rate", file, store)


def test_a_step_of_another_store_keeps_its_identity(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """Made with another option, and in other parts: the rows are the same, and the manifest says what they were."""
    elsewhere = Store(tmp_path / "elsewhere")
    old = planned(recipe(tmp_path, "old", rate="with: {scale: 2.0}"))
    make(old, elsewhere)
    source = elsewhere.folder(step(old, "rate"))
    _, manifest = adopt(plan, "rate", str(source.path), store)
    assert manifest["adopted"]["identity"] == step(old, "rate").identity
    assert manifest["adopted"]["from"] == f"toy_rate/{step(old, 'rate').key}"
    assert [file["sha256"] for file in manifest["files"]] == [file["sha256"] for file in source.manifest["files"]]
    file = recipe(tmp_path, "five")
    file.write_text(file.read_text().replace("shards: 3", "shards: 5"))
    five = planned(file)
    adopt(five, "rate", str(source.path), store)
    both = [store.folder(step(each, "rate")).read(REWARDS).sort_by("candidate_id") for each in (plan, five)]
    assert both[0].equals(both[1])
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(WinnowError, match="none of a step's"):
        adopt(plan, "keep", str(tmp_path), store)
    with pytest.raises(WinnowError, match="toy_rate made no selections"):
        adopt(plan, "keep", str(source.path), store)
    source.manifest_path.unlink()
    with pytest.raises(WinnowError, match="a step that is not sealed"):
        adopt(planned(recipe(tmp_path), "rate.scale=3.0"), "rate", str(source.path), store)


def test_a_model_folder(tmp_path: Path, store: Store, tiny: Model):
    """Its files are copied, its digest is theirs; a folder that is none is told by what it lacks."""
    with toy_stages():
        plan = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model"}}))
        shutil.copytree(tiny.folder, tmp_path / "model")
        (tmp_path / "model" / "optimizer.pt").write_bytes(b"x")
        made, manifest = adopt(plan, "m", str(tmp_path / "model"), store)
        model = store.folder(made).model()
        assert manifest["model"] == model.digest == model_digest(model.folder) == tiny.digest
        assert not (model.folder / "optimizer.pt").exists()
        (tmp_path / "model" / "config.json").unlink()
        again = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model", "with": {"size": 9}}}))
        with pytest.raises(WinnowError, match=r"adopt m: .*has no"):
            adopt(again, "m", str(tmp_path / "model"), store)


def test_every_step_of_a_real_run_can_be_adopted(world: Path, finished: Path, tmp_path: Path):
    """Of RSO on the tiny world: the same bytes under the same keys, and nothing that no check of ours takes."""
    plan, old, new = plan_of(world), Store(finished), Store(tmp_path / "new")
    for each in plan.steps:
        adopt(plan, each.name, str(old.folder(each).path), new)
    assert digests(plan, new) == digests(plan, old)
    for each in plan.steps:
        assert new.folder(each).manifest["model"] == old.folder(each).manifest["model"]


def test_the_command(winnow, tmp_path: Path, luck: Luck):
    """A stage whose results did not change got an option: its old result is taken, and told to be what it was."""
    file = recipe(tmp_path)
    assert winnow("run", file)[0] == 0
    old = next(Path("store/toy_rate").iterdir())
    code, said = winnow("adopt", file, "rate", old, "--set", "rate.scale=1.5")
    assert code == 0
    assert "adopted rate" in said
    assert "though it was made with options.scale: 1.0 -> 1.5" in said
    assert "adopted from toy_rate/" in winnow("plan", file, "--set", "rate.scale=1.5")[1]
    assert f"toy_rate/{old.name}" in winnow("ls", "toy[rate.scale=1.5]")[1]
    code, said = winnow("adopt", file, "rat", old)
    assert (code, "did you mean 'rate'" in said) == (2, True)
    code, said = winnow("adopt", file, "keep", "nowhere")
    assert (code, "sealed already" in said) == (2, True)
    code, said = winnow("adopt", file, "keep", "nowhere", "--set", "keep.above=9.0")
    assert (code, "no such file or folder" in said) == (2, True)

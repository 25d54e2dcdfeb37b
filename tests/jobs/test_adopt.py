"""Files from elsewhere become the finished result of a step: everything is checked before anything is written."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.adopt import adopt_artifact
from jobs.tables import step_status
from jobs.why import explain_difference
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.sql.catalog import open_catalog
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
    """Return rewards as another system might write them: without the columns that may be null."""
    return [dict(prompt_id=prompt_id(f"prompt {k}"), candidate_id=f"c{k}", reward=7.0 + k) | changes for k in range(n)]


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, None if rows else REWARDS), path)
    return path


def has_folder(store: Store, plan: Plan, name: str) -> bool:
    return local(store.folder(step(plan, name)).path).exists()


def test_a_file_becomes_the_step_and_later_steps_read_it(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """Rows are dealt to shards by prompt; the run continues from them; plan, why and gc know where they came from."""
    make(planned(recipe(tmp_path), "target=draw"), store)
    adopted, manifest = adopt_artifact(plan, "rate", str(parquet(tmp_path / "ours.parquet", rows())), store)
    folder = store.folder(adopted)
    for shard in range(SHARDS):
        ids = folder.read(REWARDS, shard)["prompt_id"].to_pylist()
        assert {shard_of(name, SHARDS) for name in ids} <= {shard}
    assert sorted(folder.read(REWARDS)["reward"].to_pylist()) == [7.0 + n for n in range(12)]
    assert manifest["identity"] == adopted.identity
    assert manifest["adopted"]["from"] == "ours.parquet"
    assert str(tmp_path) not in json.dumps(manifest)
    assert "adopted from ours.parquet" in step_status(adopted, plan.name, store)
    assert [item.path for item in garbage(store).garbage] == []
    luck.calls.clear()
    assert make(plan, store) == ["keep"]
    assert explain_difference(store, "toy", "toy")[1:] == ["toy: rate is adopted from ours.parquet"] * 2


def test_a_folder_of_files_of_every_table(tmp_path: Path, store: Store, plan: Plan):
    """Several files of a table; a file of another table, whose name begins in the same way, is not one of them."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    names = [prompt_id(str(n)) for n in range(5)]
    prompts = [dict(prompt_id=name, text="p", token_ids=[n], split="train") for n, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(prompts[:2], PROMPTS), folder / "prompts-00000.parquet")
    pq.write_table(pa.Table.from_pylist(prompts[2:], PROMPTS), folder / "prompts-00001.parquet")
    candidates = [candidate(name, n) for n, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(candidates, CANDIDATES), folder / "candidates.parquet")
    parquet(folder / "promptsof.parquet", [{"x": 1}])
    _, manifest = adopt_artifact(plan, "draw", str(folder), store)
    assert manifest["rows"] == {"prompts": 5, "candidates": 5, "rejects": 0}
    (folder / "candidates.parquet").unlink()
    with pytest.raises(WinnowError, match=r"lacks candidates \(files like candidates\.parquet"):
        adopt_artifact(planned(recipe(tmp_path), "draw.rows=3"), "draw", str(folder), store)


MISTAKES = [
    (rows()[:1] * 2 + rows()[2:], r"1 rows of rewards have a candidate_id that another row has"),
    (rows()[:11] + rows(13)[12:], r"1 of 12 rows of rewards have a prompt_id .* not among those of draw"),
    ([*rows(11), rows(12)[11] | {"candidate_id": "cx"}], r"1 of 12 rows .* candidate_id .* draw, such as cx"),
    ([*rows(11), rows(12)[11] | {"reward": math.nan}], r"1 values of rewards\.reward are not finite"),
    ([*rows(11), rows(12)[11] | {"reward": math.inf}], r"1 values of rewards\.reward are not finite"),
    ([*rows(11), rows(12)[11] | {"reward": None}], r"column 'reward' has 1 nulls"),
    (rows(12, reward="high"), r"column 'reward' is string, must be double"),
    (rows(12, score=1.0), r"unknown column 'score'"),
    (rows(0), r"rate: .*rewards"),
    ([{"prompt_id": "x"}], r"column 'candidate_id' is missing"),
]


def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, store: Store, plan: Plan):
    """Duplicate and unknown ids, numbers that are not finite, wrong types and columns, no rows at all."""
    make(planned(recipe(tmp_path), "target=draw"), store)
    for wrong, match in MISTAKES:
        with pytest.raises(WinnowError, match=match):
            adopt_artifact(plan, "rate", str(parquet(tmp_path / "wrong.parquet", wrong)), store)
        assert not has_folder(store, plan, "rate")
    assert "toy" not in store.runs()


def test_a_step_whose_inputs_are_not_finished_can_be_adopted(tmp_path: Path, store: Store, plan: Plan):
    """There is nothing to check its ids against: its inputs may be elsewhere."""
    assert (
        adopt_artifact(plan, "rate", str(parquet(tmp_path / "ours.parquet", rows())), store)[1]["rows"]["rewards"] == 12
    )


def large(table: pa.Table) -> pa.Table:
    """Return a table as polars hands it on: text as views, lists with offsets of 64 bits."""
    kinds = {pa.string(): pa.string_view(), pa.list_(pa.int32()): pa.large_list(pa.int64())}
    kinds[pa.map_(pa.string(), pa.float64())] = pa.map_(pa.string_view(), pa.float64())
    fields = [pa.field(field.name, kinds.get(field.type, field.type)) for field in table.schema]
    return table.cast(pa.schema(fields))


def test_rows_of_sql_are_adopted_as_they_are(tmp_path: Path, store: Store, plan: Plan):
    """With the columns stage and key, in other types, and from pandas with its index; rows of two steps are refused."""
    make(plan, store)
    rewards = open_catalog(store).sql("SELECT * FROM rewards ORDER BY candidate_id")
    frame = rewards.pandas().sample(frac=1, random_state=0)
    frame["prompt_id"] = frame["prompt_id"].astype("category")
    files = {name: tmp_path / f"{name}.parquet" for name in ("arrow", "large", "pandas")}
    pq.write_table(rewards.arrow(), files["arrow"])
    pq.write_table(large(rewards.arrow()), files["large"])
    frame.to_parquet(files["pandas"])
    types = {str(kind) for name in ("large", "pandas") for kind in pq.read_schema(files[name]).types}
    assert types >= {"string_view", "large_string", "dictionary<values=string, indices=int8, ordered=0>"}
    assert "__index_level_0__" in pq.read_schema(files["pandas"]).names
    before = store.folder(step(plan, "rate")).read(REWARDS).sort_by("candidate_id")
    for n, file in enumerate(files.values()):
        other = Store(tmp_path / f"store{n}")
        adopted, _ = adopt_artifact(plan, "rate", str(file), other)
        assert other.folder(adopted).read(REWARDS).sort_by("candidate_id").equals(before)
    other = rewards.arrow().set_column(rewards.columns.index("key"), "key", pa.array(list("ab") * 6))
    pq.write_table(other, tmp_path / "two.parquet")
    with pytest.raises(WinnowError, match=r"two\.parquet: has rows of several steps; .* WHERE key = 'a'"):
        adopt_artifact(plan, "rate", str(tmp_path / "two.parquet"), Store(tmp_path / "new"))


def test_numbers_inside_lists_and_maps_are_checked(tmp_path: Path, store: Store, plan: Plan):
    """NaN in a map of rewards; a token id that is null in a list."""
    components = pa.array([[("a", math.nan)], [("a", 1.0)], *[None] * 10], REWARDS.field("components").type)
    pq.write_table(pa.Table.from_pylist(rows()).append_column("components", components), tmp_path / "nan.parquet")
    with pytest.raises(WinnowError, match=r"1 values of rewards\.components are not finite"):
        adopt_artifact(plan, "rate", str(tmp_path / "nan.parquet"), store)
    name = prompt_id("a")
    prompts = [dict(prompt_id=name, text="p", token_ids=[1, None], split="train")]
    (tmp_path / "draw").mkdir()
    pq.write_table(pa.Table.from_pylist(prompts, PROMPTS), tmp_path / "draw" / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist([candidate(name, 0)], CANDIDATES), tmp_path / "draw" / "candidates.parquet")
    with pytest.raises(WinnowError, match=r"1 values in lists of prompts\.token_ids are null"):
        adopt_artifact(plan, "draw", str(tmp_path / "draw"), store)


def test_existing_results_are_kept(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck, monkeypatch: pytest.MonkeyPatch
):
    """Finished, half computed by a run, or running; the remains of an interrupted adoption are replaced."""
    monkeypatch.setattr("pipeline.store.store.SMALL_TABLE", 0)  # a part keeps its sidecar
    file = str(parquet(tmp_path / "ours.parquet", rows()))
    folder = store.folder(step(plan, "rate"))
    claim = folder.try_lock()
    assert claim
    with pytest.raises(WinnowError, match="another run is computing it"):
        adopt_artifact(plan, "rate", file, store)
    claim.release()
    _, manifest = adopt_artifact(plan, "rate", file, store)
    folder.manifest_path.unlink()
    assert adopt_artifact(plan, "rate", file, store)[1]["files"] == manifest["files"]
    with pytest.raises(WinnowError, match="finished already"):
        adopt_artifact(plan, "rate", file, store)
    shutil.rmtree(local(folder.path))
    make(planned(recipe(tmp_path), "target=rate"), store)
    folder.manifest_path.unlink()
    (local(folder.path) / f"part-00001-of-{SHARDS:05d}.json").unlink()
    with pytest.raises(WinnowError, match=r"2 of 3 parts are finished already; `winnow run --only rate`"):
        adopt_artifact(plan, "rate", file, store)


def test_a_step_of_another_store_keeps_its_identity(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """Computed with another option, and in other parts: the rows are the same, and the manifest says what they were."""
    elsewhere = Store(tmp_path / "elsewhere")
    old = planned(recipe(tmp_path, "old", rate="with: {scale: 2.0}"))
    make(old, elsewhere)
    source = elsewhere.folder(step(old, "rate"))
    _, manifest = adopt_artifact(plan, "rate", str(source.path), store)
    assert manifest["adopted"]["identity"] == step(old, "rate").identity
    assert manifest["adopted"]["from"] == f"toy_rate/{step(old, 'rate').key}"
    assert [file["sha256"] for file in manifest["files"]] == [file["sha256"] for file in source.manifest["files"]]
    file = recipe(tmp_path, "five")
    file.write_text(file.read_text().replace("shards: 3", "shards: 5"))
    five = planned(file)
    other = Store(tmp_path / "other")
    _, in_five = adopt_artifact(five, "rate", str(source.path), other)
    assert in_five["parts"] == 5
    both = [some.folder(step(plan, "rate")).read(REWARDS).sort_by("candidate_id") for some in (store, other)]
    assert both[0].equals(both[1])
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(WinnowError, match="is not a step's"):
        adopt_artifact(plan, "keep", str(tmp_path), store)
    with pytest.raises(WinnowError, match="toy_rate has no selections"):
        adopt_artifact(plan, "keep", str(source.path), store)
    source.manifest_path.unlink()
    with pytest.raises(WinnowError, match="a step that is not finished"):
        adopt_artifact(planned(recipe(tmp_path), "rate.scale=3.0"), "rate", str(source.path), store)


def test_a_model_folder(tmp_path: Path, store: Store, tiny: Model):
    """Its files are copied, its digest is theirs; the error for another folder says what it lacks."""
    with toy_stages():
        plan = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model"}}))
        shutil.copytree(tiny.folder, tmp_path / "model")
        (tmp_path / "model" / "optimizer.pt").write_bytes(b"x")
        adopted, manifest = adopt_artifact(plan, "m", str(tmp_path / "model"), store)
        model = store.folder(adopted).model()
        assert manifest["model"] == model.digest == model_digest(model.folder) == tiny.digest
        assert not (model.folder / "optimizer.pt").exists()
        (tmp_path / "model" / "config.json").unlink()
        again = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model", "with": {"size": 9}}}))
        with pytest.raises(WinnowError, match=r"adopt m: .*has no"):
            adopt_artifact(again, "m", str(tmp_path / "model"), store)


def test_every_step_of_a_real_run_can_be_adopted(data_dir: Path, finished: Path, tmp_path: Path):
    """Of RSO on tiny data: the same bytes under the same keys, and every real result passes the checks."""
    plan, old, new = plan_of(data_dir), Store(finished), Store(tmp_path / "new")
    for item in plan.steps:
        adopt_artifact(plan, item.name, str(old.folder(item).path), new)
    assert digests(plan, new) == digests(plan, old)
    for item in plan.steps:
        assert new.folder(item).manifest["model"] == old.folder(item).manifest["model"]


def test_the_command(winnow, tmp_path: Path, luck: Luck):
    """A stage whose results did not change got an option: its old result is adopted, and what it was is printed."""
    file = recipe(tmp_path)
    assert winnow("run", file)[0] == 0
    old = next(Path("store/toy_rate").iterdir())
    code, text = winnow("adopt", file, "rate", old, "--set", "rate.scale=1.5")
    assert (code, "adopted rate" in text) == (0, True)
    assert "although it was computed with options.scale: 1.0 -> 1.5" in text
    assert "adopted from toy_rate/" in winnow("plan", file, "--set", "rate.scale=1.5")[1]
    assert f"toy_rate/{old.name}" in winnow("ls", "toy[scale=1.5]")[1]
    for words, match in [
        (("rat", old), "did you mean 'rate'"),
        (("keep", "nowhere"), "finished already"),
        (("keep", "nowhere", "--set", "keep.above=9.0"), "no such file or folder"),
    ]:
        code, text = winnow("adopt", file, *words)
        assert (code, match in text) == (2, True), text

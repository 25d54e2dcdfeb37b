"""The manifest is written last: a crash loses only the parts in flight, and a rerun writes the same bytes."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import StageContext, stage
from pipeline.config.partial import Part, rerun
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.retries import may_pass
from pipeline.execution.run import run
from pipeline.stage import stages
from pipeline.store.storage import create, scratch_path
from pipeline.store.store import StepFolder, Store, overlapping, table_of
from schemas import Candidates, Model, Prompts, Rewards, WinnowError, prompt_id, shard_of
from schemas.tables import CANDIDATES, PAIRS, PROMPTS, REJECTS, REWARDS
from tests.pipeline.store.sizes import SMALL, both_sizes
from tests.runs import Silent, local

SHARDS = 3
ROOT = Path(__file__).parents[3]


class Trouble:
    """Counts the calls of toy_grade, and fails at one of them."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at = 0
        self.fail = self.raise_error

    def raise_error(self) -> None:
        raise RuntimeError("power cut")

    def call(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self.fail()


@contextmanager
def toy_stages() -> Iterator[Trouble]:
    """Register toy_source (called once for all parts), toy_grade (called per part) and toy_model."""
    trouble = Trouble()

    @stage(version=1, unsharded=True)
    def toy_source(ctx: StageContext, *, rows: int = 20) -> tuple[Prompts, Candidates]:
        prompts, candidates = [], []
        for n in range(rows):
            row = dict(prompt_id=prompt_id(f"prompt {n}"), text=f"prompt {n}", token_ids=[n])
            prompts.append(row | dict(split="train"))
            candidate = dict(candidate_id=f"c{n}", k=0, logp_kind="none", n_tokens=1, finish_reason="stop")
            candidates.append(row | candidate)
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)

    @stage(version=1)
    def toy_grade(prompts: Prompts, ctx: StageContext, *, leave_out: int = 3) -> Rewards:
        trouble.call()
        rows = []
        for row in prompts.to_pylist():
            number = row["token_ids"][0]
            ctx.count(tokens=1)
            if number % leave_out == 0:
                ctx.reject("divisible", place=row["text"], prompt=row["prompt_id"])
            else:
                rows.append(dict(prompt_id=row["prompt_id"], candidate_id=f"c{number}", reward=float(number)))
        return pa.Table.from_pylist(rows, REWARDS)

    @stage(version=1, unsharded=True)
    def toy_model(ctx: StageContext, *, size: int = 3) -> Model:
        (ctx.folder / "model").mkdir(parents=True, exist_ok=True)
        (ctx.folder / "model" / "model.safetensors").write_bytes(b"x" * size)
        return Model(ctx.folder / "model", "")

    try:
        yield trouble
    finally:
        for name in ("toy_source", "toy_grade", "toy_model"):
            stages.entries.pop(name)


@pytest.fixture
def store(tmp_path: Path, trouble: Trouble) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def complete(store: Store) -> Store:
    """A store with a finished run."""
    make(store)
    return store


def plan(grade: dict | None = None, source: dict | None = None, parts: int = SHARDS) -> Plan:
    steps = {
        "source": {"use": "toy_source", "with": source or {}},
        "grade": {"use": "toy_grade", "from": {"prompts": "source"}, "with": grade or {}},
    }
    return make_plan(Recipe("toy", shards=parts, target="grade", steps=steps))


def plan_of_one(stage: str, shards: int = 1, **options: Any) -> Plan:
    return make_plan(Recipe("m", shards=shards, target="m", steps={"m": {"use": stage, "with": options}}))


def make(store: Store, to_make: Plan | None = None) -> list[str]:
    """Run a plan; return the names of the steps that were not finished before."""
    reporter = Silent()
    run(to_make or plan(), store, LocalExecutor(), reporter)
    return reporter.ran


def folder(store: Store, name: str = "grade", of: Plan | None = None) -> StepFolder:
    return store.folder(next(step for step in (of or plan()).steps if step.name == name))


def contents(store: Store) -> dict[str, str]:
    """Digest of every Parquet file by its path."""
    root = local(store.root)
    files = (file for file in root.rglob("*.parquet") if file.relative_to(root).parts[0] != "set_aside")
    return {str(file.relative_to(root)): sha256(file.read_bytes()).hexdigest() for file in files}


def times(store: Store) -> dict[Path, int]:
    """Time of the last write to every file except the links of runs, which every run writes."""
    files = (file for file in local(store.root).rglob("*") if file.is_file() and file.parent.name != "runs")
    return {file: file.stat().st_mtime_ns for file in files}


def test_a_second_run_makes_nothing(store: Store, trouble: Trouble):
    assert make(store) == ["source", "grade"]
    before = times(store)
    assert make(store) == []
    assert trouble.calls == SHARDS
    assert times(store) == before


def test_the_manifest_is_right(complete: Store):
    """Of 20 prompts 7 (0, 3, … 18) are divisible by 3: 13 rewards, 7 rejects, and the files as they are on disk."""
    step = folder(complete)
    manifest = step.manifest
    assert manifest["rows"] == {"rewards": 13, "rejects": 7}
    assert manifest["rejects"] == {"divisible": 7}
    assert manifest["counters"] == {"tokens": 20}
    files = {file["file"]: file for file in manifest["files"]}
    assert set(files) == {file.name for file in step.path.glob("*.parquet")}
    for name, file in files.items():
        assert file["bytes"] == (step.path / name).stat().st_size
        assert file["sha256"] == sha256((step.path / name).read_bytes()).hexdigest()
        assert file["rows"] == pq.read_metadata(step.path / name).num_rows
    assert manifest["bytes"]["rewards"] == sum(files[name]["bytes"] for name in files if name.startswith("rewards"))
    assert manifest["identity"]["options"] == {"leave_out": 3}
    assert manifest["identity"]["inputs"] == {"prompts": folder(complete, "source").manifest["key"]}
    assert (manifest["stage"], manifest["key"]) == ("toy_grade", step.path.name)
    assert manifest["libraries"]["pyarrow"] == pa.__version__
    assert manifest["python"] == sys.version.split()[0]
    links = complete.runs()["toy"]
    assert set(links) == {"source", "grade"}
    assert complete.at(**links["grade"]).manifest == manifest


def test_the_manifest_has_the_commit_of_the_code(complete: Store):
    """As git has it, with + if there are uncommitted changes."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout")
    assert folder(complete).manifest["commit"].rstrip("+") == git.stdout.strip()


def test_part_i_of_every_table_has_the_same_prompts(complete: Store):
    """Whether one call made all parts or one call each: the prompt id alone decides."""
    for step, schema in (("source", PROMPTS), ("source", CANDIDATES), ("grade", REWARDS)):
        for shard in range(SHARDS):
            table = folder(complete, step).read(schema, shard)
            assert table.num_rows
            assert {shard_of(name, SHARDS) for name in table.column("prompt_id").to_pylist()} == {shard}
    assert folder(complete, "source").read(PROMPTS).num_rows == 20


def test_the_same_tables_are_the_same_bytes(complete: Store, tmp_path: Path):
    """In another store, at another time: else a digest could not say that nothing changed."""
    other = Store(tmp_path / "other")
    make(other)
    assert contents(other) == contents(complete)
    assert len(set(contents(complete).values())) > SHARDS


def test_another_option_has_its_own_folder(complete: Store):
    before = contents(complete)
    assert make(complete, plan({"leave_out": 5})) == ["grade"]
    assert before.items() < contents(complete).items()
    assert len(list((complete.root / "toy_grade").iterdir())) == 2


def test_a_failed_stage_leaves_its_finished_parts_and_a_rerun_makes_the_rest(store: Store, trouble: Trouble):
    """It fails in the second of three parts: one part is finished, and there is no manifest and no scratch file."""
    trouble.fail_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        make(store)
    step = folder(store)
    assert step.manifest is None
    files = [file["file"] for file in step.sidecar(0)["files"]]
    assert sorted(file.name for file in step.path.iterdir()) == sorted([f"part-00000-of-{SHARDS:05d}.json", *files])
    assert sorted(name.split(".")[0] for name in files) == ["rejects-00000", "rewards-00000"]
    before = times(store)
    assert make(store) == ["grade"]
    assert trouble.calls == 2 + 2
    assert before.items() < times(store).items()


@given(st.lists(st.text(), min_size=1), st.integers(1, 12), st.integers(1, 12))
def test_a_part_has_its_prompts_in_the_parts_of_another_division_that_overlap_it(prompts, parts, others):
    """h mod P = i and h mod Q = j have a common h only if i = j modulo gcd(P, Q)."""
    for prompt in prompts:
        assert shard_of(prompt, others) in overlapping(shard_of(prompt, parts), parts, others)


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
def test_a_table_in_other_parts_is_read_by_prompt(complete: Store, trouble: Trouble, parts: int):
    """Its rows, each in one part; what is finished is found whatever number of parts a recipe wants."""
    source, other = folder(complete, "source"), plan(parts=parts)
    tables = [source.read(PROMPTS, shard, of=parts) for shard in range(parts)]
    for shard, table in enumerate(tables):
        assert {shard_of(prompt, parts) for prompt in table["prompt_id"].to_pylist()} <= {shard}
    assert pa.concat_tables(tables).sort_by("prompt_id") == source.read(PROMPTS).sort_by("prompt_id")
    assert make(complete, other) == []
    rewards = folder(complete).read(REWARDS).sort_by("candidate_id")
    shutil.rmtree(local(folder(complete).path))
    assert make(complete, other) == ["grade"]
    assert folder(complete).manifest["parts"] == parts
    assert folder(complete).read(REWARDS).sort_by("candidate_id") == rewards


def test_a_step_that_was_begun_ends_in_the_parts_that_it_has(store: Store, trouble: Trouble):
    """One of three parts is finished when a run that wants five takes over: two calls remain."""
    trouble.fail_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        make(store)
    assert make(store, plan(parts=5)) == ["grade"]
    assert trouble.calls == 2 + 2
    assert folder(store).manifest["parts"] == SHARDS


@pytest.mark.parametrize("small_table", [SMALL], indirect=True)  # as in the process that is killed
def test_a_killed_process_loses_only_the_part_in_flight(complete: Store, tmp_path: Path, trouble: Trouble):
    """Killed without any clean-up, in the second part; the rerun in this process completes the step."""
    code = f"""
import os
from tests.pipeline.store.test_store import Store, make, toy_stages
with toy_stages() as trouble:
    trouble.fail_at, trouble.fail = 2, lambda: os._exit(9)
    make(Store({str(tmp_path / "killed")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    killed = Store(tmp_path / "killed")
    assert folder(killed).missing() == [1, 2]
    make(killed)
    assert trouble.calls == SHARDS + 2
    assert contents(killed) == contents(complete)


@contextmanager
def crash_at(number: int) -> Iterator[list[int]]:
    """Raise at the given rename or link, counted from 1, and count them: every file of a store appears by one."""
    count = [0]

    def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
        def rename_or_crash(*paths: Path) -> Any:
            count[0] += 1
            if count[0] == number:
                raise KeyboardInterrupt
            return rename(*paths)

        return rename_or_crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(os, "link", counted(os.link))
        yield count


@both_sizes
def test_after_a_crash_at_any_write_a_rerun_completes_the_step(complete: Store, tmp_path: Path):
    """Whichever file never appears: no step looks finished that is not, and the rerun ends with the same bytes."""
    with crash_at(0) as count:
        make(Store(tmp_path / "all"))
    # Two trials and the run's link; of both steps sidecars, manifest and what is seen while it runs; the link again.
    assert count[0] >= 3 + (1 + 1 + 1) + (SHARDS + 1 + 1) + 1
    for number in range(1, count[0]):
        store = Store(tmp_path / str(number))
        with crash_at(number), pytest.raises(KeyboardInterrupt):
            make(store)
        for manifest in store.sealed():
            assert all((Path(manifest["folder"]) / file["file"]).exists() for file in manifest["files"])
            assert "rejects" in manifest["rows"]
        assert not folder(store).manifest, "the last manifest is written last of all"
        make(store)
        assert contents(store) == contents(complete)


def test_the_parts_of_a_small_table_are_one_file(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Of each table with rows, whatever the number of parts; a part is read as it was written."""
    make(store)
    before = {shard: folder(store).read(REWARDS, shard) for shard in range(SHARDS)}
    of_prompts = {shard: folder(store, "source").read(PROMPTS, shard) for shard in range(SHARDS)}
    monkeypatch.setattr("pipeline.store.store.SMALL_TABLE", SMALL)
    shutil.rmtree(str(store.root))
    make(store)
    for name, tables in (("source", {"prompts", "candidates"}), ("grade", {"rewards", "rejects"})):
        files = [path.name for path in local(folder(store, name).path).iterdir()]
        assert {table_of({"file": file}) for file in files if file.endswith(".parquet")} == tables
        assert len(files) == len(tables) + 2
    assert {shard: folder(store).read(REWARDS, shard) for shard in range(SHARDS)} == before
    assert {shard: folder(store, "source").read(PROMPTS, shard) for shard in range(SHARDS)} == of_prompts
    assert sum(table.num_rows for table in before.values()) == folder(store).manifest["rows"]["rewards"]
    first = before[0]["prompt_id"][0].as_py()
    assert folder(store).read(REWARDS, 0, (first, None)).equals(before[0].filter(pc.field("prompt_id") >= first))


def test_a_part_in_a_file_of_all_parts_takes_the_memory_of_its_rows(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.store.store.SMALL_TABLE", SMALL)
    make(store)
    rows = [folder(store).read(REWARDS, shard).num_rows for shard in range(SHARDS)]
    sizes = [folder(store).decoded_bytes(REWARDS, shard, SHARDS) for shard in range(SHARDS)]
    assert len(set(rows)) > 1
    assert [size / sum(sizes) for size in sizes] == pytest.approx([count / sum(rows) for count in rows], abs=0.01)


def test_a_table_without_rows_has_no_file_and_can_be_read(store: Store):
    """In a part, and where no part has any."""
    make(store)
    source = folder(store, "source")
    assert not list(local(source.path).glob("rejects*"))
    assert source.read(REJECTS, 1).num_rows == source.read(REJECTS).num_rows == source.manifest["rows"]["rejects"] == 0
    with pytest.raises(WinnowError, match="table pairs is not finished"):
        source.read(PAIRS, 1)


def test_a_missing_manifest_is_written_again_from_the_parts(complete: Store, trouble: Trouble):
    before = times(complete)
    manifest = local(folder(complete).manifest_path)
    manifest.unlink()
    assert make(complete) == ["grade"]
    assert trouble.calls == SHARDS
    assert {file: time for file, time in times(complete).items() if file != manifest}.items() < before.items()
    assert folder(complete).manifest["rows"] == {"rewards": 13, "rejects": 7}


@pytest.mark.parametrize("damage", ["truncated table", "deleted table", "deleted sidecar", "empty sidecar"])
def test_a_damaged_part_of_an_unfinished_step_is_made_again(complete: Store, trouble: Trouble, damage: str):
    """As a full disk or a power cut leaves it: that part alone is missing."""
    before, step = contents(complete), folder(complete)
    local(step.manifest_path).unlink()
    file = next(local(step.path).glob("rewards-00001.*.parquet"))
    if damage == "truncated table":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "deleted table":
        file.unlink()
    elif damage == "deleted sidecar":
        (step.path / f"part-00001-of-{SHARDS:05d}.json").unlink()
    else:
        (step.path / f"part-00001-of-{SHARDS:05d}.json").write_bytes(b"")
    assert step.missing() == [1]
    others = {path: time for path, time in times(complete).items() if "00001" not in path.name}
    make(complete)
    assert trouble.calls == SHARDS + 1
    assert contents(complete) == before
    assert others.items() < times(complete).items()


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 10), lambda file: file.unlink()])
def test_a_damaged_table_of_a_finished_step_is_named_when_it_is_read(complete: Store, damage: Callable[[Path], None]):
    """Finished is finished: the next step that reads it says what to do, and that repairs it."""
    before, source = contents(complete), folder(complete, "source")
    for file in local(source.path).glob("prompts-*.parquet"):
        damage(file)
    with pytest.raises(WinnowError, match=rf"{source.path}: table prompts .* verify --repair"):
        make(complete, plan({"leave_out": 5}))
    rerun([plan()], complete, Part(force="source")).delete()
    make(complete)
    assert contents(complete) == before


def test_a_failing_disk_is_no_damage(complete: Store, monkeypatch: pytest.MonkeyPatch):
    """It is an OSError, which is tried again, and no advice to replace good files."""

    def busy(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", busy)
    with pytest.raises(OSError, match="Input/output error"):
        folder(complete).read(REWARDS)


def test_a_step_without_any_row_has_failed_and_says_why(store: Store):
    with pytest.raises(WinnowError, match=r"grade: .*rewards.*20 divisible"):
        make(store, plan({"leave_out": 1}))
    assert not folder(store, of=plan({"leave_out": 1})).manifest
    assert folder(store, "source").manifest
    with pytest.raises(WinnowError, match=r"source: .*prompts and candidates.*inputs have no rows"):
        make(store, plan(source={"rows": 0}))


def test_a_stage_is_not_called_for_a_part_without_rows(store: Store, trouble: Trouble):
    """Two prompts lie in fewer than three parts: the others are empty tables."""
    small = plan({"leave_out": 7}, {"rows": 2})
    make(store, small)
    used = {shard_of(prompt_id(f"prompt {n}"), SHARDS) for n in range(2)}
    assert trouble.calls == len(used) < SHARDS
    assert folder(store, of=small).missing() == []


def test_a_finished_model_has_the_digest_of_its_content(store: Store):
    """No row is needed where a model is made; other weights have another digest; without a manifest there is none."""
    digests = set()
    for size in (3, 4):
        to_make = plan_of_one("toy_model", size=size)
        make(store, to_make)
        digests.add(store.folder(to_make.target).model().digest)
    assert len(digests) == 2
    store.folder(to_make.target).manifest_path.unlink()
    with pytest.raises(WinnowError, match="no finished model"):
        store.folder(to_make.target).model()


def test_a_table_that_does_not_fit_its_schema_is_not_stored(store: Store, tmp_path: Path):
    @stage(version=1, unsharded=True)
    def toy_bad(ctx: StageContext) -> Rewards:
        return pa.table({"prompt_id": ["p"], "candidate_id": ["c"], "reward": ["high"]})

    try:
        with pytest.raises(WinnowError, match="column 'reward' is string, must be double"):
            make(store, plan_of_one("toy_bad"))
        assert not list(tmp_path.rglob("*.parquet"))
    finally:
        stages.entries.pop("toy_bad")


def test_any_option_gives_the_run_a_valid_file_name(store: Store, tmp_path: Path):
    """--set note.about=/x/y becomes part of a file's name: it must stay in its folder, fit, and be unique."""
    (tmp_path / "toy.yaml").write_text("target: source\nsource: {use: toy_source}\nnote: {use: toy_model}")
    names = []
    for value in ("/x/y", "../../escape", "r" * 300, "é" * 200, 'it\'s "quoted"; --'):
        for end in "ab":
            to_make = make_plan(load_recipe(tmp_path / "toy.yaml", (), (f"about={json.dumps(value + end)}",)))
            store.link_run(to_make.name, to_make.steps)
            names.append(to_make.name)
    assert set(store.runs()) == set(names)
    assert len(set(names)) == len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "toy.yaml"]


def set_aside(store: Store) -> list[str]:
    """Stage and name of each file that was set aside."""
    root = local(store.root) / "set_aside"
    return sorted(f"{file.relative_to(root).parts[0]} {file.name}" for file in root.rglob("*") if file.is_file())


@pytest.mark.parametrize("damage", ["empty", "cut", "a list", "another byte", "none of these"])
def test_a_damaged_manifest_is_set_aside_and_written_again_from_the_parts(
    complete: Store, trouble: Trouble, damage: str
):
    """All of a store at once, as a power cut leaves them, and nothing is deleted or computed again."""
    before = contents(complete)
    if damage == "none of these":
        assert make(complete) == []
        return
    for path in local(complete.root).glob("*/*/manifest.json"):
        text = path.read_text()
        path.write_text(
            {"empty": "", "cut": text[:-3], "a list": "[]"}.get(damage, text.replace('"parts": 3', '"parts": 2'))
        )
    assert make(complete) == ["source", "grade"]
    assert trouble.calls == SHARDS
    assert contents(complete) == before
    assert set_aside(complete) == ["toy_grade manifest.json", "toy_source manifest.json"]
    assert make(complete) == []


def test_a_manifest_of_a_later_version_is_refused(complete: Store):
    path = local(folder(complete, "source").manifest_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(WinnowError, match=r"manifest\.json: .*format 99.* reads up to 3"):
        make(complete)


def test_all_that_a_power_cut_emptied_is_made_again_in_one_run(complete: Store):
    """Every file of an older store, which was not synced: one run, the same bytes."""
    before = contents(complete)
    files = [file for file in local(complete.root).glob("toy_*/*/*") if file.is_file()]
    for file in files:
        file.write_bytes(b"")
    assert make(complete) == ["source", "grade"]
    assert contents(complete) == before
    sidecars = [f"toy_grade part-{part:05d}-of-{SHARDS:05d}.json" for part in range(SHARDS)]
    manifests = ["toy_grade manifest.json", "toy_source manifest.json"]
    assert set_aside(complete) == sorted([*sidecars, *manifests, "toy_source part-whole.json"])


def test_what_was_made_from_a_damaged_result_that_is_another_now_is_made_again(tmp_path: Path, trouble: Trouble):
    """A sampler draws otherwise on other hardware: rewards of the lost draws are none of the new ones."""
    calls = iter(range(100))

    @stage(version=1)
    def toy_luck(prompts: Prompts) -> Rewards:
        rows = [
            dict(prompt_id=prompt, candidate_id="c", reward=float(next(calls)))
            for prompt in prompts["prompt_id"].to_pylist()
        ]
        return pa.Table.from_pylist(rows, REWARDS)

    @stage(version=1)
    def toy_double(rewards: Rewards) -> Rewards:
        return rewards.set_column(2, "reward", pc.multiply(rewards["reward"], 2.0))

    steps: dict[str, dict[str, Any]] = {
        "source": {"use": "toy_source"},
        "luck": {"use": "toy_luck", "from": {"prompts": "source"}},
        "double": {"use": "toy_double", "from": {"rewards": "luck"}},
    }
    lucky, store = make_plan(Recipe("toy", shards=1, target="double", steps=steps)), Store(tmp_path / "store")
    try:
        make(store, lucky)
        folders = [folder(store, name, lucky) for name in ("luck", "double")]
        first = folders[0].read(REWARDS)
        for name in ("manifest.json", "part-00000-of-00001.json"):
            (local(folders[0].path) / name).write_bytes(b"")
        assert make(store, lucky) == ["luck", "double"]
        luck, double = (step.read(REWARDS) for step in folders)
        assert luck != first
        assert double["reward"].to_pylist() == [2 * reward for reward in luck["reward"].to_pylist()]
    finally:
        for name in ("toy_luck", "toy_double"):
            stages.entries.pop(name)


def test_a_flipped_bit_in_a_part_is_said_where_it_is_read(complete: Store):
    """Parquet has no digest: most flips are read as other rows."""
    file = next(local(folder(complete, "source").path).glob("prompts-00001.*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(WinnowError, match=rf"table prompts .*{file.name}.*not as it was written.*verify --repair"):
        make(complete, plan({"leave_out": 5}))


def test_a_flipped_bit_in_a_model_is_said_where_it_is_read(store: Store):
    to_make = plan_of_one("toy_model", size=9)
    make(store, to_make)
    step = store.folder(to_make.target)
    (step.path / "model" / "model.safetensors").write_bytes(b"xxxxyxxxx")
    with pytest.raises(WinnowError, match=r"model\.safetensors is not as it was written.*verify --repair"):
        step.model()


def test_a_finished_step_without_a_sidecar_is_read_by_its_manifest(complete: Store):
    """All its bytes are there: it is not lost with a damaged sidecar."""
    step = folder(complete)
    before = step.read(REWARDS, 1)
    (step.path / f"part-00001-of-{SHARDS:05d}.json").write_bytes(b"{")
    assert step.read(REWARDS, 1) == before
    assert make(complete) == []


def test_locks_and_scratch_of_killed_runs_go_at_the_next_run(store: Store, trouble: Trouble):
    """Delete those of a process that has ended, and leave those of one that lives."""
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    dead, alive = int(ended.stdout), os.getpid()
    make(store)
    root, step = local(store.root), local(folder(store).path)
    step.joinpath("manifest.json").unlink()
    (root / "locks" / "0123456789abcdef").touch()
    name = scratch_path(root / "runs" / "other.json").name
    names = [name.replace(f".{alive}.", f".{process}.") for process in (dead, alive)]
    for name in names:
        (root / "runs" / name).touch()
    (step / scratch_path(step / "x").name.replace(f".{alive}.", f".{dead}.")).touch()
    make(store)
    assert sorted(file.name for file in root.rglob(".*")) == names[1:]
    assert list((root / "locks").iterdir()) == []


def test_a_disk_without_hard_links_has_a_store_too(tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch):
    """And of two writers there, the first one wins."""

    def refuse(*names: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path / "store")
    assert make(store) == ["source", "grade"]
    assert make(store) == []
    assert (create(tmp_path / "x", b"1"), create(tmp_path / "x", b"2"), (tmp_path / "x").read_bytes()) == (
        True,
        False,
        b"1",
    )
    assert not list(tmp_path.rglob(".*"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_incomplete_file(tmp_path: Path, trouble: Trouble):
    """Full from the start, between sidecars and tables, and between tables and the manifest: what is there afterwards
    is complete, and a rerun finishes the step."""
    reference, large = Store(tmp_path / "reference"), plan(source={"rows": 400})
    make(reference, large)
    for size in (0, 900, 6000):
        store = Store(tmp_path / str(size))
        with file_size_limit(size), pytest.raises((OSError, WinnowError), match="File too large"):
            make(store, large)
        assert not list(local(store.root).rglob(".*")), "no scratch file"
        make(store, large)
        assert contents(store) == contents(reference)


@pytest.mark.parametrize(
    "text", ["Error while serializing: I/O error: No space left on device (os error 28)", "engine died"]
)
def test_a_full_disk_is_an_error_of_the_disk_whatever_a_library_makes_of_it(store: Store, text: str, monkeypatch):
    """In its text, or, where a process of an engine died without one, by how much room the disk has."""

    @stage(version=1, unsharded=True)
    def toy_full(ctx: StageContext) -> Rewards:
        if text == "engine died":
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
        raise RuntimeError(text)

    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            make(store, plan_of_one("toy_full"))
        assert may_pass(error.value), "the command that resumes is printed"
        assert str(error.value.__cause__) == text
    finally:
        stages.entries.pop("toy_full")


@both_sizes
def test_the_results_of_two_calls_for_all_parts_are_never_mixed(tmp_path: Path):
    """A stage with another result at every call, cut off at each of its files in turn: all rows are of one call."""
    calls = iter(range(1000))

    @stage(version=1, unsharded=True)
    def toy_changing() -> Prompts:
        call = next(calls)
        names = [prompt_id(f"prompt {n}") for n in range(20)]
        rows = [dict(prompt_id=name, text=str(call), token_ids=[call], split="train") for name in names]
        return pa.Table.from_pylist(rows, PROMPTS)

    try:
        to_make = plan_of_one("toy_changing", SHARDS)
        with crash_at(0) as count:
            make(Store(tmp_path / "all"), to_make)
        for number in range(1, count[0] - 3):
            store = Store(tmp_path / str(number))
            with crash_at(number + 3), pytest.raises(KeyboardInterrupt):  # after two trials and the link
                make(store, to_make)
            make(store, to_make)
            assert len(set(store.folder(to_make.target).read(PROMPTS).column("text").to_pylist())) == 1
    finally:
        stages.entries.pop("toy_changing")

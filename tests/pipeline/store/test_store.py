"""The manifest is written last: a crash loses only what was in flight, and a rerun makes the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import StageContext, stage
from pipeline.config.partial import rerun
from pipeline.config.plan import Plan, Step, make_plan
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.stage import stages
from pipeline.store.store import Store
from schemas import Candidates, Model, Prompts, Rewards, WinnowError, prompt_id, shard_of
from schemas.tables import CANDIDATES, PROMPTS, REWARDS
from tests.runs import local

SHARDS = 3


class Trouble:
    """What the toy stages do wrong, and how often they were called."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at = 0
        self.fail = self.raise_it

    def raise_it(self) -> None:
        raise RuntimeError("power cut")

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self.fail()


@contextmanager
def toy_stages() -> Iterator[Trouble]:
    """A whole stage `toy_source` and a stage by shards `toy_grade`, for as long as the context lasts."""
    trouble = Trouble()

    @stage(version=1, unsharded=True)
    def toy_source(ctx: StageContext, *, rows: int = 20) -> tuple[Prompts, Candidates]:
        prompts, candidates = [], []
        for n in range(rows):
            name = prompt_id(f"prompt {n}")
            both = dict(prompt_id=name, text=f"prompt {n}", token_ids=[n])
            prompts.append(both | dict(split="train"))
            own = dict(candidate_id=f"c{n}", k=0, logp_kind="none", n_tokens=1, finish_reason="stop")
            candidates.append(both | own)
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)

    @stage(version=1)
    def toy_grade(prompts: Prompts, ctx: StageContext, *, leave_out: int = 3) -> Rewards:
        trouble.step()
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


class Log:
    """Remembers what a run told it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def step_cached(self, step: Step) -> None:
        self.events.append(("cached", step.name))

    def step_started(self, step: Step, done: int, total: int) -> None:
        self.events.append(("begin", (step.name, done, total)))

    def step_waiting(self, step: Step, why: str) -> None: ...

    def part_finished(self, step: Step) -> None:
        self.events.append(("part", step.name))

    def progress(self, step: Step, done: float, total: float, unit: str) -> None: ...

    def prompt_rejected(self, step: Step, prompt: str, words: str) -> None:
        self.events.append(("left out", prompt))

    def step_finished(self, step: Step, manifest: dict) -> None:
        self.events.append(("sealed", step.name))


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    with toy_stages() as trouble:
        yield trouble


def plan(grade: dict | None = None, source: dict | None = None) -> Plan:
    steps = {
        "source": {"use": "toy_source", "with": source or {}},
        "grade": {"use": "toy_grade", "from": {"prompts": "source"}, "with": grade or {}},
    }
    return make_plan(Recipe("toy", shards=SHARDS, target="grade", steps=steps))


def make(store: Store, made: Plan | None = None) -> Log:
    log = Log()
    run(made or plan(), store, LocalExecutor(), log)
    return log


def folder(store: Store, name: str = "grade", made: Plan | None = None):
    return store.folder(next(step for step in (made or plan()).steps if step.name == name))


def content(store: Store) -> dict[str, str]:
    """Every Parquet file with the digest of its bytes."""
    root = local(store.root)
    return {str(file.relative_to(root)): digest(file) for file in root.rglob("*.parquet")}


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def times(store: Store) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in local(store.root).rglob("*") if file.is_file()}


def test_a_run_seals_every_step_and_a_second_makes_nothing(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    events = [event for event, _ in make(store).events]
    assert " ".join(events) == "begin part sealed begin part part part sealed"
    before = times(store)
    assert make(store).events == [("cached", "source"), ("cached", "grade")]
    assert trouble.calls == SHARDS
    assert {file: time for file, time in times(store).items() if file.parent.name != "runs"} == {
        file: time for file, time in before.items() if file.parent.name != "runs"
    }


def test_the_manifest_tells_the_truth(tmp_path: Path, trouble: Trouble):
    """20 prompts, of which 7 (0, 3, … 18) are divisible by 3: 13 rewards, 7 rejects, and files as they lie there."""
    store = Store(tmp_path)
    make(store)
    step = folder(store)
    manifest = step.manifest
    assert manifest["rows"] == {"rewards": 13, "rejects": 7}
    assert manifest["rejects"] == {"divisible": 7}
    assert manifest["counters"] == {"tokens": 20}
    files = {file["file"]: file for file in manifest["files"]}
    assert set(files) == {file.name for file in step.path.glob("*.parquet")}
    for name, file in files.items():
        assert file["bytes"] == (step.path / name).stat().st_size
        assert file["sha256"] == digest(step.path / name)
        assert file["rows"] == pq.read_metadata(step.path / name).num_rows
    assert manifest["bytes"]["rewards"] == sum(files[name]["bytes"] for name in files if name.startswith("rewards"))
    assert manifest["identity"]["options"] == {"leave_out": 3}
    assert manifest["identity"]["inputs"] == {"prompts": folder(store, "source").manifest["key"]}
    assert (manifest["stage"], manifest["key"]) == ("toy_grade", step.path.name)
    assert manifest["libraries"]["pyarrow"] == pa.__version__
    assert manifest["python"] == sys.version.split()[0]


def test_the_manifest_names_the_commit_of_the_code(tmp_path: Path, trouble: Trouble):
    """As git has it, with + where the tree has changes."""
    store = Store(tmp_path)
    make(store)
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout")
    assert folder(store).manifest["commit"].rstrip("+") == git.stdout.strip()


def test_shard_i_of_every_table_has_the_same_prompts(tmp_path: Path, trouble: Trouble):
    """Dealt from a whole stage or made shard by shard: the prompt id alone decides."""
    store = Store(tmp_path)
    make(store)
    for step, schema in (("source", PROMPTS), ("source", CANDIDATES), ("grade", REWARDS)):
        for shard in range(SHARDS):
            table = folder(store, step).read(schema, shard)
            assert table.num_rows
            assert {shard_of(name, SHARDS) for name in table.column("prompt_id").to_pylist()} == {shard}
    assert folder(store, "source").read(PROMPTS).num_rows == 20


def test_the_same_tables_are_the_same_bytes(tmp_path: Path, trouble: Trouble):
    """In another store, at another time: else a digest could not say that nothing changed."""
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    make(one)
    make(other)
    assert content(one) == content(other)
    assert len(set(content(one).values())) > SHARDS


def test_another_option_is_another_folder_and_the_old_one_stays(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    make(store)
    before = content(store)
    assert make(store, plan({"leave_out": 5})).events[0] == ("cached", "source")
    assert before.items() < content(store).items()
    assert len(list((store.root / "toy_grade").iterdir())) == 2


def test_a_stage_that_fails_leaves_its_finished_parts_and_nothing_else(tmp_path: Path, trouble: Trouble):
    """It fails in the second of three parts: one part is there, whole; no manifest, no scratch file."""
    store = Store(tmp_path)
    trouble.fail_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        make(store)
    step = folder(store)
    assert step.manifest is None
    own = [file["file"] for file in step.sidecar(0)["files"]]
    assert sorted(file.name for file in step.path.iterdir()) == sorted(["part-00000.json", *own])
    assert sorted(name.split(".")[0] for name in own) == ["rejects-00000", "rewards-00000"]


def test_a_rerun_does_only_what_is_missing(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    trouble.fail_at = 3
    with pytest.raises(RuntimeError):
        make(store)
    before = {file: time for file, time in times(store).items() if file.parent.name != "runs"}
    log = make(store)
    assert ("begin", ("grade", 2, 3)) in log.events
    assert trouble.calls == 3 + 1
    assert {file: times(store)[file] for file in before} == before


def test_a_process_that_is_killed_loses_only_the_part_in_flight(tmp_path: Path, trouble: Trouble):
    """Killed for real, without any clean-up, in the second part; the rerun in this process completes the step."""
    code = f"""
import os
from pathlib import Path
from tests.pipeline.store.test_store import Store, make, toy_stages
with toy_stages() as trouble:
    trouble.fail_at, trouble.fail = 2, lambda: os._exit(9)
    make(Store(Path({str(tmp_path / "killed")!r})))
"""
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 9
    killed, whole = Store(tmp_path / "killed"), Store(tmp_path / "whole")
    assert folder(killed).missing(SHARDS) == [1, 2]
    make(killed)
    make(whole)
    assert trouble.calls == 2 + 3
    assert content(killed) == content(whole)


def test_a_crash_at_any_rename_is_mended_by_a_rerun(tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch):
    """Every file appears by a rename, or, where the first one wins, by a link. Whichever of them never happens: no
    step looks finished that is not, and the rerun ends with the same bytes as a run without a crash."""
    whole = Store(tmp_path / "whole")
    make(whole)
    rename, link, count = Path.replace, os.link, 0

    def crashing(make_it: Callable[..., Any]) -> Callable[..., Any]:
        def or_crash(*paths: Path) -> Any:
            nonlocal count
            count += 1
            if count == crash_at:
                raise KeyboardInterrupt
            return make_it(*paths)

        return or_crash

    monkeypatch.setattr(Path, "replace", crashing(rename))
    monkeypatch.setattr(os, "link", crashing(link))
    total = 3 + (SHARDS * 3 + 2) + (SHARDS * 3 + 1)  # two trials, the run's link; tables, sidecars (a whole stage: one)
    for crash_at in range(1, total + 1):
        store, count = Store(tmp_path / str(crash_at)), 0
        with pytest.raises(KeyboardInterrupt):
            make(store)
        for manifest in store.sealed():
            assert all((Path(manifest["folder"]) / file["file"]).exists() for file in manifest["files"])
            assert len([file for file in manifest["files"] if file["file"].startswith("rejects")]) == SHARDS
        assert not folder(store).manifest, "the last manifest is the last rename of all"
        make(store)
        assert content(store) == content(whole)
    store, count, crash_at = Store(tmp_path / "all"), 0, 0
    make(store)
    assert count == total + 1, "and the link of the run again"


def test_a_crash_between_the_last_part_and_the_manifest_costs_nothing(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    make(store)
    folder(store).manifest_path.unlink()
    before = {file: time for file, time in times(store).items() if file.suffix == ".parquet"}
    log = make(store)
    assert ("begin", ("grade", 3, 3)) in log.events
    assert trouble.calls == SHARDS
    assert {file: times(store)[file] for file in before} == before
    assert folder(store).manifest["rows"] == {"rewards": 13, "rejects": 7}


@pytest.mark.parametrize("spoil", ["truncate", "delete", "sidecar"])
def test_a_spoiled_part_counts_as_missing(tmp_path: Path, trouble: Trouble, spoil: str):
    """A file cut short (a full disk), a file gone, or a sidecar never written: that part alone is made again."""
    store = Store(tmp_path)
    make(store)
    before = content(store)
    step = folder(store)
    step.manifest_path.unlink()
    file = next(step.path.glob("rewards-00001.*.parquet"))
    if spoil == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif spoil == "delete":
        file.unlink()
    else:
        (step.path / "part-00001.json").unlink()
    assert step.missing(SHARDS) == [1]
    others = {
        path: time for path, time in times(store).items() if "00001" not in path.name and "runs" not in path.parts
    }
    make(store)
    assert trouble.calls == SHARDS + 1
    assert content(store) == before
    assert {path: times(store)[path] for path in others} == others


@pytest.mark.parametrize("spoil", ["truncate", "delete"])
def test_a_sealed_table_that_is_spoiled_later_is_named_when_read(tmp_path: Path, trouble: Trouble, spoil: str):
    """Sealed is sealed: the next step that reads it says what to do, instead of a traceback, and that does it."""
    store = Store(tmp_path)
    make(store)
    before = content(store)
    for file in folder(store, "source").path.glob("prompts-*.parquet"):
        os.truncate(file, 10) if spoil == "truncate" else file.unlink()
    with pytest.raises(WinnowError, match=rf"{folder(store, 'source').path}: table prompts .* --force STEP"):
        make(store, plan({"leave_out": 5}))
    rerun([plan()], store, force="source").drop()
    make(store)
    assert content(store) == before


def test_a_step_that_leaves_out_every_row_has_failed_and_says_why(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    with pytest.raises(WinnowError, match=r"grade: every row of rewards was left out \(20 divisible\)"):
        make(store, plan({"leave_out": 1}))
    assert not folder(store, made=plan({"leave_out": 1})).manifest
    assert folder(store, "source").manifest


def test_a_step_without_any_input_row_has_failed_too(tmp_path: Path, trouble: Trouble):
    with pytest.raises(
        WinnowError, match=r"source: every row of prompts and candidates was left out \(its inputs have no rows\)"
    ):
        make(Store(tmp_path), plan(source={"rows": 0}))


def test_a_shard_without_rows_wakes_no_stage(tmp_path: Path, trouble: Trouble):
    """One prompt lies in one shard: the other two parts are empty tables, made without a call."""
    store = Store(tmp_path)
    make(store, plan({"leave_out": 7}, {"rows": 2}))
    used = {shard_of(prompt_id(f"prompt {n}"), SHARDS) for n in range(2)}
    assert trouble.calls == len(used) < SHARDS
    assert folder(store, made=plan({"leave_out": 7}, {"rows": 2})).missing(SHARDS) == []


def test_a_model_is_sealed_with_the_digest_of_its_content(tmp_path: Path, trouble: Trouble):
    """No row is needed where a model is made; what changes the weights changes the digest."""
    digests = []
    for size in (3, 4):
        steps = {"m": {"use": "toy_model", "with": {"size": size}}}
        made = make_plan(Recipe("m", shards=1, target="m", steps=steps))
        make(Store(tmp_path), made)
        digests.append(Store(tmp_path).folder(made.target).model().digest)
    assert len(set(digests)) == 2


def test_an_unsealed_model_is_not_handed_out(tmp_path: Path, trouble: Trouble):
    made = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model"}}))
    make(Store(tmp_path), made)
    step = Store(tmp_path).folder(made.target)
    step.manifest_path.unlink()
    with pytest.raises(WinnowError, match="no sealed model here"):
        step.model()


def test_a_table_that_breaks_its_schema_never_reaches_the_store(tmp_path: Path):
    @stage(version=1, unsharded=True)
    def toy_bad(ctx: StageContext) -> Rewards:
        return pa.table({"prompt_id": ["p"], "candidate_id": ["c"], "reward": ["high"]})

    try:
        made = make_plan(Recipe("bad", shards=1, target="bad", steps={"bad": {"use": "toy_bad"}}))
        with pytest.raises(WinnowError, match="column 'reward' is string, must be double"):
            make(Store(tmp_path), made)
        assert not list(tmp_path.rglob("*.parquet"))
    finally:
        stages.entries.pop("toy_bad")


def test_runs_are_links_from_names_to_steps(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    make(store)
    links = store.runs()["toy"]
    assert set(links) == {"source", "grade"}
    manifest = store.manifest_at(**links["grade"])
    assert manifest
    assert manifest["rows"]["rewards"] == 13


@pytest.mark.parametrize("value", ["/x/y", "../../escape", "r" * 300, "é" * 200, 'it\'s "quoted"; --'])
def test_whatever_is_set_the_run_is_found_under_its_name(tmp_path: Path, trouble: Trouble, value: str):
    """--set note.text=/x/y ends up in a file's name: it must not climb out, nor be too long, nor be another's."""
    store = Store(tmp_path / "store")
    (tmp_path / "toy.yaml").write_text("target: source\nsource: {use: toy_source}\nnote: {use: toy_model}")
    names = []
    for end in "ab":
        recipe = load_recipe(tmp_path / "toy.yaml", (), (f"about={json.dumps(value + end)}",))
        made = make_plan(recipe)
        make(store, made)
        names.append(made.name)
    assert set(store.runs()) == set(names)
    assert len(set(names)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "toy.yaml"]


def test_a_file_that_is_no_json_is_named(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    make(store)
    folder(store).manifest_path.write_text(json.dumps({"rows": 1})[:-2])
    with pytest.raises(WinnowError, match=r"manifest\.json: cannot be read"):
        make(store)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path, trouble: Trouble):
    store = Store(tmp_path)
    make(store)
    step = folder(store, "source")
    manifest = step.manifest | {"format": 99}
    step.manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(WinnowError, match=r"manifest.json: of format 99, and this winnow reads up to 1; bring"):
        make(store)


FULL = """
import resource, sys
from pathlib import Path
from tests.pipeline.store.test_store import Store, make, plan, toy_stages
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
with toy_stages():
    make(Store(Path(sys.argv[1])), plan(source={"rows": 400}))
"""


@pytest.mark.parametrize("room", [0, 900, 6000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, trouble: Trouble, room: int):
    """A limit on the size of files stands in for a disk without room (in bytes): none at all, for sidecars and not for
    all tables, for tables and not for a manifest. What is there afterwards is whole, and a rerun completes it."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "full"), str(room)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    store, whole, large = Store(tmp_path / "full"), Store(tmp_path / "whole"), plan(source={"rows": 400})
    assert not list((tmp_path / "full").rglob(".*")), "no scratch file"
    make(store, large)
    make(whole, large)
    assert content(store) == content(whole)


def test_what_two_calls_of_a_whole_stage_made_is_never_mixed(tmp_path: Path):
    """A stage that is another every time it is called, cut off at each of its files in turn: the sealed step has all
    rows of one call."""
    calls = iter(range(1000))

    @stage(version=1, unsharded=True)
    def toy_moods() -> Prompts:
        mood = next(calls)
        rows = [
            dict(prompt_id=prompt_id(f"prompt {n}"), text=str(mood), token_ids=[mood], split="train") for n in range(20)
        ]
        return pa.Table.from_pylist(rows, PROMPTS)

    made = make_plan(Recipe("moods", shards=SHARDS, target="moods", steps={"moods": {"use": "toy_moods"}}))
    try:
        for crash_at in range(1, SHARDS * 2 + 3):
            store, count = Store(tmp_path / str(crash_at)), 0
            store.link_run("moods", made.steps)

            def crash(act: Callable[..., Any], crash_at: int = crash_at) -> Callable[..., Any]:
                def or_crash(*paths: Path) -> Any:
                    nonlocal count
                    count += 1
                    if count == crash_at + 3:  # after the trials and the link
                        raise KeyboardInterrupt
                    return act(*paths)

                return or_crash

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "replace", crash(Path.replace))
                patch.setattr(os, "link", crash(os.link))
                with pytest.raises(KeyboardInterrupt):
                    make(store, made)
            make(store, made)
            assert len(set(folder(store, "moods", made).read(PROMPTS).column("text").to_pylist())) == 1
    finally:
        stages.entries.pop("toy_moods")


def test_an_empty_sidecar_is_a_part_that_is_not_finished(tmp_path: Path, trouble: Trouble):
    """As a power cut leaves one."""
    store = Store(tmp_path)
    make(store)
    step = folder(store)
    step.manifest_path.unlink()
    (step.path / "part-00001.json").write_bytes(b"")
    assert step.missing(SHARDS) == [1]
    make(store)
    assert trouble.calls == SHARDS + 1


def test_a_disk_that_cannot_be_read_for_a_moment_is_no_damage(tmp_path: Path, trouble: Trouble, monkeypatch):
    """An OSError, which is tried again, and no advice to delete what is good."""
    store = Store(tmp_path)
    make(store)

    def busy(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", busy)
    with pytest.raises(OSError, match="Input/output error"):
        folder(store).read(REWARDS)

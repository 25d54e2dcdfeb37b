"""`verify` finds every flipped bit, and what it sets aside is made again with the same bytes."""

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.store import Store
from pipeline.store.verify import find_damage, set_aside
from tests.chain import recipe, toys
from tests.pipeline.store.test_store import SHARDS, Trouble, contents, folder, make, plan_of_one
from tests.runs import local

MODEL = {"size": 40}


@pytest.fixture
def store(tmp_path: Path, trouble: Trouble) -> Store:
    """A finished run of tables, and one of a model."""
    store = Store(tmp_path / "store")
    make(store)
    make(store, plan_of_one("toy_model", **MODEL))
    return store


def sealed_files(store: Store) -> list[Path]:
    return sorted(file for file in local(store.root).glob("toy_*/**/*") if file.is_file())


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_an_undamaged_store_has_no_damage(store: Store):
    assert list(find_damage(store)) == []


def test_every_flipped_bit_is_found(store: Store):
    """300 of them, one at a time, in tables, manifests, sidecars and weights; the file is named."""
    choose, files = random.Random(0), sealed_files(store)
    assert len({file.suffix for file in files}) == 3
    for _ in range(300):
        file = choose.choice(files)
        content, bit = file.read_bytes(), choose.randrange(8 * file.stat().st_size)
        flip(file, bit)
        key = file.relative_to(local(store.root)).parts[1]
        damages = {damage.file for damage in find_damage(store, {key})}
        assert damages & {file.name, "model"}, (file, bit)
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["prompts", "rewards", "part-00001", "part-whole", "manifest", "model.safetensors"])
def test_what_was_set_aside_is_made_again_with_the_same_bytes(store: Store, name: str):
    """Every table and the weights; sidecars and manifests say how long that took. Nothing else is written."""
    before = {file: file.read_bytes() for file in sealed_files(store)}
    times = {file: file.stat().st_mtime_ns for file in before}
    file = next(file for file in before if file.name.startswith(name))
    flip(file, 99)
    moved, _ = set_aside(store, find_damage(store))
    assert file.name in {found.name for where in moved for found in local(where).rglob("*")}
    make(store)
    make(store, plan_of_one("toy_model", **MODEL))
    assert list(find_damage(store)) == []
    assert {other: other.read_bytes() for other in before if other.suffix != ".json"} == {
        other: content for other, content in before.items() if other.suffix != ".json"
    }
    written = [other for other in sealed_files(store) if other.stat().st_mtime_ns != times.get(other)]
    steps = {other.relative_to(local(store.root)).parts[0] for other in written}
    assert len(steps) <= 1, "what was made from it has the same input, and stays"


def test_what_is_not_made_again_yet_is_damage(store: Store):
    """Also when `--repair` was cut off after it had set something aside."""
    flip(next(local(folder(store).path).glob("rewards-00001.*")), 99)
    set_aside(store, find_damage(store))
    assert [damage.file for damage in find_damage(store)] == ["repair.json"]
    make(store)
    assert list(find_damage(store)) == []


def test_a_damaged_sidecar_of_a_finished_step_does_not_undo_the_step(store: Store, trouble: Trouble):
    flip(local(folder(store).path) / f"part-00001-of-{SHARDS:05d}.json", 99)
    _, unfinished = set_aside(store, find_damage(store))
    assert not unfinished
    assert folder(store).manifest
    assert make(store) == []


def test_a_damaged_file_of_a_run_is_found_and_set_aside(store: Store):
    link = local(store.root) / "runs" / "toy.json"
    link.write_text("{")
    damages = list(find_damage(store))
    assert [str(damage) for damage in damages] == ["runs/toy.json: cannot be read"]
    set_aside(store, damages)
    assert not link.exists()
    make(store)
    assert set(store.runs()) == {"toy", "m"}


@pytest.mark.parametrize("damaged", ["a table", "nothing"])
def test_the_command_lists_damage_and_ends_with_2(winnow, store: Store, damaged: str):
    words = ("verify", "--store", str(store.root))
    if damaged == "nothing":
        assert winnow(*words) == (0, "no damage: every stored byte is as it was written\n")
        return
    file = next(local(folder(store).path).glob("rewards-00001.*"))
    flip(file, 99)
    before = contents(store)
    code, output = winnow(*words)
    assert code == 2
    assert file.name in output
    assert "verify --repair" in output
    assert contents(store) == before
    assert winnow("verify", "m", "--store", str(store.root))[0] == 0, "another run"
    assert winnow("verify", "tox", "--store", str(store.root))[0] == 2


def test_repair_calls_a_run_again_as_it_was_called(winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the command that the store has of it, without --force, in the folder where it was called."""
    calls, run = [], subprocess.run

    def call(words: list[str], **options: Any) -> object:
        if words[1:3] != ["-m", "jobs"]:
            return run(words, **options)
        calls.append((options["cwd"], words[3:]))
        return winnow(*words[3:])  # in this process, which has the toy stages

    with toys():
        file = recipe(tmp_path)
        assert winnow("run", file, "--force", "draw")[0] == 0
        table = next((tmp_path / "store" / "toy_rate").glob("*/rewards-00001.*"))
        content = table.read_bytes()
        flip(table, 99)
        monkeypatch.setattr(subprocess, "run", call)
        code, output = winnow("verify", "--repair")
    assert (code, calls) == (0, [(str(tmp_path), ["run", str(file)])]), output
    assert table.read_bytes() == content

"""Weight files of a model folder: one set, or a reason that names the file and what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import ModelPath
from pipeline.store.fingerprints import model_digest, model_files
from tests.pipeline.config.test_plan import fake_model

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    """Write two shards of one tensor each, `a` and `b`, and an index that says so or what `weight_map` says."""
    for name, file in (("a", ONE), ("b", TWO)):
        save_file({name: np.zeros(2, np.float32)}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map or {"a": ONE, "b": TWO}}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with one weight file."""
    return Path(fake_model(tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A model folder with two shards and their index."""
    (folder / "model.safetensors").unlink()
    write_shards(folder)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=str(folder)) as caught:
        ModelPath(str(folder))
    return str(caught.value)


def test_shards_with_their_index_are_one_set(sharded):
    assert ModelPath(str(sharded)).digest
    assert {file.name for file in model_files(sharded)} >= {ONE, TWO, INDEX}


def test_a_stale_file_beside_shards_and_index_is_refused(folder):
    """transformers would read `model.safetensors`, vLLM the shards."""
    write_shards(folder)
    message = refusal(folder)
    assert all(fact in message for fact in ("model.safetensors", INDEX, ONE, "vLLM", "transformers", "remove"))


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    message = refusal(sharded)
    assert all(fact in message for fact in (ONE, INDEX, "save_pretrained"))


def test_a_shard_beside_one_file_is_refused(folder):
    """Without an index vLLM would read both."""
    save_file({"a": np.zeros(2, np.float32)}, folder / ONE)
    assert all(fact in refusal(folder) for fact in ("model.safetensors", ONE, "remove"))


def test_an_index_that_names_an_absent_shard_is_refused(sharded):
    (sharded / TWO).unlink()
    assert all(fact in refusal(sharded) for fact in (INDEX, TWO, "not there"))


def test_an_index_of_another_model_is_refused(sharded):
    write_shards(sharded, {"a": ONE, "c": TWO})
    assert all(fact in refusal(sharded) for fact in ("c", TWO, "two models"))
    write_shards(sharded, {"a": ONE})
    ModelPath(str(sharded))  # a shard that the index does not name is read by nobody
    save_file({"a": np.zeros(2, np.float32), "more": np.zeros(1, np.float32)}, sharded / ONE)
    assert "more" in refusal(sharded)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": [1]}'])
def test_an_index_that_is_damaged_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    assert INDEX in refusal(sharded)


def test_a_damaged_file_is_refused_by_name(sharded):
    content = (sharded / TWO).read_bytes()
    (sharded / TWO).write_bytes(content[:-1])
    assert all(fact in refusal(sharded) for fact in (TWO, "truncated"))


def test_a_git_lfs_pointer_is_named_as_one(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert all(fact in refusal(folder) for fact in ("LFS", "git lfs pull"))


def test_files_that_no_loader_reads_are_no_part_of_the_model(folder):
    """Mistral's own format, pickles, an optimizer: not copied into the store, where vLLM would prefer the first."""
    before = model_digest(folder)
    save_file({"a": np.zeros(2, np.float32)}, folder / "consolidated.safetensors")
    save_file({"a": np.zeros(2, np.float32)}, folder / "optimizer.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert ModelPath(str(folder)).digest == before
    assert "consolidated.safetensors" not in {file.name for file in model_files(folder)}


def test_a_folder_that_is_model_and_adapter_at_once_is_refused(folder):
    """transformers would add the adapter, vLLM not."""
    (folder / "adapter_config.json").write_text("{}")
    assert all(fact in refusal(folder) for fact in ("adapter_config.json", "`adapter`", "`path`"))

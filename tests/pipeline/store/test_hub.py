"""Models by name: read from the hub's own cache, known by their content, and refused where the name says too little."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.context import StageContext
from pipeline.store.fingerprints import ModelPath
from schemas import Model, WinnowError
from stages.network.models import model
from tests.hub import add_snapshot


@pytest.fixture
def cache(tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with org/policy at main and, with another context, at v2; the working folder is empty."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    second = tmp_path / "second"
    shutil.copytree(tiny.folder, second)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    add_snapshot(folder, "org/policy", tiny.folder)
    add_snapshot(folder, "org/policy", second, ref="v2")
    return folder


def plan(**options: str) -> Plan:
    return make_plan(Recipe("test", target="sft", steps={"sft": {"use": "model", "with": options}}))


def problem(**options: str) -> str:
    with pytest.raises(WinnowError) as caught:
        plan(**options)
    (line,) = caught.value.problems
    return line


def test_a_model_by_name_has_the_key_of_the_same_folder(cache: Path, tiny: Model):
    """Content is the identity: neither name nor revision is part of the key."""
    key = plan(path=str(tiny.folder)).steps[0].key
    assert plan(path="org/policy").steps[0].key == key
    assert plan(path="org/policy", revision="main").steps[0].key == key
    assert plan(path="org/policy", revision="v2").steps[0].key != key


def test_a_revision_may_be_a_branch_a_tag_or_a_commit(cache: Path):
    commit = (cache / "models--org--policy/refs/v2").read_text()
    paths = [ModelPath("org/policy", revision) for revision in ("v2", commit)]
    assert paths[0].path == paths[1].path
    assert paths[0].source == f"org/policy@{commit}"


def test_the_stage_copies_it_without_links_into_the_cache(cache: Path, ctx: StageContext, tiny: Model):
    policy = model(ctx, path=ModelPath("org/policy"))
    assert policy.digest == tiny.digest
    assert not any(file.is_symlink() for file in policy.folder.rglob("*"))


def test_what_is_not_in_the_cache_is_refused_with_the_command_that_fetches_it(cache: Path):
    line = problem(path="org/other")
    assert line.startswith("sft.path: ")
    assert "`hf download org/other`" in line
    assert "`hf download org/policy --revision v3`" in problem(path="org/policy", revision="v3")


def test_an_interrupted_download_is_refused(cache: Path):
    """The hub's cache lists the files of a commit; a chat template that is missing would be another prompt."""
    repository = cache / "models--org--policy"
    commit = (repository / "refs/main").read_text()
    snapshot = repository / "snapshots" / commit
    entries = {file.name: TreeCacheEntry(1, "0") for file in snapshot.iterdir()}
    write_tree_cache(str(repository), commit, entries | {"model.gguf": TreeCacheEntry(1, "0")})
    assert plan(path="org/policy"), "weights in another format need not be there"
    (snapshot / "tokenizer_config.json").unlink()
    assert "`hf download org/policy` again" in problem(path="org/policy")


def test_a_folder_of_that_name_is_taken_and_one_beside_a_cached_model_is_ambiguous(cache: Path, tiny: Model):
    shutil.copytree(tiny.folder, "mine/policy")
    assert ModelPath("mine/policy").path == Path("mine/policy").resolve()
    shutil.copytree(tiny.folder, "org/policy")
    line = problem(path="org/policy")
    assert [word for word in ("./org/policy", "`revision`") if word not in line] == []
    assert ModelPath("./org/policy").path == Path("org/policy").resolve()
    assert ModelPath("org/policy", "main").hub_name == "org/policy"


def test_a_folder_has_no_revision(cache: Path, tiny: Model):
    assert "unset `revision`" in problem(path=str(tiny.folder), revision="main")

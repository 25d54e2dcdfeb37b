"""The policy of a run: found by the run's name, copied with a card, uploaded to a hub; its card is in no digest."""

import base64
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.models import _steps_behind, copy_model, find_model
from pipeline.context import StageContext
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.fingerprints import CARD, ModelPath, model_digest
from pipeline.store.store import Store
from schemas import Model, WinnowError
from stages.network.card import read_metadata
from stages.network.models import model, reward_head
from tests.hub import add_snapshot
from tests.jobs.test_cli import missing
from tests.material import cache, context, random_rows, train
from tests.runs import SHORT, Silent, plan_of

CARD_OF_BASE = """---
license: llama3.2
license_link: https://example.org/LICENSE
language: [en]
base_model: another/one
pipeline_tag: image-to-text
---
# Its own words
"""


@pytest.fixture(scope="module")
def policies(data_dir: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with two rounds of RAFT, without their evaluation; what they share with RSO is from its run."""
    root = tmp_path_factory.mktemp("policies") / "store"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("runs"))
    store = Store(root)
    run(plan_of(data_dir, "rounds=2", "target=optimize", *SHORT, recipe="raft"), store, LocalExecutor(), Silent())
    return store


def test_what_a_ranker_reads_is_not_said_of_the_policy(finished: Path):
    """The policy was trained with neither its chat template nor its system prompt; its data are the run's."""
    policy = find_model(Store(finished), "run")
    names, all_names = ({step for step, _ in _steps_behind(policy, with_rankers=with_it)} for with_it in (False, True))
    assert {"optimize", "sft", "prompts"} <= names
    assert all_names - names >= {"ranker", "ranker_examples", "preferences"}


@pytest.mark.parametrize(
    "words", [["sql", "SELECT step, round FROM runs", "--run"], ["status", "--run"], ["ls"], ["trace"]]
)
def test_commands_take_a_round_by_the_name_that_the_leaderboard_has(winnow, policies: Store, words: list[str]):
    at = ("--store", str(policies.root))
    texts = {name: winnow(*words, name, *at) for name in ("run", "run@1", "run@2", "run@3")}
    assert [code for code, _ in texts.values()] == [0, 0, 0, 2]
    assert texts["run@1"] != texts["run@2"]
    assert missing(["no round 3"], texts["run@3"][1]) == []
    if words != ["trace"]:  # which without a round has the last one
        assert len(texts["run@2"][1]) < len(texts["run"][1])


@pytest.fixture
def base(tiny: Model, tmp_path: Path, ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The tiny model by stage `model`, from the hub's cache, where it has a card with a licence."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder, tmp_path / "download")
    (tmp_path / "download" / CARD).write_text(CARD_OF_BASE)
    add_snapshot(tmp_path / "cache", "org/policy", tmp_path / "download")
    return model(ctx, path=ModelPath("org/policy"))


# Finding and copying


def test_a_run_is_known_by_its_name_and_a_round_by_its_number(policies: Store):
    folders = [find_model(policies, name).folder for name in ("run@1", "run@2", "run")]
    assert folders[1] == folders[2] != folders[0]
    assert find_model(policies, "run", "ranker").step == "ranker"
    assert find_model(policies, "run@1", "ranker").step == "ranker"
    with pytest.raises(WinnowError, match="run@1 --step optimize@2: these are two rounds"):
        find_model(policies, "run@1", "optimize@2")


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["rum"], ["no run 'rum'", "did you mean 'run'?"]),
        (["run@3"], ["no round 3", "run@1, run@2"]),
        (["run", "--step", "rankr"], ["no step 'rankr'", "did you mean 'ranker'?"]),
        (["run", "--step", "prompts"], ["prompts makes no model"]),
        (["run", "--link"], ["--to"]),
        (["run", "--push", "name"], ["org/name"]),
    ],
)
def test_a_mistake_is_one_line(winnow, policies: Store, words: list[str], facts: list[str]):
    code, text = winnow("model", *words, "--store", policies.root)
    assert code == 2
    assert missing(facts, text) == []


def test_a_run_without_a_policy_of_its_own_names_its_models(winnow, data_dir: Path, tmp_path: Path):
    store = Store(tmp_path / "store")
    run(plan_of(data_dir, "target=sample", recipe="sft"), store, LocalExecutor(), Silent())
    code, text = winnow("model", "run", "--store", store.root)
    assert code == 2
    assert missing(["--step sft"], text) == []


def test_a_policy_that_is_not_trained_yet_is_said(data_dir: Path, tmp_path: Path):
    store = Store(tmp_path / "store")
    store.link_run("run", plan_of(data_dir).steps)
    with pytest.raises(WinnowError, match="optimize is not finished"):
        find_model(store, "run")


def test_the_command_prints_the_folder_alone_and_the_end_of_a_run_prints_it_too(winnow, data_dir: Path, tmp_path: Path):
    """So that `$(winnow model rso)` is a path, which transformers loads."""
    store = tmp_path / "store"
    command = ["run", "dpo", "--config", data_dir / "demo.yaml", "--store", store, "--set", "target=optimize"]
    _, text = winnow(*command, "--set", "optimize.epochs=1")
    name = next(iter(Store(store).runs()))
    folder = winnow("model", name, "--store", store)[1].strip()
    assert f"policy of {name}: {folder}" in text
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_copy_is_the_same_model_and_loads_alone(winnow, policies: Store, tmp_path: Path):
    code, text = winnow("model", "run", "--to", "mine/policy", "--store", policies.root)
    assert (code, text.strip()) == (0, "mine/policy")
    copy = tmp_path / "mine" / "policy"
    assert model_digest(copy) == find_model(policies, "run").manifest["model"]
    AutoModelForCausalLM.from_pretrained(copy)
    AutoTokenizer.from_pretrained(copy)
    code, text = winnow("model", "run", "--to", "mine/policy", "--store", policies.root)
    assert code == 2
    assert "not an empty folder" in text


def test_a_linked_copy_takes_no_space_and_leaves_the_stores_card_alone(policies: Store, tmp_path: Path):
    found = find_model(policies, "run")
    card = (found.folder / CARD).read_text()
    copy_model(found, tmp_path / "linked", link=True)
    assert (tmp_path / "linked" / "model.safetensors").samefile(found.folder / "model.safetensors")
    assert (found.folder / CARD).read_text() == card != (tmp_path / "linked" / CARD).read_text()


# Cards


def test_the_card_of_a_copy_names_the_base_and_states_its_licence(base: Model, tiny: Model):
    metadata = read_metadata(base.folder)
    expected = {"license": "llama3.2", "license_link": "https://example.org/LICENSE", "language": ["en"]}
    assert metadata.items() >= (expected | {"base_model": "org/policy"}).items()
    assert "pipeline_tag" not in metadata, "that is the card of another model"
    assert model_digest(base.folder) == tiny.digest


def test_the_card_of_a_trained_policy_has_base_licence_method_options_and_figures(base: Model, tmp_path: Path):
    policy, metrics, _ = train(base, cache(base, random_rows()), tmp_path / "trained")
    card = ModelCard.load(policy.folder / CARD)
    assert card.data.license == "llama3.2"
    assert card.data.base_model == "org/policy"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["winnow", "sigmoid_norm"]
    last = max(step for step, name in metrics if name == "loss")
    facts = ["org/policy@", "`sigmoid_norm(", "| learning_rate | `0.001` |", f"{metrics[last, 'loss']:.4g} |"]
    assert missing(facts, card.text) == []


def test_training_again_gives_the_same_card_and_it_is_in_no_digest(base: Model, tmp_path: Path):
    rows = cache(base, random_rows())
    first, second = (train(base, rows, tmp_path / name)[0] for name in ("first", "second"))
    assert (first.folder / CARD).read_bytes() == (second.folder / CARD).read_bytes()
    digest = model_digest(first.folder)
    (first.folder / CARD).write_text("other words")
    assert model_digest(first.folder) == digest


def test_licence_and_base_pass_through_a_reward_model_and_further_rounds(base: Model, tmp_path: Path):
    head = reward_head(base, context(tmp_path / "head"))
    again, *_ = train(train(base, cache(base, random_rows()), tmp_path / "one")[0], random_rows(), tmp_path / "two",
                      objective="sigmoid_mean")  # fmt: skip
    for folder in (head.folder, again.folder):
        assert read_metadata(folder).items() >= {"license": "llama3.2", "base_model": "org/policy"}.items()
    assert "Its own words" not in (again.folder / CARD).read_text()


def test_a_base_without_a_card_or_with_a_damaged_one_is_no_mistake(tiny: Model, tmp_path: Path, ctx: StageContext):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "mine"))
    for text in ("---\nlicense: [\n---\n", "no front matter", "---\n- a list\n---\n"):
        (folder / CARD).write_text(text)
        metadata = read_metadata(model(ctx, path=ModelPath(str(folder))).folder)
        assert metadata == {"winnow": {"base": "mine"}}


def test_the_card_of_an_exported_policy_adds_data_and_evaluation(finished: Path, tmp_path: Path):
    """The figures are the leaderboard's; files by their names and the beginnings of their digests."""
    found = find_model(Store(finished), "run")
    copy_model(found, tmp_path / "copy")
    text = (tmp_path / "copy" / CARD).read_text()
    facts = ["## Figures of the training", "## Data of the run", "| prompts | prompts | prompts.jsonl ("]
    facts += ["preferences.jsonl (", "## Evaluation", "| gold_win |", "| kl_nats |"]
    assert missing(facts, text) == []
    assert text.count("\n---\n") == 1
    assert read_metadata(tmp_path / "copy")["tags"] == ["winnow", "sigmoid_norm"]


# The hub


class FakeHub(BaseHTTPRequestHandler):
    """Answers of a hub to the calls of an upload; the class keeps the requests and the files of each commit."""

    requests: ClassVar[list[tuple[str, dict]]]
    files: ClassVar[dict[str, bytes]]
    status: ClassVar[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        path, answer = self.path.partition("?")[0], dict[str, Any]()
        FakeHub.requests.append((path, dict(self.headers) | {"body": lines}))
        if path.endswith("/preupload/main"):
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
                ]
            }
        elif path.endswith("/commit/main"):
            values = [line["value"] for line in lines if line["key"] == "file"]
            FakeHub.files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            answer = {"commitUrl": f"{constants.ENDPOINT}/org/mine/commit/1", "commitOid": "1", "hookOutput": ""}
        else:
            answer = {"url": f"{constants.ENDPOINT}/org/mine", "name": "org/mine"}
        content = json.dumps(answer).encode()
        self.send_response(FakeHub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.requests, FakeHub.files, FakeHub.status = [], {}, 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    yield FakeHub
    server.shutdown()
    server.server_close()


def test_a_policy_is_uploaded_with_its_card_private_and_by_the_token_of_the_environment(winnow, policies: Store, hub):
    code, text = winnow("model", "run", "--push", "org/mine", "--store", policies.root)
    assert code == 0, text
    found = find_model(policies, "run")
    assert hub.files["model.safetensors"] == (found.folder / "model.safetensors").read_bytes()
    assert b"## Run run@2" in hub.files[CARD]
    path, create = hub.requests[0]
    assert path == "/api/repos/create"
    assert create["body"][0].get("private") is True or create["body"][0].get("visibility") == "private"
    assert {request["authorization"] for _, request in hub.requests if "authorization" in request} == {
        "Bearer of-the-environment"
    }


def test_what_the_hub_refuses_is_one_line_with_the_cure(winnow, policies: Store, hub, monkeypatch: pytest.MonkeyPatch):
    hub.status = 401
    code, text = winnow("model", "run", "--push", "org/mine", "--store", policies.root)
    assert code == 2
    assert missing(["--push org/mine", "`hf auth login`", "HF_TOKEN"], text) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, text = winnow("model", "run", "--push", "org/mine", "--store", policies.root)
    assert code == 2
    assert "HF_HUB_OFFLINE" in text

"""Shared by all tests: a tiny model of random weights, and a tiny data set on disk, both made on the spot."""

import atexit
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread a process, set before torch is loaded: tests run several processes on two cores.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
# Tests start about 80 processes with the packages, and would compile them in each of them: a third of such a start
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, which each engine fills with zeros: a second less per start
os.environ["WINNOW_SYNC"] = "off"  # stores of tests are scratch; tests of power cuts set it to on
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
    "0"  # Ray on the loopback address, as pipeline.execution.ray_executor has it
)

if os.environ.get("WINNOW_TEST_DEVICE") != "cuda":  # tests state laws of a CPU, exact ones among them
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from filelock import FileLock
from hypothesis import settings

import jobs.demo.gold  # noqa: F401 - registers the gold reward
import stages.all  # noqa: F401 - registers every stage
from jobs.__main__ import main
from pipeline.context import StageContext, WarmCache
from pipeline.execution import executor
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.fingerprints import DataPath, model_digest
from pipeline.store.store import Store
from schemas import Model
from stages.network.models import untrained
from tests.runs import Silent, plan_of

sys.dont_write_bytecode = False  # as above, of this process
# Functions that a test defines or replaces are of its process alone; tests of other processes set these themselves.
executor.LONG_PART, executor.LARGE_PART = float("inf"), 2**62

gc.set_threshold(50_000)  # one for every 700 new objects takes a quarter of the time in which tests are collected
atexit.register(gc.unfreeze)  # libraries report what they have leaked; pytest itself collects five times before

BuildOnce = Callable[[str, Callable[[Path], object]], Path]
WORLD = Path(__file__).parent / "tiny.yaml"
MARKS = ["[CONTEXT]", "[RESPONSE A]", "[RESPONSE B]"]
WORDS = ("boat", "table", "room", "car")
CITIES = ("Oslo", "Paris", "Rome", "Cairo", "Kyoto")
DAYS = ("Monday", "Friday", "Sunday")


def ask(thing: str, city: str, day: str) -> str:
    return f"Please book a {thing} for two on {day} in {city}."


def answer(thing: str, city: str, day: str) -> str:
    return f"Gladly. I have booked a {thing} for two on {day} in {city}."


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Files of one process: those that sample with vLLM, or train with TRL, import it once.
WITH_VLLM = [
    "stages/sampling/test_engines.py",
    "stages/sampling/test_engine_options.py",
    "stages/sampling/test_sampling_parameters.py",
    "stages/training/test_agreement.py",
    "jobs/test_real_demo.py",
    "stages/test_pipeline_on_vllm.py",
]
# Those that share one local Ray: the first starts it, because its workers have the environment of that moment.
WITH_RAY = [
    "pipeline/store/test_object_store.py",
    "pipeline/execution/test_distributed.py",
    "pipeline/execution/test_schedule.py",
    "pipeline/execution/test_plans_at_once.py",
]
WITH_TRL = ["jobs/test_export.py", "stages/training/test_against_trl.py"]
# A long file at the end would leave the other worker without work: these are the first.
LONGEST = [
    *WITH_VLLM,
    *WITH_RAY,
    "stages/test_end_to_end.py",
    "pipeline/execution/test_run.py",
    "jobs/test_submit.py",
    "jobs/test_cli.py",
    "jobs/test_report.py",
    "jobs/test_diagnose.py",
    "stages/training/test_trainer.py",
]
TOGETHER = {f"tests/{file}": files[0] for files in (WITH_VLLM, WITH_RAY, WITH_TRL) for file in files}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {f"tests/{file}": place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the libraries and tests that are loaded: there are millions of objects."""
    freeze_libraries()


def pytest_runtest_setup() -> None:
    """As `pytest_collection_finish`, of a library that a test has loaded since, such as vLLM."""
    if len(sys.modules) > frozen_modules + 500:
        freeze_libraries()


frozen_modules = 0


def freeze_libraries() -> None:
    global frozen_modules
    gc.collect()
    gc.freeze()
    frozen_modules = len(sys.modules)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a file at a time, or the files of one process."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None
    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope
    scheduler._split_scope = lambda nodeid: TOGETHER.get(file_of(nodeid), file_of(nodeid))
    return scheduler


# How long a case takes is no claim; and half of the usual 100 cases, because laws are tested in each run of the suite.
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")


@pytest.fixture
def ctx(tmp_path: Path) -> StageContext:
    """A workspace for calling a stage directly."""
    return StageContext(tmp_path / "step", WarmCache(), lambda *progress: None)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> BuildOnce:
    """Returns the folder of this name that a function has filled: in the first worker that needs it, for all of them.

    No test may change what is in it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "built_once"

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, finished = root / name, root / f"{name}.finished"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not finished.exists():
                fill(folder)
                finished.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def data_dir(build_once: BuildOnce) -> Path:
    """A folder with demonstrations, prompts, preferences, and the demo.yaml that names them."""
    return build_once("data_dir", write_data)


def write_data(folder: Path) -> None:
    slots = [(thing, city, day) for thing in WORDS for city in CITIES for day in DAYS]
    write_jsonl(
        folder / "demonstrations.jsonl",
        [{"prompt": ask(*slot), "demonstration": answer(*slot)} for slot in slots],
    )
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": ask(*slot) + " Thank you.", "demonstration": answer(*slot)} for slot in slots[:24]],
    )
    write_jsonl(
        folder / "preferences.jsonl",
        [
            {"prompt": ask(*slot) + " Hello.", "chosen": answer(*slot), "rejected": f"Um, a {slot[0]}. {n % 7}"}
            for n, slot in enumerate(slots)
        ],
    )
    (folder / "demo.yaml").write_text(WORLD.read_text())


@pytest.fixture(scope="session")
def tiny(data_dir: Path, build_once: BuildOnce) -> Model:
    """A two-layer Llama with random weights and a tokenizer of its own."""
    return untrained_model(build_once, "tiny", data_dir, marks=MARKS, hidden=64, layers=2, heads=2, context=128)


@pytest.fixture(scope="session")
def unmarked(data_dir: Path, build_once: BuildOnce) -> Model:
    """A model whose tokenizer has no marks of the pairwise ranker, as public ones have none."""
    return untrained_model(build_once, "unmarked", data_dir, hidden=32, layers=1)


def untrained_model(build_once: BuildOnce, name: str, data_dir: Path, **options: Any) -> Model:
    corpus = DataPath(str(data_dir / "demonstrations.jsonl"))

    def fill(folder: Path) -> None:
        ctx = StageContext(folder, WarmCache(), lambda *progress: None)
        untrained(ctx, corpus=corpus, columns=["prompt", "demonstration"], vocabulary=400, **options)

    folder = build_once(name, fill) / "model"
    return Model(folder, model_digest(folder))


@pytest.fixture(scope="session")
def sharp(tiny: Model, build_once: BuildOnce) -> Model:
    """The tiny model with larger weights: its logits differ by nats, so that a wrong position or mask shows."""
    import torch

    from stages.network.load import load_network

    def fill(folder: Path) -> None:
        shutil.copytree(tiny.folder, folder, dirs_exist_ok=True)
        network = load_network(tiny)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.dim() == 2:
                    weight.mul_(5)
        network.save_pretrained(folder)

    folder = build_once("sharp", fill)
    return Model(folder, model_digest(folder))


@pytest.fixture(scope="session")
def finished(data_dir: Path, build_once: BuildOnce) -> Path:
    """The store of an undisturbed run of RSO on the tiny data set, in process."""
    return build_once("finished", lambda root: run(plan_of(data_dir), Store(root), LocalExecutor(), Silent()))


@pytest.fixture
def winnow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs the command in this process, in a folder of its own; returns the exit code and all that was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return code, said.out + said.err

    return run


@pytest.fixture
def calling(tiny, tmp_path):
    """The tiny model with a chat template that renders tools and calls."""
    shutil.copytree(tiny.folder, tmp_path / "calling")
    (tmp_path / "calling" / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    config = tmp_path / "calling" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    return Model(tmp_path / "calling", "calling")

"""Memory of a device over a run: what is held is given back, what is not free is said, what does not fit halves."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.context import WarmCache
from pipeline.execution.actors import StageWorker
from pipeline.resources import Resources, working_with
from schemas import MachineError, Model, WinnowError
from stages.network import device, forward, load
from stages.network.device import default_device
from stages.network.forward import forward_rows, logp_of
from stages.network.load import load_network
from stages.ranking import rankers
from stages.sampling.engines import transformers as engine
from stages.sampling.engines import vllm
from stages.training import trainer
from tests.material import bound
from tests.stages.network.test_one_network import in_memory

RECIPE = """
shards: 1
target: again
base: {{use: model, with: {{path: {folder}}}}}
prompts: {{use: prompts, from: {{tokenizer: base}}, with: {{path: {data}, demonstration: demonstration, heldout: 0.0}}}}
sample:
  from: {{prompts: prompts, policy: base}}
  with: &draws {{engine: transformers, n: 2, max_tokens: 4, temperature: 1.0, top_k: 0}}
reward: {{from: {{prompts: prompts, candidates: sample}}, with: {{by: {{name: brevity, words: 2}}}}}}
select: {{from: {{rewards: reward}}, with: {{rule: {{name: best_of, k: 1}}}}}}
examples:
  from: {{prompts: prompts, candidates: sample, selections: select}}
  with: {{imitate: selected}}
tuned:
  use: optimize
  from: {{init: base, examples: examples}}
  with: {{objective: nll, learning_rate: 1.0e-3, batch_size: 8}}
again: {{use: sample, from: {{prompts: prompts, policy: tuned}}, with: {{<<: *draws}}}}
"""


class FakeDevice:
    """Device with room for one and a half networks, on which all tensors of this process are, but for earlier ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: float) -> None:
        self.before, self.limit = in_memory()[1], 1.5 * weights
        self.free: list[float] = []  # in networks, when one comes
        self.weights = weights
        monkeypatch.setattr(device, "free_memory", self.memory)

    def memory(self, _: torch.device) -> tuple[float, float]:
        others = in_memory(collect=False)[1] - self.before - self.weights  # what comes is on the host until then
        free = self.limit - others
        self.free.append(free / self.weights)
        return free, self.limit


@pytest.fixture
def small_device(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    weights = sum(weight.numel() * 4 for weight in load_network(tiny).parameters())
    small = FakeDevice(monkeypatch, weights)
    gc.collect()
    gc.disable()
    yield small
    gc.enable()


@pytest.fixture
def words(tiny: Model, data_dir: Path, tmp_path: Path) -> list[str | Path]:
    (tmp_path / "mem.yaml").write_text(RECIPE.format(folder=tiny.folder, data=data_dir / "prompts.jsonl"))
    return ["run", tmp_path / "mem.yaml", "--store", tmp_path / "store"]


def test_engine_training_engine_fit_one_after_the_other(winnow, words: list[str | Path], small_device: FakeDevice):
    """On a device with room for one network and a half, in one process, before Python collects anything."""
    code, text = winnow(*words)
    assert code == 0, text
    assert len(small_device.free) >= 5  # two engines, the trained network, what was saved of it, the one it began from
    assert min(small_device.free) >= 1.0


def test_an_engine_finds_no_room_where_nothing_is_given_back(
    winnow, words: list[str | Path], small_device: FakeDevice, monkeypatch: pytest.MonkeyPatch
):
    """The control. It is said before the network moves there: what it takes, what is free, and what to do."""
    for module in (load, engine, trainer):
        monkeypatch.setattr(module, "free", lambda network: None)
    monkeypatch.setattr(device, "release", lambda device: None)
    code, text = winnow(*words)
    assert code
    assert "GiB free" in text
    assert "gpus: 1" in text


class SmallMemory:
    """Device on which a forward pass of more than so many tokens does not fit."""

    def __init__(self, network, tokens: int) -> None:
        self.tokens = tokens
        self.passes: list[int] = []
        self.hook = network.base_model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs) -> None:
        self.passes.append(kwargs["input_ids"].numel())
        if self.passes[-1] > self.tokens:
            raise torch.OutOfMemoryError("does not fit")


ROWS = [([5, 6, 7, n], [8, 9, 10 + n, 1]) for n in range(12)]


def test_scoring_goes_on_with_half_the_budget(sharp: Model):
    """No prompt is blamed; the numbers are those of a pass that fits, and the next part begins with what fitted."""
    network = load_network(sharp)
    expected = forward_rows(logp_of, network, ROWS, "float32", 8)
    small = SmallMemory(network, tokens=32)
    with pytest.warns(UserWarning, match=r"64 tokens in a forward pass; it goes on with 32"):
        values = forward_rows(logp_of, network, ROWS, "float32", 64)
    assert values == pytest.approx(expected, rel=1e-5)
    small.passes.clear()
    assert forward_rows(logp_of, network, ROWS, "float32", 64) == pytest.approx(expected, rel=1e-5)
    assert max(small.passes) <= 32
    assert forward.FITTING[network] == 32


def test_a_row_that_never_fits_is_refused_with_its_length(sharp: Model):
    network = load_network(sharp)
    SmallMemory(network, tokens=3)
    with (
        pytest.warns(UserWarning, match="goes on with"),
        pytest.raises(WinnowError, match=r"one response, of 8 tokens.*bfloat16"),
    ):
        forward_rows(logp_of, network, ROWS, "float32", 64)


def test_a_stage_without_gpus_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Also where there are some, which another stage has reserved; and a worker's libraries see none of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert default_device().type == "cuda"
    with working_with(Resources(gpus=0)):
        assert default_device().type == "cpu"
    spec: object = None
    StageWorker(spec, Resources(gpus=1))  # type: ignore[arg-type]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    StageWorker(spec, Resources(gpus=0))  # type: ignore[arg-type]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_that_nothing_would_use_are_refused():
    """Of torch, which computes on one; of vLLM, which runs on tensor_parallel times pipeline_parallel_size of them."""
    with working_with(Resources(gpus=4)):
        with pytest.raises(WinnowError, match=r"gpus: 4.*`gpus: 1`.*max_workers"):
            default_device()
        with pytest.raises(WinnowError, match=r"gpus: 4.*runs on 1.*tensor_parallel: 4"):
            vllm._check_gpus(1, {})
        vllm._check_gpus(2, {"pipeline_parallel_size": 2})
    with working_with(Resources(gpus=0)), pytest.raises(WinnowError, match=r"gpus: 0.*engine: transformers"):
        vllm._check_gpus(1, {})


def test_an_engine_is_not_started_on_a_gpu_that_others_hold(monkeypatch: pytest.MonkeyPatch):
    """The message has who holds it, and the option with the value that would do."""
    answers = {"--query-gpu": [["40960", "81920", "0"]], "--query-compute-apps": [["4242", "40000", "/usr/bin/other"]]}
    monkeypatch.setattr(vllm, "nvidia_smi", lambda query: answers[query.partition("=")[0]])
    monkeypatch.setattr(device, "nvidia_smi", lambda query: answers[query.partition("=")[0]])
    with pytest.raises(
        MachineError, match=r"40\.0 of its 80\.0 GiB free.*process 4242 \(other\), 39\.1 GiB.*: 0\.48\}"
    ):
        vllm._check_gpus(1, {})
    vllm._check_gpus(1, {"gpu_memory_utilization": 0.48})
    with pytest.raises(MachineError, match=r"takes 73\.6 GiB"):  # vLLM compares the share whatever its cache is
        vllm._check_gpus(1, {"kv_cache_memory_bytes": 1 << 30})


def test_an_engine_on_a_gpu_is_a_process_that_was_not_forked(tiny: Model, monkeypatch: pytest.MonkeyPatch):
    """A fork of a process that has asked torch for GPUs cannot use them, and vLLM forks unless it is told."""
    methods = []

    def start(**options: object) -> None:
        methods.append(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])
        raise RuntimeError("no engine in this test")

    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setattr(vllm, "_let_processes_end_with_this_one", lambda: None)
    monkeypatch.setattr(vllm, "_check_gpus", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ChildProcessError, match="no engine in this test"):
        vllm.VllmEngine(tiny.folder, "bfloat16")
    assert methods == ["spawn"]


def test_the_gpus_of_an_engine_are_the_first_that_its_process_sees(monkeypatch: pytest.MonkeyPatch):
    """Of `CUDA_VISIBLE_DEVICES: 3,1` an engine on one GPU takes number 3, which is free here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    gpus = [["40960", "81920", "1"], ["81920", "81920", "3"]]
    monkeypatch.setattr(vllm, "nvidia_smi", lambda query: gpus if "gpu" in query else [])
    monkeypatch.setattr(device, "nvidia_smi", lambda query: [])
    vllm._check_gpus(1, {})
    with pytest.raises(MachineError, match="GPU 1 has"):
        vllm._check_gpus(2, {})


def test_a_judges_engine_has_the_options_and_gpus_of_its_step(tiny: Model, monkeypatch: pytest.MonkeyPatch):
    """A judge that one GPU does not hold was started on one, whatever the profile said."""
    started = []

    def open_engine(*arguments: object) -> engine.NetworkEngine:
        started.append(arguments)
        raise WinnowError("started")

    monkeypatch.setattr("stages.sampling.engines.open_engine", open_engine)
    by = bound(rankers.ranker, "llm_judge", template="{prompt} {a} or {b}?", engine_options={"max_num_seqs": 8})
    cache = WarmCache()
    with working_with(Resources(gpus=4, tensor_parallel=4)), pytest.raises(WinnowError, match="started"):
        cache.open_once(rankers.open_ranker, by, tiny)
    assert started == [("vllm", tiny.folder, "float32", 4, '{"max_num_seqs": 8}')]

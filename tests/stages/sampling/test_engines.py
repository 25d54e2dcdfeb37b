"""Contract of every engine: ids in, ids out, a seed per request, raw log-probs; several threads at once."""

import collections
import json
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Model, WinnowError
from stages.network.forward import completion_logp
from stages.network.load import load_network, save_network
from stages.network.lora import add_adapter
from stages.sampling.engines import Completion, DeadEngineError, Request, Sampling, ignore_progress, open_engine
from stages.sampling.engines.request_queue import QueuedEngine
from stages.sampling.sample import sample
from tests.material import alone, context
from tests.stages.network.test_limits import one_prompt
from tests.stages.selection.test_kernels import follows

PROMPTS = ([0, 5, 9, 14, 30, 8], [0, 7, 7, 21], [0, 60, 61, 62, 63, 64, 65, 66, 67])
DRAWS = 4000
SAMPLING = Sampling(1.0, 0, 12, (1,))


def test_completions_are_in_the_order_of_requests_and_end_at_a_stop_id_or_max_tokens(engine, tiny):
    requests = [Request(ids, seed) for seed, ids in enumerate(PROMPTS * 3)]
    completions = engine.generate(requests, SAMPLING)
    assert len(completions) == len(requests)
    for completion in completions:
        assert 1 <= len(completion.token_ids) <= 12
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == 1)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
        assert 1 not in completion.token_ids[:-1]


def test_logp_is_raw_whatever_the_temperature(engine, tiny):
    """The summed log-prob under the policy itself: what our own forward gives for the same ids, to 1e-3."""
    requests = [Request(ids, 11 + seed) for seed, ids in enumerate(PROMPTS)]
    completions = engine.generate(requests, Sampling(0.5, 5, 8, (1,)))
    rows = [(request.prompt_ids, answer.token_ids) for request, answer in zip(requests, completions, strict=True)]
    with torch.inference_mode():
        ours, _ = completion_logp(load_network(tiny), alone(rows), "float32")
    assert [completion.logp for completion in completions] == pytest.approx(ours.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """The tiny model with an adapter, which training leaves beside its base's weights."""
    network = load_network(tiny, adapt=partial(add_adapter, rank=3, alpha=None, targets=[], seed=0))
    with torch.no_grad():
        for parameter, weight in network.named_parameters():
            if "lora_B" in parameter:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return save_network(network, tiny, tmp_path_factory.mktemp("adapted") / "model", merge=False)


OPTIONS = {"max_num_seqs": 9, "block_size": 64, "max_model_len": 100}


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine_with_options(request, adapted):
    """An engine of that policy; vLLM with options."""
    opened = open_engine(
        request.param, adapted.folder, "float32", 1, json.dumps(OPTIONS if "vllm" in request.param else {})
    )
    yield opened
    opened.close()


def test_a_policy_with_its_adapter_is_sampled_with_it(engine_with_options, adapted, tiny):
    """Both engines read the adapter: log-probs are our forward's."""
    requests = [Request(ids, seed) for seed, ids in enumerate(PROMPTS)]
    completions = engine_with_options.generate(requests, SAMPLING)
    rows = alone([(ids, answer.token_ids) for ids, answer in zip(PROMPTS, completions, strict=True)])
    with torch.inference_mode():
        ours, bases = (completion_logp(load_network(model), rows, "float32")[0] for model in (adapted, tiny))
    assert [completion.logp for completion in completions] == pytest.approx(ours.tolist(), abs=1e-3)
    assert (ours - bases).abs().max() > 0.1


@pytest.mark.parametrize("engine_with_options", ["vllm"], indirect=True)
def test_engine_options_reach_vllm_over_winnows_own(engine_with_options):
    config = engine_with_options.llm.llm_engine.vllm_config
    sizes = config.scheduler_config.max_num_seqs, config.cache_config.block_size, config.model_config.max_model_len
    assert sizes == (9, 64, 100)
    assert engine_with_options.window == 18


@pytest.mark.parametrize(("option", "fact"), [({"r": 1000}, "rank 1000"), ({"use_dora": True}, "DoRA")])
def test_an_adapter_that_vllm_does_not_take_is_refused(tiny, tmp_path, option, fact):
    network = load_network(tiny, adapt=partial(add_adapter, rank=3, alpha=None, targets=[], seed=0))
    config = save_network(network, tiny, tmp_path / "model", merge=False).folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | option))
    with pytest.raises(WinnowError, match=f"vllm cannot sample .*{fact}.*merge_lora"):
        open_engine("vllm", tmp_path / "model", "float32")


def test_equal_seeds_give_equal_draws_and_other_seeds_other_draws(engine):
    requests = [Request(PROMPTS[0], seed) for seed in (1, 1, 2, 3)]
    draws = [tuple(completion.token_ids) for completion in engine.generate(requests, SAMPLING)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_first_tokens_follow_the_warped_softmax(engine, tiny):
    """p(token) is proportional to exp(logit / T) among the top k: chi-square over 4,000 draws."""
    sampling = Sampling(0.7, 6, 1, (1,))
    completions = engine.generate([Request(PROMPTS[1], 10_000 + n) for n in range(DRAWS)], sampling)
    counts = collections.Counter(completion.token_ids[0] for completion in completions)
    with torch.inference_mode():
        logits = load_network(tiny)(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double().numpy()
    top = np.argsort(-logits)[:6]
    expected = np.exp(logits[top] / 0.7) / np.exp(logits[top] / 0.7).sum()
    assert follows(counts, dict(zip(top.tolist(), expected, strict=True))) > 1e-4


def test_a_stop_id_that_the_folder_does_not_name_ends_a_response(engine):
    """Training appends the tokenizer's EOS, whatever the folder's generation_config says: both must end a draw."""
    requests = [Request(PROMPTS[0], seed) for seed in range(40)]
    for completion in engine.generate(requests, Sampling(1.0, 0, 20, tuple(range(1, 60)))):
        assert not set(completion.token_ids[:-1]) & set(range(1, 60))
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in range(1, 60))


def in_threads(*calls):
    """Return what each call returns or raises, all in threads of their own, none of which may hang."""
    results: list = [None] * len(calls)

    def run(index, call):
        try:
            results[index] = call()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_threads_at_once_get_what_each_would_get_alone(engine):
    """Equal ids, and log-probs to 1e-4, whoever shares the batch: noise is of (seed, step) alone."""
    sampling = Sampling(0.7, 20, 12, (1,))
    parts = [[Request(PROMPTS[n % 3], 100 * part + n) for n in range(40)] for part in range(3)]
    expected = [engine.generate(part, sampling) for part in parts]
    together = in_threads(*(lambda part=part: engine.generate(part, sampling) for part in parts))
    for ours, theirs in zip(together, expected, strict=True):
        assert_same_completions(ours, [(c.token_ids, c.logp, c.finish_reason) for c in theirs])


def assert_same_completions(completions, expected):
    """Equal ids and reasons to end, and log-probs to 1e-4."""
    ids, logps, reasons = zip(*expected, strict=True)
    assert [completion.token_ids for completion in completions] == list(ids)
    assert [completion.logp for completion in completions] == pytest.approx(logps, abs=1e-4)
    assert [completion.finish_reason for completion in completions] == list(reasons)


def test_progress_grows_to_the_number_of_requests(engine):
    progress: list[int] = []
    engine.generate([Request(PROMPTS[n % 3], n) for n in range(30)], SAMPLING, progress.append)
    assert progress == sorted(progress)
    assert progress[-1] == 30
    assert engine.generate([], SAMPLING) == []


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_the_queue_on_vllm_gives_what_its_own_generate_gives(engine):
    from vllm import SamplingParams, TokensPrompt

    requests = [Request(PROMPTS[n % 3], n) for n in range(60)]
    options = dict(temperature=0.7, top_k=20, max_tokens=12, stop_token_ids=[1])
    parameters = [SamplingParams(**options, seed=request.seed, logprobs=0, detokenize=False) for request in requests]
    prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
    outputs = [answer.outputs[0] for answer in engine.llm.generate(prompts, parameters, use_tqdm=False)]
    expected = [(list(output.token_ids), output.cumulative_logprob, output.finish_reason) for output in outputs]
    assert_same_completions(engine.generate(requests, Sampling(0.7, 20, 12, (1,))), expected)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_failed_call_leaves_no_requests_in_vllm(engine):
    """A prompt that is too long for the context raises; nothing of that call remains when the next is done."""
    from vllm.exceptions import VLLMValidationError

    requests = [Request(PROMPTS[0], seed) for seed in range(8)]
    before = engine.generate(requests, SAMPLING)
    with pytest.raises(VLLMValidationError, match="longer than the maximum"):
        engine.generate([*requests, Request([5] * 500, 0)], SAMPLING)
    assert engine.generate(requests, SAMPLING) == before
    assert not engine.llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_draw_whose_log_prob_is_not_finite_is_refused_with_its_policy(engine, tiny, monkeypatch):
    """vLLM itself draws id 0 from NaN logits, again and again, and says nothing."""
    monkeypatch.setattr("stages.sampling.sample.open_engine", lambda *arguments: engine)
    (norm,) = engine.llm.apply_model(lambda network: network.model.norm.weight)
    kept = norm[0].item()
    try:
        with torch.inference_mode():
            norm[0] = float("nan")
        with pytest.raises(WinnowError, match=r"policy spoilt gave a draw of prompt aa \(k=0\) the log-prob nan"):
            sample(one_prompt(), Model(tiny.folder, "spoilt"), context(), engine="vllm", n=2, max_tokens=4)
    finally:
        with torch.inference_mode():
            norm[0] = kept


def test_a_model_on_one_gpu_is_not_spread_over_two(tiny):
    with pytest.raises(WinnowError, match="engine: vllm"):
        open_engine("transformers", tiny.folder, "float32", tensor_parallel=2)


class ScriptedEngine(QueuedEngine):
    """Engine that answers a request with its seed, after as many steps as its prompt has ids.

    It records how many requests each step had, and asserts that no two threads use it at once.
    """

    def __init__(self, window, step_failure=None):
        super().__init__(window)
        self.step_failure, self.lock, self.batch_sizes = step_failure, threading.Lock(), []
        self.states, self.added, self.aborted = {}, [], set()

    def add(self, request_id, request, sampling):
        with self.exclusively():
            if request.seed < 0:
                raise ValueError("no such seed")
            self.states[request_id] = [len(request.prompt_ids), request.seed]
            self.added.append(request.seed)

    def step(self):
        with self.exclusively():
            self.batch_sizes.append(len(self.states))
            time.sleep(0.0005)  # other threads run
            if self.step_failure and len(self.batch_sizes) == 20:
                raise self.step_failure
            for state in self.states.values():
                state[0] -= 1
            ended = [request_id for request_id, (steps, _) in self.states.items() if steps == 0]
            return {name: Completion([self.states.pop(name)[1]], 0.0, "stop") for name in ended}

    def abort(self, request_ids):
        with self.exclusively():
            self.aborted |= {self.states.pop(request_id)[1] for request_id in request_ids}

    def exclusively(self):
        assert self.lock.acquire(blocking=False), "two threads at once"
        self.lock.release()
        return self.lock


def requests_of(lengths, first_seed=0):
    return [Request([0] * length, first_seed + n) for n, length in enumerate(lengths)]


def generating(engine, requests, progress=ignore_progress):
    """Return a call for `in_threads` that returns the seeds answered."""
    return lambda: [answer.token_ids[0] for answer in engine.generate(requests, SAMPLING, progress)]


@given(st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=4), st.integers(1, 12))
@settings(max_examples=25)
def test_every_thread_gets_its_answers_in_order_and_the_window_holds(lengths_by_thread, window):
    engine = ScriptedEngine(window)
    calls = [requests_of(lengths, 1000 * n) for n, lengths in enumerate(lengths_by_thread)]
    answers = in_threads(*(generating(engine, requests) for requests in calls))
    assert answers == [[request.seed for request in requests] for requests in calls]
    assert max(engine.batch_sizes, default=0) <= window
    assert not engine.states


def test_the_oldest_call_goes_first_and_a_younger_one_fills_the_window():
    """200 requests of 1 to 10 steps, then 100, 8 at a time: all of the first call go in before any of the second.

    No tail between windows or calls: the engine has fewer than 8 only in the last 10 steps.
    """
    engine, first_started = ScriptedEngine(8), threading.Event()
    lengths = [1 + n % 10 for n in range(200)]
    older, younger = requests_of(lengths), requests_of(lengths[:100], 1000)

    def second_call():
        first_started.wait()
        return engine.generate(younger, SAMPLING, ignore_progress)

    in_threads(generating(engine, older, lambda done: first_started.set()), second_call)
    assert engine.added == [*range(200), *range(1000, 1100)]
    assert set(engine.batch_sizes[:-10]) == {8}


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_ends_every_call_and_all_later_ones(failure):
    """The thread that stepped raises the failure itself, the others DeadEngineError: nobody waits indefinitely."""
    engine = ScriptedEngine(16, failure)
    results = in_threads(*(generating(engine, requests_of([9] * 100, 100 * n)) for n in range(3)))
    names = sorted(type(error).__name__ for error in results)
    assert names == sorted(["DeadEngineError"] * 2 + [type(failure).__name__])
    with pytest.raises(DeadEngineError, match=type(failure).__name__):
        engine.generate(requests_of([1]), SAMPLING, ignore_progress)


def test_the_requests_of_an_interrupted_thread_are_aborted():
    """The other thread goes on alone, and gets all its answers."""
    engine = ScriptedEngine(8)

    def interrupt(done):
        if done > 3:
            raise KeyboardInterrupt

    lengths = [1 + n % 7 for n in range(50)]
    interrupted, answers = in_threads(
        generating(engine, requests_of(lengths), interrupt), generating(engine, requests_of(lengths, 1000))
    )
    assert isinstance(interrupted, KeyboardInterrupt)
    assert answers == list(range(1000, 1050))
    engine.generate(requests_of([1]), SAMPLING, ignore_progress)
    assert not engine.states
    assert engine.aborted
    assert engine.aborted < set(range(50))


def test_a_request_that_cannot_be_added_fails_its_own_call_only():
    engine = ScriptedEngine(8)
    answers, error = in_threads(
        generating(engine, requests_of([5] * 50, 1000)),
        generating(engine, [*requests_of([5] * 50), Request([0], -1)]),
    )
    assert answers == list(range(1000, 1050))
    assert isinstance(error, ValueError)


def test_the_processes_of_vllm_are_ours_to_begin_with():
    """Each runs a function of ours, which watches the process that started it: vLLM's own would outlive one that is
    killed. That they end is shown in tests/bench/test_bench_deaths.py."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    from stages.sampling.engines import vllm

    vllm._let_processes_end_with_this_one()
    vllm._let_processes_end_with_this_one()
    assert EngineCoreProc.run_engine_core is vllm.run_engine_core
    assert WorkerProc.worker_main is vllm.run_worker
    assert vllm.run_engine_core not in vllm._mains

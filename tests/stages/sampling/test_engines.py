"""One contract for every engine: ids in, ids out, a seed a request, raw log-probs; several threads at once."""

import collections
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import WinnowError
from stages.network.forward import completion_logp
from stages.network.load import load_network
from stages.sampling.engines import Completion, DeadEngineError, Request, Sampling, ignore_progress, open_engine
from stages.sampling.engines.batch import Batch
from tests.material import alone
from tests.stages.selection.test_kernels import follows

PROMPTS = ([0, 5, 9, 14, 30, 8], [0, 7, 7, 21], [0, 60, 61, 62, 63, 64, 65, 66, 67])
DRAWS = 4000


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request, tiny):
    opened = open_engine(request.param, tiny.folder, "float32")
    yield opened
    opened.close()


def test_completions_come_in_the_order_of_requests_and_end_as_they_say(engine, tiny):
    requests = [Request(ids, seed) for seed, ids in enumerate(PROMPTS * 3)]
    completions = engine.generate(requests, Sampling(1.0, 0, 12, (1,)))
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
    rows = [(request.prompt_ids, made.token_ids) for request, made in zip(requests, completions, strict=True)]
    with torch.inference_mode():
        ours, _ = completion_logp(load_network(tiny), alone(rows), "float32")
    assert [made.logp for made in completions] == pytest.approx(ours.tolist(), abs=1e-3)


def test_equal_seeds_give_equal_draws_and_other_seeds_other_draws(engine):
    ask = [Request(PROMPTS[0], seed) for seed in (1, 1, 2, 3)]
    drawn = [tuple(made.token_ids) for made in engine.generate(ask, Sampling(1.0, 0, 12, (1,)))]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_first_tokens_follow_the_warped_softmax(engine, tiny):
    """p(token) is proportional to exp(logit / T) among the top k: chi-square over 4,000 draws."""
    sampling = Sampling(0.7, 6, 1, (1,))
    drawn = engine.generate([Request(PROMPTS[1], 10_000 + n) for n in range(DRAWS)], sampling)
    counts = collections.Counter(made.token_ids[0] for made in drawn)
    with torch.inference_mode():
        logits = load_network(tiny)(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double().numpy()
    top = np.argsort(-logits)[:6]
    law = np.exp(logits[top] / 0.7) / np.exp(logits[top] / 0.7).sum()
    assert follows(counts, dict(zip(top.tolist(), law, strict=True))) > 1e-4


def test_a_stop_id_that_the_folder_does_not_name_ends_a_response(engine):
    """Training appends the tokenizer's EOS, whatever the folder's generation_config says: both must end a draw."""
    ask = [Request(PROMPTS[0], seed) for seed in range(40)]
    for made in engine.generate(ask, Sampling(1.0, 0, 20, tuple(range(1, 60)))):
        assert not set(made.token_ids[:-1]) & set(range(1, 60))
        assert (made.finish_reason == "stop") == (made.token_ids[-1] in range(1, 60))


def at_once(*calls):
    """What each call returns or raises, all made in threads of their own, none of which may hang."""
    made: list = [None] * len(calls)

    def run(place, call):
        try:
            made[place] = call()
        except BaseException as error:
            made[place] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return made


def test_threads_at_once_get_what_each_would_get_alone(engine):
    """Equal ids, and log-probs to 1e-4, whoever shares the batch: noise is of (seed, step) alone."""
    sampling = Sampling(0.7, 20, 12, (1,))
    parts = [[Request(PROMPTS[n % 3], 100 * part + n) for n in range(40)] for part in range(3)]
    alone = [engine.generate(part, sampling) for part in parts]
    for own, shared in zip(alone, at_once(*(lambda p=p: engine.generate(p, sampling) for p in parts)), strict=True):
        assert [made.token_ids for made in shared] == [made.token_ids for made in own]
        assert [made.logp for made in shared] == pytest.approx([made.logp for made in own], abs=1e-4)
        assert [made.finish_reason for made in shared] == [made.finish_reason for made in own]


def test_progress_grows_to_the_number_of_requests(engine):
    heard: list[int] = []
    engine.generate([Request(PROMPTS[n % 3], n) for n in range(30)], Sampling(1.0, 0, 12, (1,)), heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 30
    assert engine.generate([], Sampling(1.0, 0, 12, (1,))) == []


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_vllm_says_what_its_own_generate_says(engine):
    """Ids, summed log-probs and reasons to end equal those of `LLM.generate` on the same requests."""
    from vllm import SamplingParams, TokensPrompt

    requests = [Request(PROMPTS[n % 3], n) for n in range(60)]
    law = dict(temperature=0.7, top_k=20, max_tokens=12, stop_token_ids=[1])
    parameters = [SamplingParams(**law, seed=each.seed, logprobs=0, detokenize=False) for each in requests]
    prompts = [TokensPrompt(prompt_token_ids=each.prompt_ids) for each in requests]
    theirs = [answer.outputs[0] for answer in engine.llm.generate(prompts, parameters, use_tqdm=False)]
    ours = engine.generate(requests, Sampling(0.7, 20, 12, (1,)))
    assert [each.token_ids for each in ours] == [list(each.token_ids) for each in theirs]
    assert [each.logp for each in ours] == pytest.approx([each.cumulative_logprob for each in theirs], abs=1e-4)
    assert [each.finish_reason for each in ours] == [each.finish_reason for each in theirs]


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_vllm_forgets_the_requests_of_a_thread_that_gave_up(engine):
    """A prompt that is too long for the context is refused; nothing of that call is left when the next is done."""
    from vllm.exceptions import VLLMValidationError

    ask = [Request(PROMPTS[0], seed) for seed in range(8)]
    sampling = Sampling(1.0, 0, 12, (1,))
    before = engine.generate(ask, sampling)
    with pytest.raises(VLLMValidationError, match="longer than the maximum"):
        engine.generate([*ask, Request([5] * 500, 0)], sampling)
    assert engine.generate(ask, sampling) == before
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_a_model_on_one_gpu_is_not_spread_over_two(tiny):
    with pytest.raises(WinnowError, match="engine: vllm"):
        open_engine("transformers", tiny.folder, "float32", tensor_parallel=2)


SAMPLING = Sampling(1.0, 0, 1, (1,))


class Slow:
    """A core that answers a request with its seed, after as many steps as its prompt has ids.

    It notes what it holds, and that it is never used by two threads at once.
    """

    def __init__(self, breaks_with=None):
        self.breaks_with, self.busy, self.steps, self.load = breaks_with, threading.Lock(), 0, []
        self.inside, self.added, self.aborted = {}, [], set()

    def add(self, name, request, sampling):
        with self.alone():
            if request.seed < 0:
                raise ValueError("no such seed")
            self.inside[name] = [len(request.prompt_ids), request.seed]
            self.added.append(request.seed)

    def step(self):
        with self.alone():
            self.steps += 1
            self.load.append(len(self.inside))
            time.sleep(0.0005)  # other threads run
            if self.breaks_with and self.steps == 20:
                raise self.breaks_with
            for each in self.inside.values():
                each[0] -= 1
            ended = [name for name, (left, _) in self.inside.items() if left == 0]
            return {name: Completion([self.inside.pop(name)[1]], 0.0, "stop") for name in ended}

    def abort(self, names):
        with self.alone():
            self.aborted |= {self.inside.pop(name)[1] for name in names}

    def alone(self):
        assert self.busy.acquire(blocking=False), "two threads at once"
        self.busy.release()
        return self.busy


def asked(lengths, first=0):
    return [Request([0] * length, first + n) for n, length in enumerate(lengths)]


def answers(completions):
    return [made.token_ids[0] for made in completions]


@given(st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=4), st.integers(1, 12))
@settings(max_examples=40)
def test_every_thread_gets_its_own_in_order_and_the_core_is_full_while_there_is_work(parts, window):
    core = Slow()
    batch = Batch(core, window)
    asks = [asked(lengths, 1000 * n) for n, lengths in enumerate(parts)]
    made = at_once(*(lambda ask=ask: batch.generate(ask, SAMPLING, ignore_progress) for ask in asks))
    for ask, completions in zip(asks, made, strict=True):
        assert answers(completions) == [request.seed for request in ask]
    assert max(core.load, default=0) <= window
    assert not core.inside


def test_one_call_keeps_the_core_full_until_its_requests_run_out():
    """No tail between windows: 200 requests of 1 to 10 steps, 8 at a time, are below 8 only in the last 10 steps."""
    core = Slow()
    Batch(core, 8).generate(asked([1 + n % 10 for n in range(200)]), SAMPLING, ignore_progress)
    assert set(core.load[:-10]) == {8}


def test_the_oldest_call_goes_first_and_a_younger_one_fills_what_it_leaves():
    """All of the first part goes in before any of the second, and at its end no place stays empty."""
    core, begun = Slow(), threading.Event()
    batch = Batch(core, 8)

    def second():
        begun.wait()
        return batch.generate(asked([1 + n % 10 for n in range(100)], 1000), SAMPLING, ignore_progress)

    first = asked([1 + n % 10 for n in range(200)])
    at_once(lambda: batch.generate(first, SAMPLING, lambda done: begun.set()), second)
    assert core.added == [*range(200), *range(1000, 1100)]
    assert set(core.load[:-10]) == {8}


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_ends_every_call_and_all_that_come(failure):
    """Whoever stepped raises the failure itself, the others say that the engine is dead: nobody waits for ever."""
    batch = Batch(Slow(failure), 16)
    made = at_once(
        *(lambda n=n: batch.generate(asked([9] * 100, 100 * n), SAMPLING, ignore_progress) for n in range(3))
    )
    assert sorted(type(each).__name__ for each in made) == sorted(["DeadEngineError"] * 2 + [type(failure).__name__])
    with pytest.raises(DeadEngineError, match=type(failure).__name__):
        batch.generate(asked([1]), SAMPLING, ignore_progress)


def test_a_thread_that_is_interrupted_between_steps_takes_its_requests_along():
    """The other thread goes on alone, and gets all that it asked for."""
    core = Slow()
    batch = Batch(core, 8)

    def interrupted(done):
        if done > 3:
            raise KeyboardInterrupt

    made = at_once(
        lambda: batch.generate(asked([1 + n % 7 for n in range(50)]), SAMPLING, interrupted),
        lambda: batch.generate(asked([1 + n % 7 for n in range(50)], 1000), SAMPLING, ignore_progress),
    )
    assert isinstance(made[0], KeyboardInterrupt)
    assert answers(made[1]) == list(range(1000, 1050))
    batch.generate(asked([1]), SAMPLING, ignore_progress)
    assert not core.inside
    assert core.aborted
    assert core.aborted < set(range(50))


def test_a_refused_request_is_the_fault_of_whoever_asked():
    batch = Batch(Slow(), 8)
    made = at_once(
        lambda: batch.generate(asked([5] * 50, 1000), SAMPLING, ignore_progress),
        lambda: batch.generate([*asked([5] * 50), Request([0], -1)], SAMPLING, ignore_progress),
    )
    assert answers(made[0]) == list(range(1000, 1050))
    assert isinstance(made[1], ValueError)
    assert not isinstance(made[1], DeadEngineError)

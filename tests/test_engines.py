"""One contract for every engine: ids in, ids out, a seed a request, raw log-probs."""

import collections

import numpy as np
import pytest
import torch

from stages.engines import Request, Sampling, open_engine
from stages.policy import load_network
from stages.scoring import completion_logp
from tests.material import alone
from tests.test_rejection import follows

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

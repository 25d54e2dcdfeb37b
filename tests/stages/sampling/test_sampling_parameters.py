"""vLLM's sampling parameters as options of `sample`: the law of a draw, where it ends, and what its log-prob means."""

import collections
from dataclasses import fields
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from schemas import WinnowError
from stages.network.load import load_network
from stages.ranking.base import Response
from stages.ranking.pointwise import RewardModelReader
from stages.sampling.engines import POLICY_ITSELF, Completion, Request, Sampling
from stages.sampling.engines.fake import FakeEngine
from stages.sampling.sample import sample
from tests.runs import RECIPES, plan_of
from tests.stages.network.test_limits import one_prompt
from tests.stages.selection.test_kernels import follows

PROMPT = [0, 7, 7, 21, 60, 61]
EOS = 1
A, B, C = 40, 50, 60
DRAWS = 3000
OTHER_LAWS: dict[str, Any] = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.5, "presence_penalty": 1.0,
    "frequency_penalty": 1.0, "logit_bias": ((A, 1.0),), "bad_words": ("boat",), "min_tokens": 2,
}  # fmt: skip


def sampling_of(max_tokens=1, stop_token_ids=(EOS,), **options: Any):
    return Sampling(options.pop("temperature", 1.0), options.pop("top_k", 0), max_tokens, stop_token_ids, **options)


# The law of a draw.


def first_token_law(network, *, logit_bias=(), bad_ids=(), repetition_penalty=1.0, min_p=0.0, top_p=1.0, temperature=1):
    """Return the law of the first token after PROMPT, by its definition, in float64."""
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([PROMPT])).logits[0, -1].double().numpy()
    logits[list(bad_ids)] = -np.inf
    for token, bias in logit_bias:
        logits[token] += bias
    for token in set(PROMPT):
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    p = np.exp(logits / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    p /= p.sum()
    order = np.argsort(-p)
    beyond = np.cumsum(p[order]) - p[order] >= top_p  # the smallest set of at least top_p is what comes before
    p[order[beyond]] = 0
    return p / p.sum()


FEW = tuple((token, 6.0 + token % 3) for token in range(30, 70))  # a law of few tokens, whose counts are large


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.6}, {"top_p": 0.6}),
        ({"min_p": 0.3}, {"min_p": 0.3}),
        ({"min_p": 0.1, "top_p": 0.7, "temperature": 0.8}, {"min_p": 0.1, "top_p": 0.7, "temperature": 0.8}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"min_tokens": 1, "stop_token_ids": (EOS, 30, 31)}, {"bad_ids": (EOS, 30, 31)}),
    ],
)
def test_first_tokens_follow_the_law_that_the_parameters_define(engine, tiny, options, expected):
    """Chi-square over 3,000 draws; no draw is of a token that the law excludes."""
    requests = [Request(PROMPT, 20_000 + n) for n in range(DRAWS)]
    completions = engine.generate(requests, sampling_of(logit_bias=FEW, **options))
    law = first_token_law(load_network(tiny), logit_bias=FEW, **expected)
    drawn = [completion.token_ids[0] for completion in completions]
    assert all(law[token] > 0 for token in drawn)
    expected = {token: p for token, p in enumerate(law) if p * DRAWS > 5}  # chi-square needs counts; the rest is one
    rest = 1 - sum(expected.values())
    counts = collections.Counter(token if token in expected else -1 for token in drawn)
    assert follows(counts, expected | ({-1: rest} if rest * DRAWS > 1 else {})) > 1e-4


BIAS = ((A, 100.0), (B, 99.5), (C, 99.0))


def likeliest_ids(network, count, *, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0):
    """Return the likeliest next token, `count` times, by the definition of the penalties."""
    ids: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([PROMPT + ids])).logits[0, -1].double().numpy()
        for token, bias in BIAS:
            logits[token] += bias
        for token in {*PROMPT, *ids}:
            logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        for token, times in collections.Counter(ids).items():
            logits[token] -= frequency_penalty * times + presence_penalty
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 0.5, "presence_penalty": 1.0, "repetition_penalty": 1.01},
    ],
)
def test_penalties_count_in_the_response(engine, tiny, options):
    """Three tokens share all of the law, and at the lowest temperature the likeliest is drawn."""
    expected = likeliest_ids(load_network(tiny), 8, **options)
    assert expected != likeliest_ids(load_network(tiny), 8)
    sampling = sampling_of(8, logit_bias=BIAS, temperature=0.01, **options)
    completions = engine.generate([Request(PROMPT, seed) for seed in range(5)], sampling)
    assert [completion.token_ids for completion in completions] == [expected] * 5


def test_a_bad_word_is_never_completed(engine, tiny):
    """Neither its one token nor, of a word of several, the last after the others; at a text's start and after a space.

    What the prompt ends with is no part of a bad word.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    word = tokenizer.decode([A, B])
    first, last = tokenizer.encode(word, add_special_tokens=False)
    bias = ((first, 100.0), (last, 100.0))
    requests = [Request([*PROMPT, first], seed) for seed in range(20)]
    free, banned = (
        [answer.token_ids for answer in engine.generate(requests, sampling_of(8, logit_bias=bias, bad_words=words))]
        for words in ((), (word,))
    )
    assert any([first, last] in [ids[n : n + 2] for n in range(7)] for ids in free)
    assert not any([first, last] in [ids[n : n + 2] for n in range(7)] for ids in banned)
    assert any(ids[0] == last for ids in banned)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_every_parameter_reaches_vllm_under_its_name(engine, monkeypatch):
    """All that `Sampling` has, read from the request that vLLM gets; steering is no parameter of vLLM's."""
    requests = []
    monkeypatch.setattr(engine.llm.llm_engine, "add_request", lambda *args, **_: requests.append(args[2]))
    laws: dict[str, Any] = OTHER_LAWS | {
        "ignore_eos": True,
        "stop": ("x", "yz"),
        "stop_token_ids": (30,),
        "max_tokens": 7,
    }
    assert {field.name for field in fields(Sampling)} == laws.keys() | {"steering"}
    engine.add("0", Request(PROMPT, 3), Sampling(**laws))
    (sent,) = requests
    for name, value in (laws | {"logit_bias": {A: 1.0}, "seed": 3}).items():
        assert getattr(sent, name) == (list(value) if isinstance(value, tuple) else value), name


def test_every_option_of_sample_reaches_the_engine(tiny, ctx, monkeypatch):
    """Each by a value that is not its default; what says how the engine is started is no parameter of a draw."""
    options: dict[str, Any] = dict(OTHER_LAWS, logit_bias={str(A): 1.0}, bad_words=["boat"], max_tokens=7)
    options |= {"stop": ["x"], "stop_token_ids": [30]}
    _, sampling = one_row(tiny, ctx, monkeypatch, [40], "length", **options)
    for name, value in (OTHER_LAWS | {"max_tokens": 7, "stop": ("x",), "stop_token_ids": (EOS, 30)}).items():
        assert getattr(sampling, name) == value, name
    tested = {*options, "ignore_eos"}  # which has a test of its own
    of_the_engine = {"engine", "engine_options", "dtype", "seed"}
    of_the_rows = {"split", "n", "keep_empty", "keep_special", "allow_special"}
    of_a_head = {"steer", "steer_top", "steer_every"}
    keywords = {name for name, option in signature(sample).parameters.items() if option.kind is option.KEYWORD_ONLY}
    assert keywords == tested | of_the_engine | of_the_rows | of_a_head


@pytest.mark.parametrize("name", [*POLICY_ITSELF])
def test_the_log_prob_of_a_changed_law_is_raw(name):
    assert sampling_of().logp_kind == "exact"
    assert sampling_of(**{name: OTHER_LAWS[name]}).logp_kind == "raw"


def test_what_ends_a_response_leaves_its_log_prob_exact():
    assert sampling_of(4, (EOS, 5), stop=("x",), ignore_eos=True).logp_kind == "exact"


# Where a response ends.


def cut_at(text_of, ids, stop, min_tokens=0):
    """Return the ids up to the one that completes one of the texts, by its definition; all, if none does."""
    for n in range(min_tokens + 1, len(ids) + 1):
        before, text = text_of(ids[: n - 1]).rstrip("\ufffd"), text_of(ids[:n])
        if any(item in text[max(0, len(before) - len(item) + 1) :] for item in stop):
            return ids[:n], "stop_string"
    return ids, None


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(engine, tiny, min_tokens):
    """A draw with stop strings is that without them up to there, whole tokens; the prompt holds none."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    bias, stop = tuple((token, 4.0) for token in range(230, 300)), ("o", "e fo", " b", "an")
    prompt = tokenizer.encode("Please boo", add_special_tokens=False)
    requests = [Request(prompt, seed) for seed in range(60)]
    free, stopped = (
        engine.generate(requests, sampling_of(16, logit_bias=bias, min_tokens=min_tokens, stop=texts))
        for texts in ((), stop)
    )
    text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    ends = []
    for whole, part in zip(free, stopped, strict=True):
        ids, reason = cut_at(text_of, whole.token_ids, stop, min_tokens)
        assert (part.token_ids, part.finish_reason) == (ids, reason or whole.finish_reason)
        ends.append(len(ids) if reason else 0)
    assert len(set(ends)) > 3
    assert min(end for end in ends if end) > min_tokens


def test_ids_of_ones_own_end_a_response_and_eos_does_not_with_ignore_eos(engine):
    bias = ((EOS, 6.0), (30, 4.0))
    requests = [Request(PROMPT, seed) for seed in range(60)]
    completions = engine.generate(requests, sampling_of(12, (30,), logit_bias=bias, ignore_eos=True))
    assert any(EOS in completion.token_ids for completion in completions)
    for completion in completions:
        assert 30 not in completion.token_ids[:-1]
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == 30)


class Scripted(FakeEngine):
    """Engine whose draws are all `ids`, ended for `reason`."""

    def __init__(self, ids, reason):
        self.answer = Completion(ids, -1.0, reason)

    def generate(self, requests, sampling, progress=None):
        self.sampling = sampling
        return [self.answer for _ in requests]


def one_row(tiny, ctx, monkeypatch, ids, reason, **options):
    """Return the row of `candidates` of a draw, and the sampling parameters that the engine got."""
    engine = Scripted(ids, reason)
    monkeypatch.setattr("stages.sampling.sample.open_engine", lambda *_: engine)
    rows = sample(one_prompt(), tiny, ctx, **(dict(n=1, max_tokens=20) | options)).to_pylist()
    return rows, engine.sampling


def ids_of(tiny, *texts):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


def test_the_text_ends_before_the_stop_string_and_the_ids_with_it(tiny, ctx, monkeypatch):
    ids = ids_of(tiny, "A table.", "\nUser")
    rows, _ = one_row(tiny, ctx, monkeypatch, ids, "stop_string", stop=["table", "\nUser"])
    assert [(row["token_ids"], row["text"], row["finish_reason"]) for row in rows] == [(ids, "A table.", "stop_string")]
    assert ctx.counters["stop_strings"] == 1
    assert not ctx.counters["stop_strings_inside_a_token"]


def test_a_stop_string_that_ends_inside_a_token_is_counted_and_its_token_stays_whole(tiny, ctx, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    long = max(range(230, 400), key=lambda token: len(tokenizer.decode([token]).strip()))
    text = tokenizer.decode([long]).strip()
    ids = [*ids_of(tiny, "Gladly: "), long]
    rows, _ = one_row(tiny, ctx, monkeypatch, ids, "stop_string", stop=[text[1:3]])
    assert rows[0]["token_ids"] == ids
    assert rows[0]["text"].endswith(text[0])
    assert ctx.counters["stop_strings"] == ctx.counters["stop_strings_inside_a_token"] == 1


def test_an_end_of_ones_own_is_no_part_of_the_text(tiny, ctx, monkeypatch):
    """Also where it is no special token, which decoding would not leave out."""
    ids = ids_of(tiny, "A table.", "\n")
    rows, sampling = one_row(tiny, ctx, monkeypatch, ids, "stop", stop_token_ids=[ids[-1]])
    assert rows[0]["text"] == "A table."
    assert sampling.stop_token_ids == (EOS, ids[-1])


def test_ignore_eos_takes_away_the_ends_of_the_model_alone(tiny, ctx, monkeypatch):
    options = dict(ignore_eos=True, keep_special=True, stop_token_ids=[30])
    _, sampling = one_row(tiny, ctx, monkeypatch, [40, 30], "stop", **options)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((30,), True)


def test_a_special_token_as_stop_string_is_refused_with_its_id(tiny, ctx):
    with pytest.raises(WinnowError, match=r"stop: .*special token.*stop_token_ids: \[\d+\]"):
        sample(one_prompt(), tiny, ctx, stop=["x [RESPONSE A]"], engine="fake")


def test_a_reward_model_reads_a_stopped_response_without_the_stop_string(tiny, monkeypatch):
    """Its ids, else, where the tokenizer is the policy's: they hold what is no part of the response."""
    ranker = RewardModelReader(tiny)
    prompt = tuple(ranker.tokenizer.prompt_ids("Please."))
    drawn = tuple(ids_of(tiny, "A table.", "\nUser"))
    whole, cut = (
        ranker.read("Please.", Response(text, drawn, reason, prompt))[1]
        for text, reason in (("A table.\nUser", "length"), ("A table.", "stop_string"))
    )
    assert whole == drawn
    assert cut == (*ids_of(tiny, "A table."), EOS)


# When a plan is made.


def test_the_evaluation_is_of_the_policy_itself_and_ends_where_sampling_does(data_dir):
    """Whatever changes the law of `sample` does not reach the draws that KL is computed from."""
    law = [f"sample.{name}={value!r}" for name, value in OTHER_LAWS.items() if name not in ("logit_bias", "bad_words")]
    law += ["sample.logit_bias={'40': 1.0}", "sample.bad_words=[boat]", "sample.allow_special=['[RESPONSE A]']"]
    ends = ["sample.stop=['User:']", "sample.stop_token_ids=[30]", "sample.max_tokens=9"]
    plan = plan_of(data_dir, *law, *ends)
    steps = {step.name: step.options for step in plan.steps}
    for name, neutral in POLICY_ITSELF.items():
        assert steps["sample"][name] != neutral
        for evaluated in ("eval_sample", "eval_baseline"):
            assert (steps[evaluated][name] or neutral) == neutral, name
    for evaluated in ("eval_sample", "eval_baseline"):
        assert [steps[evaluated][name] for name in ("stop", "stop_token_ids", "max_tokens")] == [["User:"], [30], 9]


@pytest.mark.parametrize(
    ("sets", "facts"),
    [
        (["min_tokens=30", "max_tokens=20"], ["sample: min_tokens", "30", "20"]),
        (["ignore_eos=true"], ["ignore_eos", "keep_special"]),
        (["ignore_eos=true", "keep_special=true", "min_tokens=2"], ["min_tokens", "ignore_eos"]),
        (["top_p=0"], ["top_p", "0"]),
        (["stop=['']"], ["stop", "at least 1 character"]),
        (["logit_bias={boat: 1.0}"], ["logit_bias", "boat", "token id"]),
        (["logit_bias={'5': 200}"], ["logit_bias", "200", "100"]),
        (["engine=fake", "top_p=0.5", "stop=[x]"], ["top_p: engine fake", "stop: engine fake"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_the_plan_is_made(data_dir, sets, facts):
    with pytest.raises(WinnowError) as refusal:
        plan_of(data_dir, *(f"sample.{item}" for item in sets))
    for fact in facts:
        assert fact in str(refusal.value)


@pytest.mark.parametrize("option", ["logit_bias={'9999': 1.0}", "stop_token_ids=[9999]"])
def test_an_id_that_the_policy_has_not_is_refused_when_the_plan_is_made(data_dir, tiny, tmp_path, option):
    config = tmp_path / "my.yaml"
    config.write_text(f"sft: {{use: model, with: {{path: {tiny.folder}}}}}\n")
    with pytest.raises(WinnowError, match=rf"sample.*: {option.partition('=')[0]}: 9999.*\d+"):
        make_plan(
            load_recipe(
                RECIPES / "rso.yaml", (data_dir / "demo.yaml", config), (f"sample.{option}",), "run", (RECIPES,)
            )
        )

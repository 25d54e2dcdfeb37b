"""Evaluation during training: what is measured and when, that training does not notice, and that the best is kept."""

import json
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.console import figures_line
from pipeline.context import Mirror
from pipeline.store.fingerprints import DataPath
from pipeline.store.store import METRICS_NOW
from schemas import WinnowError, WinnowWarning, seed_for
from schemas.tables import CANDIDATES, EXAMPLES, PROMPTS
from stages.data.prompts import prompts
from stages.data.rows import imported_candidate
from stages.data.texts import Conversation
from stages.data.tokenizer import Tokenizer
from stages.evaluation.evaluate import evaluate
from stages.network.forward import forward_rows, logp_of
from stages.network.load import checkpoint_layers, load_network, plain_layers
from stages.ranking.base import Scorer
from stages.ranking.judge import judge
from stages.ranking.rankers import ProgramScorer, ranker
from stages.sampling.engines import Completion, Request, Sampling
from stages.sampling.engines.transformers import NetworkEngine, TransformersEngine
from stages.training import sharded, trainer
from stages.training.checkpoints import Checkpoints
from stages.training.validation import Validation
from tests.conftest import WORDS, ask, write_jsonl
from tests.material import (
    bound,
    context,
    interrupt_at,
    largest_difference,
    loss_of,
    random_rows,
    response,
    term_of,
    train,
    weights_of,
)

MAX_TOKENS = 12
BOAT = bound(ranker, "pattern", regex="boat")


@pytest.fixture(scope="module")
def questions(tiny, tmp_path_factory):
    """Prompts of all three splits."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    slots = [(thing, city, day) for thing in WORDS for city in ("Oslo", "Rome") for day in ("Monday", "Friday")]
    write_jsonl(path, [{"prompt": ask(*slot)} for slot in slots])
    return prompts(tiny, context(), path=DataPath(str(path)), heldout=0.2, validation=0.4)


def ids_of(tiny, text):
    return Tokenizer(tiny).response_ids(Conversation("x"), text)


@pytest.fixture(scope="module")
def baseline(tiny, questions):
    """Two responses to every prompt, for a baseline."""
    rows = [
        imported_candidate(row["prompt_id"], ids_of(tiny, text), text, (), k=k)
        for row in questions.to_pylist()
        for k, text in enumerate(("No.", "Um, no."))
    ]
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


@pytest.fixture(scope="module")
def imitation(tiny, questions):
    """Examples that imitate one short response with a boat in it."""
    ids = ids_of(tiny, "Gladly, a boat.")
    rows = [
        {"prompt_id": row["prompt_id"], "prompt_ids": row["token_ids"], "pairs": [], "ref_model": None,
         "ref_dtype": None, "responses": [response(f"c{n}", ids, weight=1.0)]}
        for n, row in enumerate(questions.to_pylist()) if row["split"] == "train"
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


@pytest.fixture(scope="module")
def evaluated(questions, baseline):
    """Return options of a training that is evaluated after every other step."""

    def options(**changed):
        inputs = {"prompts": questions, "baseline": baseline} | changed.pop("inputs", {})
        return dict(evaluate_every=2, evaluate_max_tokens=MAX_TOKENS, by=BOAT, inputs=inputs) | changed

    return options


# A run that learns to say "boat", and whose learning rate then grows until it says nothing of the kind.
DERAILED = dict(
    objective="nll", learning_rate=4.0, warmup_ratio=1.0, epochs=4, batch_size=2, checkpoint_every=5, keep="best"
)


@pytest.fixture(scope="module")
def derailed(tiny, imitation, evaluated, tmp_path_factory):
    inputs = {"heldout": imitation.slice(0, 3)}
    return train(tiny, imitation, tmp_path_factory.mktemp("derailed"), **evaluated(inputs=inputs, **DERAILED))


def win_rates(metrics):
    return {step: value for (step, name), value in metrics.items() if name == "validation/proxy_win"}


def draws_of(network, model, questions, n=1, seed=0):
    """Return draws to the validation prompts as `candidates`, by a network and the seeds of an evaluation."""
    tokenizer = Tokenizer(model)
    rows = [row for row in questions.to_pylist() if row["split"] == "validation"]
    keys = [(row, k) for row in rows for k in range(n)]
    requests = [Request(row["token_ids"], seed_for(seed, "validation", row["prompt_id"], k)) for row, k in keys]
    completions = NetworkEngine(network, model.folder).generate(requests, Sampling(1.0, 0, MAX_TOKENS, tokenizer.stop))
    candidates: list[dict] = []
    used: set[str] = set()
    for (row, k), completion in zip(keys, completions, strict=True):
        ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        candidates.append(
            imported_candidate(row["prompt_id"], completion.token_ids, tokenizer.decode(ids), used, k=k,
                               finish_reason=completion.finish_reason)
        )  # fmt: skip
        used.add(candidates[-1]["candidate_id"])
    return pa.Table.from_pylist(candidates, schema=CANDIDATES)


def figures_of(model, tiny, questions, baseline, n=1):
    """Return what the stages `judge` and `evaluate` say of a saved policy's draws."""
    candidates = draws_of(load_network(model), model, questions, n)
    judgements = judge(questions, candidates, baseline, context(), by=BOAT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WinnowWarning)
        _, evaluations = evaluate(questions, candidates, baseline, judgements, context())
    return {row["metric"]: row["value"] for row in evaluations.to_pylist()}


# What is measured


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_network_that_trains_draws_as_its_folder_does(tiny, wrapped):
    """With prompts shared and layers checkpointed, as training has them; in batches of any size."""
    network = load_network(tiny, train=True)
    if wrapped:
        checkpoint_layers(network)
    requests = [Request([0, *range(5, 9 + n % 3)], seed) for n, seed in enumerate(range(8))]
    sampling = Sampling(1.0, 0, 10, (1,))
    expected = TransformersEngine(tiny.folder, "float32").generate(requests, sampling)
    for max_tokens in (None, 30, 1):
        completions = NetworkEngine(network, tiny.folder, max_tokens).generate(requests, sampling)
        assert [item.token_ids for item in completions] == [item.token_ids for item in expected]


@pytest.mark.parametrize(("max_tokens", "sizes"), [(None, [8]), (45, [3, 3, 2]), (1, [1] * 8)])
def test_rows_of_one_length_are_a_batch(tiny, monkeypatch, max_tokens, sizes):
    """Batches have all of them, or as many as have `max_tokens` tokens together, of 5 and 10 each: a row alone takes
    as long as many."""
    batches = []

    def record(engine, requests, sampling):
        batches.append(len(requests))
        return [Completion([1], 0.0, "stop") for _ in requests]

    monkeypatch.setattr(NetworkEngine, "_generate_batch", record)
    engine = NetworkEngine(load_network(tiny), tiny.folder, max_tokens)
    engine.generate([Request([0, 5, 6, 7, 8], seed) for seed in range(8)], Sampling(1.0, 0, 10, (1,)))
    assert batches == sizes


def test_the_figures_are_those_of_judge_and_evaluate(tiny, questions, baseline, imitation, evaluated, tmp_path):
    """Of the last step, by the saved policy's own draws: all draws against all of the baseline, means over prompts."""
    options = evaluated(evaluate_n=2, objective="nll", epochs=2, learning_rate=1e-2)
    model, metrics, policy = train(tiny, imitation, tmp_path, **options)
    expected = figures_of(model, tiny, questions, baseline, n=2)
    assert 0.5 < expected["proxy_win"] < 1
    for name in ("proxy_win", "n_tokens", "proxy_unread"):
        assert metrics[policy["steps"], f"validation/{name}"] == pytest.approx(expected[name], abs=1e-12)


def test_evaluations_are_after_every_so_many_steps_and_the_last(tiny, imitation, evaluated, tmp_path):
    options = evaluated(evaluate_every=3, objective="nll", batch_size=1, inputs={"heldout": imitation.slice(0, 2)})
    _, metrics, policy = train(tiny, imitation.slice(0, 5), tmp_path, **options)
    assert policy["steps"] == 5
    assert sorted(win_rates(metrics)) == [3, 5]
    assert sorted(step for step, name in metrics if name == "heldout/loss") == [3, 5]


def test_the_win_rate_is_seen_while_training_runs(tiny, imitation, evaluated, tmp_path):
    """The latest one on the console, after the first evaluation; each as a row of `metrics_now`."""
    shown = {}

    def report_progress(done, total, unit, figures):
        shown[done] = figures_line(figures)

    options = evaluated(objective="nll", batch_size=1, report_progress=report_progress)
    _, metrics, _ = train(tiny, imitation.slice(0, 5), tmp_path, **options)
    wins = win_rates(metrics)
    assert "proxy" not in shown[1]
    for step, latest in ((2, 2), (3, 2), (4, 4), (5, 5)):
        assert f"validation proxy win {wins[latest]:.4g}" in shown[step]
    rows = [json.loads(line) for line in (tmp_path / METRICS_NOW).read_text().splitlines()]
    assert {row["step"]: row["validation/proxy_win"] for row in rows if "validation/proxy_win" in row} == wins


def test_a_response_that_cannot_be_read_loses(tiny, imitation, evaluated, tmp_path, monkeypatch):
    """Here every id is beyond the tokenizer, as in a padded vocabulary."""
    monkeypatch.setattr("stages.training.validation.known_ids_of", lambda *_: set())
    options = evaluated(evaluate_every=100, objective="nll")
    with pytest.warns(WinnowWarning, match="evaluate_every: 100, and the training has . steps"):
        _, metrics, policy = train(tiny, imitation, tmp_path, **options)
    assert metrics[policy["steps"], "validation/proxy_win"] == 0
    assert metrics[policy["steps"], "validation/proxy_unread"] == 1


def test_a_new_lora_has_its_kl_from_where_it_started(tiny, questions, imitation, evaluated, tmp_path):
    """The mean of log p - log p_init over the draws; draws at another temperature are not the policy's."""
    options = dict(objective="nll", epochs=3, learning_rate=1e-2, lora_r=4, merge_lora=True)
    model, metrics, policy = train(tiny, imitation, tmp_path / "a", **evaluated(**options))
    network = load_network(model)
    prompt_ids = {row["prompt_id"]: row["token_ids"] for row in questions.to_pylist()}
    rows = [(prompt_ids[row["prompt_id"]], row["token_ids"]) for row in draws_of(network, model, questions).to_pylist()]
    logp, initial = (forward_rows(logp_of, item, rows, "float32", 1000) for item in (network, load_network(tiny)))
    kl = metrics[policy["steps"], "validation/kl"]
    assert kl == pytest.approx(float(np.mean(logp - initial)), abs=1e-3)
    assert kl > 0.5
    _, warmer, _ = train(tiny, imitation, tmp_path / "b", **evaluated(evaluate_temperature=1.5, **options))
    assert not [name for _, name in warmer if name == "validation/kl"]


# What training notices of it: nothing


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_training_is_the_same_with_and_without(tiny, questions, baseline, tmp_path, options):
    """Bit for bit: weights and all metrics; torch's random numbers and its threads, though the ranker is a network."""
    rows = random_rows(prompts=8)
    options = options | dict(objective="sigmoid_mean", epochs=1)
    torch.manual_seed(3)
    plain = train(tiny, rows, tmp_path / "plain", **options)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(3)
    inputs = {"prompts": questions, "baseline": baseline, "ranker": tiny}
    evaluated = train(tiny, rows, tmp_path / "evaluated", inputs=inputs, evaluate_every=1, evaluate_max_tokens=4,
                      by=bound(ranker, "pairwise"), **options)  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    plain_files, evaluated_files = (sorted(run[0].folder.glob("*.safetensors")) for run in (plain, evaluated))
    assert [file.read_bytes() for file in plain_files] == [file.read_bytes() for file in evaluated_files]
    assert {key: value for key, value in evaluated[1].items() if not key[1].startswith("validation/")} == plain[1]
    assert len(win_rates(evaluated[1])) == plain[2]["steps"]


def test_layers_are_wrapped_again_after_a_draw(tiny):
    network = load_network(tiny, train=True)
    checkpoint_layers(network)
    wrapped = [vars(module).get("forward") for module in network.modules()]
    with plain_layers(network):
        assert not any(vars(module).get("forward") for module in network.modules())
    assert [vars(module).get("forward") for module in network.modules()] == wrapped
    assert any(wrapped)


def test_the_ranker_takes_the_place_of_gradients(tiny, imitation, evaluated, tmp_path, monkeypatch):
    """It is opened when there are none, and closed before the next step."""
    networks: list = []
    opened: list = []
    closed: list = []

    class Length(Scorer):
        def __init__(self):
            assert all(weight.grad is None for weight in networks[0].parameters())
            opened.append(self)

        def score(self, context, texts):
            assert len(opened) == len(closed) + 1
            return np.array([len(text) for text in texts], dtype=np.float64)

        def close(self):
            closed.append(self)

    def load(*args, **options):
        networks.append(load_network(*args, **options))
        return networks[-1]

    monkeypatch.setattr(sharded, "load_network", load)
    monkeypatch.setattr("stages.training.optimize.open_ranker", lambda *_: Length())
    _, metrics, _ = train(tiny, imitation, tmp_path, **evaluated(objective="nll", batch_size=2))
    assert len(opened) == len(closed) == len(win_rates(metrics)) > 1


# The best is kept


def test_the_best_policy_is_kept(tiny, questions, baseline, imitation, derailed):
    """The first of those with the highest win rate, whose own draws have that win rate; later ones are worse."""
    model, metrics, policy = derailed
    wins = win_rates(metrics)
    best = max(wins.values())
    assert policy["steps"] == min(step for step, value in wins.items() if value == best)
    assert policy["steps"] < max(wins)
    assert best > max(0.6, wins[max(wins)])
    assert figures_of(model, tiny, questions, baseline)["proxy_win"] == pytest.approx(best, abs=1e-12)


def test_the_best_adapter_is_kept(tiny, questions, baseline, imitation, evaluated, tmp_path):
    """Of a LoRA, whose weights alone are written; `init` beside it is as it was."""
    options = DERAILED | {"lora_r": 4, "learning_rate": 2.0}
    model, metrics, policy = train(tiny, imitation, tmp_path, **evaluated(**options))
    wins = win_rates(metrics)
    assert policy["steps"] == min(step for step, value in wins.items() if value == max(wins.values())) < max(wins)
    assert figures_of(model, tiny, questions, baseline)["proxy_win"] == pytest.approx(max(wins.values()), abs=1e-12)
    (file,) = tmp_path.glob("checkpoint/best-*/*.safetensors")
    assert file.stat().st_size < sum(weight.nbytes for weight in weights_of(tiny).values()) / 4


def test_what_is_measured_of_the_saved_folder_is_of_the_best_policy(tiny, imitation, derailed):
    """Held-out figures at its step, once; tokens up to it."""
    model, metrics, policy = derailed
    kept, steps = policy["steps"], max(step for step, _ in metrics)
    _, by_hand = loss_of(term_of(tiny, imitation.slice(0, 3).to_pylist(), "nll"), load_network(model))
    assert metrics[kept, "heldout/loss"] == pytest.approx(by_hand["loss"], abs=1e-5)
    assert metrics[kept, "saved/margin_kept"] == pytest.approx(1, abs=1e-3)
    assert sorted(step for step, name in metrics if name == "heldout/loss") == sorted(win_rates(metrics))
    assert policy["tokens"] * steps == pytest.approx(kept * sum_of_tokens(imitation, DERAILED["epochs"]), rel=0.25)


def sum_of_tokens(rows, epochs):
    groups = rows.to_pylist()
    return epochs * sum(len(g["prompt_ids"]) + sum(len(r["token_ids"]) for r in g["responses"]) for g in groups)


def test_the_last_policy_is_kept_by_default(tiny, imitation, evaluated, derailed, tmp_path):
    """The same training, and its last weights."""
    inputs = {"heldout": imitation.slice(0, 3)}
    options = evaluated(inputs=inputs, **(DERAILED | {"keep": "last"}))
    model, metrics, policy = train(tiny, imitation, tmp_path, **options)
    assert win_rates(metrics) == win_rates(derailed[1])
    assert policy["steps"] == max(win_rates(metrics))
    assert largest_difference(weights_of(model), weights_of(derailed[0])) > 0
    assert not list(tmp_path.glob("checkpoint/best-*"))


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "moment", ["before the best is written", "before the checkpoint", "before older ones are dropped", "at the end"]
)
def test_a_kill_at_any_moment_resumes_to_the_same_bytes(tiny, imitation, evaluated, derailed, tmp_path, moment):
    """A checkpoint that names the best is there only with it; what an earlier one names is dropped after that."""
    options = evaluated(inputs={"heldout": imitation.slice(0, 3)}, **DERAILED)
    best = derailed[2]["steps"]
    with pytest.MonkeyPatch.context() as patch:
        if moment == "before the best is written":
            options["report_progress"] = interrupt_at(best)
        elif moment == "at the end":
            patch.setattr(trainer, "save_network", killed)
        else:
            owner, name = (Checkpoints, "save") if moment == "before the checkpoint" else (Mirror, "drop")
            original = getattr(owner, name)

            def at_best(self, *args):
                if (tmp_path / "checkpoint" / f"best-{best:08d}").exists():
                    raise KeyboardInterrupt
                return original(self, *args)

            patch.setattr(owner, name, at_best)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, imitation, tmp_path, **options)
    options.pop("report_progress", None)
    again = train(tiny, imitation, tmp_path, **options)
    assert largest_difference(weights_of(again[0]), weights_of(derailed[0])) == 0
    assert again[1:] == derailed[1:]
    assert [path.name for path in tmp_path.glob("checkpoint/best-*")] == [f"best-{best:08d}"]


def test_a_checkpoint_whose_best_weights_are_damaged_is_passed_over(tiny, imitation, evaluated, derailed, tmp_path):
    """With a warning, to the same end."""
    options = evaluated(inputs={"heldout": imitation.slice(0, 3)}, **DERAILED)
    last = max(win_rates(derailed[1]))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, imitation, tmp_path, report_progress=interrupt_at(last), **options)
    (file,) = tmp_path.glob("checkpoint/best-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(WinnowWarning, match="this checkpoint is incomplete"):
        again = train(tiny, imitation, tmp_path, **options)
    assert again[1:] == derailed[1:]


# What is refused


def validation_of(tiny, questions, baseline, max_tokens, ctx):
    return Validation(ctx, tiny, questions, baseline, lambda: ProgramScorer(BOAT), split="validation", n=1,
                      temperature=1.0, max_tokens=max_tokens, stop=(), stop_token_ids=(), seed=0)  # fmt: skip


def test_a_split_without_baseline_is_refused_before_a_weight_is_loaded(
    tiny, imitation, evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr(sharded, "load_network", None)
    options = evaluated(objective="nll", inputs={"baseline": CANDIDATES.empty_table()})
    with pytest.raises(WinnowError, match=r"no prompt of split validation.*`split: validation`"):
        train(tiny, imitation, tmp_path, **options)


def test_prompts_that_leave_no_room_are_rejected(tiny, questions, baseline):
    ctx, rows = context(), questions.to_pylist()
    first = next(row for row in rows if row["split"] == "validation")
    first["token_ids"] = [*first["token_ids"], 5]
    questions, longest = pa.Table.from_pylist(rows, schema=PROMPTS), len(first["token_ids"])
    validation = validation_of(tiny, questions, baseline, 128 - longest + 1, ctx)
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [
        (first["prompt_id"], "prompt too long")
    ]
    assert first["prompt_id"] not in {row["prompt_id"] for row in validation.prompts}
    with pytest.raises(WinnowError, match="evaluate_max_tokens: 127"):
        validation_of(tiny, questions, baseline, 127, ctx)


def test_a_policy_that_is_no_longer_finite_is_named(tiny, questions, baseline):
    """By step and prompt."""
    validation = validation_of(tiny, questions, baseline, 4, context())
    network = load_network(tiny, train=True)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(WinnowError, match=r"step 7: a draw of validation prompt \w+ has the log-prob nan"):
        validation.measure(network, "float32", 7, 100, False)

"""The training loop on the tiny model: its first loss, its refusals, its sums, its checkpoints, its cost."""

import contextlib
import json
import math
import os
import shutil
import signal
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.context import Mirror
from pipeline.store.fingerprints import DataPath, model_digest
from schemas import Model, WinnowError, WinnowWarning
from schemas.tables import CANDIDATES, EXAMPLES, PROMPTS
from stages.data.preferences import preferences
from stages.limits import SCORING_TOKENS_PER_PASS
from stages.network.load import load_network
from stages.training import checkpoints, objectives, sharded
from stages.training.distributed import Distributed
from stages.training.examples import examples
from stages.training.reference import reference
from stages.training.throughput import ThroughputMeter
from stages.training.trainer import kept_fraction, warn_of_lost_margin
from tests import material
from tests.conftest import write_jsonl
from tests.material import (
    bound,
    cache,
    context,
    interrupt_at,
    largest_difference,
    loss_of,
    random_rows,
    relative_difference,
    table,
    term_of,
    train,
    train_speeds,
    weights_of,
)
from tests.power_cut import recorded, restarts

LN2 = math.log(2)
ROOT = Path(__file__).parents[3]
REPLIES = ["Gladly, a boat.", "No.", "Um, well, perhaps a car on Monday.", "Booked."]


def edited(table, change):
    """The examples with `change` applied to every response, in place."""
    rows = table.to_pylist()
    for row in rows:
        for n, response in enumerate(row["responses"]):
            change(row, n, response)
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


@pytest.fixture(scope="module")
def preferred(tiny, tmp_path_factory):
    """Prompts, candidates and pairs of ten prompts; prompt n is in 1 + n % 3 pairs, so groups differ in size."""
    path = tmp_path_factory.mktemp("labels") / "preferences.jsonl"
    rows = [
        {"prompt": f"Please {n} book {'now ' * n}", "chosen": f"{REPLIES[0]} {n}", "rejected": REPLIES[1 + m]}
        for n in range(10)
        for m in range(1 + n % 3)
    ]
    return preferences(tiny, context(), path=DataPath(str(write_jsonl(path, rows))), heldout=0.0)


@pytest.fixture(scope="module")
def scored_by(tiny, preferred):
    """Return the examples for a policy and dtype: log-probs by the `reference` stage, joined by `examples`."""

    def joined(policy=tiny, dtype="float32"):
        prompts, candidates, pairs = preferred
        scores = reference(prompts, candidates, policy, context(), dtype=dtype)
        return examples(prompts, context(), candidates, pairs, reference=scores)

    return joined


@pytest.fixture(scope="module")
def cached(scored_by):
    return scored_by()


@pytest.fixture(scope="module")
def imitated(preferred):
    """Examples for nll, with weights that differ."""
    prompts, candidates, pairs = preferred
    rows = examples(prompts, context(), candidates, pairs, imitate="chosen")
    return edited(rows, lambda row, n, response: response.update(weight=0.5 + n))


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """The same architecture and tokenizer, and weights a little off."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny.folder, folder)
    network = load_network(tiny)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.1)
    network.save_pretrained(folder)
    return Model(folder, model_digest(folder))


def test_from_the_stage_to_a_loss_it_is_six_calls(tiny, cached, tmp_path, monkeypatch):
    """optimize, train_policy, micro_batch_losses, _loss, the bound objective, sigmoid_norm."""

    def failing(scores):
        raise LookupError

    monkeypatch.setattr(objectives, "log_sigmoid", failing)
    with pytest.raises(LookupError) as caught:
        train(tiny, cached, tmp_path, reference="other")
    ours = [frame.name for frame in traceback.extract_tb(caught.tb) if "site-packages" not in frame.filename]
    calls = ours[ours.index("optimize") : ours.index("sigmoid_norm") + 1]
    assert len(calls) <= 6, calls


# The first loss


def test_the_first_loss_is_that_of_policy_equal_reference(tiny, cached, scored_by, tmp_path):
    """h = 0 for every pair: -ln s(0) = ln 2 and a margin of 0, whatever the batch; a hinge has 1. In bfloat16 to 1e-2,
    since cache and loop use the same autocast."""
    for batch_size in (1, 32):
        _, metrics, _ = train(tiny, cached, tmp_path / str(batch_size), batch_size=batch_size)
        assert metrics[1, "loss"] == pytest.approx(LN2, abs=1e-5)
        assert metrics[1, "margin"] == pytest.approx(0, abs=1e-4)
    low = scored_by(dtype="bfloat16")
    for name, first in (("sigmoid_norm", LN2), ("hinge_norm", 1.0)):
        _, metrics, _ = train(tiny, low, tmp_path / name, objective=name, dtype="bfloat16")
        assert metrics[1, "loss"] == pytest.approx(first, abs=1e-2)


def test_a_reference_of_other_weights_is_refused_unless_it_is_declared(tiny, other, cached, scored_by, tmp_path):
    """By digests, both named, for training and held-out rows; `reference: other` takes it, with h not 0 at step 0."""
    stale = scored_by(other)
    message = f"{other.digest[:12]}.*{tiny.digest[:12]}.*same step.*"
    for rows, heldout in ((stale, None), (cached, stale)):
        with pytest.raises(WinnowError, match=f"(?s){message}reference: other"):
            train(tiny, rows, tmp_path / "init", inputs={"heldout": heldout})
    _, metrics, _ = train(tiny, stale, tmp_path / "other", reference="other", batch_size=100)
    assert abs(metrics[1, "margin"]) > 0.01


def test_log_probs_that_are_not_the_policys_are_caught_by_the_first_loss(tiny, other, cached, tmp_path):
    """A digest that lies; 0.01 nats off on each first response (beta h / 2 = 5e-4 off in the loss, fifty times the
    tolerance); a NaN, which compares false with any bound and must not pass for agreement."""

    def nudge(row, n, response):
        response["ref_logp"] += 0.01 * (n == 0)

    nan = edited(cached, lambda row, n, response: response.update(ref_logp=math.nan))
    for init, rows, name, facts in [
        (Model(other.folder, tiny.digest), cached, "sigmoid_norm", r"step 0.*0\.693147.*stale"),
        (tiny, edited(cached, nudge), "sigmoid_norm", r"step 0.*run `reference` again"),
        (tiny, edited(cached, nudge), "hinge_norm", r"step 0.*run `reference` again"),
        (tiny, nan, "sigmoid_norm", "step 0"),
    ]:
        with pytest.raises(WinnowError, match=facts):
            train(init, rows, tmp_path, objective=name)


def test_a_reference_on_other_tokens_is_refused(tiny, preferred):
    """Another chat template gives other prompt ids, a later cut other responses: the digest of the tokens differs."""
    prompts, candidates, pairs = preferred
    scores = reference(prompts, candidates, tiny, context())
    longer = [row | {"token_ids": [*row["token_ids"], 9]} for row in prompts.to_pylist()]
    cut = [row | {"token_ids": row["token_ids"][:-1]} for row in candidates.to_pylist()]
    for changed in (
        (pa.Table.from_pylist(longer, schema=PROMPTS), context(), candidates),
        (prompts, context(), pa.Table.from_pylist(cut, schema=CANDIDATES)),
    ):
        with pytest.raises(WinnowError, match=r"other tokens than those to train on.*template.*or mask; score it"):
            examples(*changed, pairs, reference=scores)


def test_a_reference_that_is_missing_or_in_another_arithmetic_is_refused(tiny, preferred, scored_by, tmp_path):
    """Both dtypes are named, and the cure."""
    prompts, candidates, pairs = preferred
    with pytest.raises(WinnowError, match=r"reads a reference.*add `reference`"):
        train(tiny, examples(prompts, context(), candidates, pairs), tmp_path)
    for scored, trained in (("bfloat16", "float32"), ("float32", "bfloat16")):
        with pytest.raises(WinnowError, match=f"scored in {scored}.*training runs in {trained}.*dtype"):
            train(tiny, scored_by(dtype=scored), tmp_path, dtype=trained)


def test_data_are_refused_before_any_weight_is_loaded(tiny, cached, imitated, tmp_path, monkeypatch):
    """No pairs; nothing to imitate; rows longer than the model; nothing at all: each with its message, all at once."""
    monkeypatch.setattr(sharded, "load_network", None)
    nothing = edited(cached, lambda row, n, response: response.update(weight=0.0))
    lonely = pa.Table.from_pylist([row | {"pairs": []} for row in cached.to_pylist()], schema=EXAMPLES)
    long = edited(cached, lambda row, n, response: response.update(token_ids=[5] * 200))
    for rows, options, facts in [
        (lonely, {}, ["reads pairs, and the examples have none"]),
        (EXAMPLES.empty_table(), {}, ["reads pairs, and the examples have none"]),
        (nothing, dict(objective="nll"), ["the examples have none; set `imitate`"]),
        (long, dict(objective="kto"), ["and the model takes 128", "reads unpaired labels", "reads mismatched rows"]),
    ]:
        with pytest.raises(WinnowError) as caught:
            train(tiny, rows, tmp_path, **({"reference": "other"} | options))
        assert all(fact in str(caught.value) for fact in facts)


# Sums, order, schedule


def test_accumulation_changes_nothing(tiny, cached, imitated, tmp_path):
    """L = sum over all pairs / pairs of the step (+ w sum nll / tokens of the step), however it is cut.

    Groups have 1, 2 or 3 pairs, so a mean of micro-batch means would be another number. From a stirred policy
    (h far from 0), one group at a time against all at once: loss, gradient norm and weights agree.
    """
    weighted = edited(cached, lambda row, n, response: response.update(weight=0.5 + n))
    for name, rows, options in [("sigmoid_norm", weighted, {"nll_weight": 0.7}), ("nll", imitated, {})]:
        runs = {
            tokens: train(tiny, rows, tmp_path / f"{name} {tokens}", objective=name, batch_size=100, epochs=2,
                          tokens_per_pass=tokens, **options)
            for tokens in (1, 150, 100_000)
        }  # fmt: skip
        model_at_once, expected, policy = runs.pop(100_000)
        for model, metrics, row in runs.values():
            assert row == policy
            assert metrics.keys() == expected.keys()
            for key in [(step, metric) for step in (1, 2) for metric in ("loss", "grad_norm")]:
                assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)
            assert relative_difference(weights_of(model), weights_of(model_at_once), weights_of(tiny)) < 1e-3


def test_training_reaches_what_it_minimises(tiny, cached, preferred, tmp_path):
    """Four groups, overfitted. DPO: all pairs right, the loss far below ln 2. nll: every token is the argmax."""
    _, metrics, _ = train(tiny, cached.slice(0, 4), tmp_path / "dpo", epochs=25, learning_rate=3e-3)
    assert metrics[25, "accuracy"] == 1.0
    assert metrics[25, "loss"] < 0.3
    assert metrics[25, "margin"] > 10
    prompts, candidates, pairs = preferred
    rows = examples(prompts, context(), candidates, pairs, imitate="chosen").slice(0, 4)
    _, metrics, _ = train(tiny, rows, tmp_path / "nll", objective="nll", epochs=50, learning_rate=1e-2)
    assert metrics[50, "nll"] < 0.1
    assert metrics[50, "token_accuracy"] == 1.0


def test_the_schedule_has_its_shape(tiny, imitated, tmp_path):
    """20 steps, 4 of warm-up: lr t/4 up to lr, then constant, a line, or half a cosine down; never to below 0.

    With u = (20 - step) / 16: linear lr u, cosine lr (1 - cos(pi u)) / 2.
    """
    decay = [(20 - step) / 16 for step in range(4, 20)]
    tails = {"constant": [1.0] * 16, "linear": decay, "cosine": [(1 - math.cos(math.pi * u)) / 2 for u in decay]}
    for name, tail in tails.items():
        options = dict(epochs=20, warmup_ratio=0.2, lr_scheduler_type=name, batch_size=1)
        _, metrics, _ = train(tiny, imitated.slice(0, 1), tmp_path / name, objective="nll", **options)
        rates = [metrics[step, "learning_rate"] / 1e-3 for step in range(1, 21)]
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, *tail])
        assert min(rates) > 0


def test_the_seed_orders_the_groups_and_nothing_else_moves(tiny, cached, tmp_path):
    """Equal seeds: bit for bit the same weights, of shuffled rows too. Another seed: another order."""
    shuffled = cached.take(pa.array(np.random.default_rng(0).permutation(len(cached))))
    first, again, other = (
        weights_of(train(tiny, rows, tmp_path / str(n), seed=seed)[0])
        for n, (rows, seed) in enumerate([(cached, 0), (shuffled, 0), (cached, 1)])
    )
    assert largest_difference(first, again) == 0
    assert largest_difference(first, other) > 0


# Checkpoints


INTERRUPTED = dict(epochs=3, checkpoint_every=2, lr_scheduler_type="cosine", warmup_ratio=0.3, weight_decay=0.1)


@pytest.fixture(scope="module")
def straight(tiny, cached, tmp_path_factory):
    """The run that was not interrupted."""
    return train(tiny, cached, tmp_path_factory.mktemp("straight"), **INTERRUPTED)


def same_run(a, b):
    """Bit for bit the same weights, metrics and counts."""
    return largest_difference(weights_of(a[0]), weights_of(b[0])) == 0 and a[1:] == b[1:]


@pytest.mark.parametrize("died", [2, 7])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, cached, straight, tmp_path, died):
    """A checkpoint every 2 steps, the last two kept. Dying at step 2 leaves none, so all is done again; what was being
    written when the machine died is not read."""
    with pytest.raises(KeyboardInterrupt):
        train(tiny, cached, tmp_path, report_progress=interrupt_at(died), **INTERRUPTED)
    last = (died - 1) // 2 * 2
    names = sorted(path.name for path in tmp_path.glob("checkpoint/step-*"))
    assert names == [f"step-{step:08d}" for step in (last - 2, last) if step > 0]
    (tmp_path / "checkpoint" / ".writing").mkdir(parents=True)
    (tmp_path / "checkpoint" / ".writing" / "weights.safetensors").write_bytes(b"half")
    steps = []
    again = train(tiny, cached, tmp_path, report_progress=lambda done, *_: steps.append(done), **INTERRUPTED)
    assert min(steps) == last + 1
    assert same_run(again, straight)


def test_the_tokens_counted_after_a_resume_are_those_of_its_seconds(tiny, cached, straight, tmp_path, monkeypatch):
    """Of 12 steps in 3 epochs, 8 were done before it died: a third of the run's tokens was read since."""
    contexts = []

    def remember(*arguments):
        contexts.append(context(*arguments))
        return contexts[-1]

    monkeypatch.setattr(material, "context", remember)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, cached, tmp_path, report_progress=interrupt_at(9), **INTERRUPTED)
    _, _, policy = train(tiny, cached, tmp_path, **INTERRUPTED)
    assert policy["tokens"] == straight[2]["tokens"] == 3 * contexts[-1].counters["tokens"]


def train_until_killed(init, rows, folder):
    """Train, and end by kill -9 when half of the second checkpoint is on the disk."""
    calls = []

    def killed(tensors, **options):
        save(tensors, **options)
        calls.append(1)
        if len(calls) == 2:
            (file,) = Path(options["storage_writer"].path).glob("*.safetensors")
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", killed)
        train(init, rows, folder, **INTERRUPTED)


def test_kill_9_during_a_checkpoint_write(tiny, cached, straight, tmp_path):
    """Half of the second checkpoint is on the disk; the same call goes on from the first, to the same bits."""
    folder = tmp_path / "killed"
    process = get_context("fork").Process(target=train_until_killed, args=(tiny, cached, folder))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoint/step-*")] == ["step-00000002"]
    assert (folder / "checkpoint" / ".writing").exists()
    assert same_run(train(tiny, cached, folder, **INTERRUPTED), straight)


def test_an_incomplete_checkpoint_is_passed_over_with_a_message(tiny, cached, straight, tmp_path):
    """A disk that lost the end of a file, a file, the state or what is in it: the one before it is taken.

    The note of how much memory was too much may be cut off too.
    """
    with pytest.raises(KeyboardInterrupt):
        train(tiny, cached, tmp_path / "died", report_progress=interrupt_at(5), **INTERRUPTED)
    for damage in ("short", "zeros", "gone", "no state", "a list", "another field", "another type", "empty"):
        folder = tmp_path / damage
        shutil.copytree(tmp_path / "died", folder)
        newest = folder / "checkpoint" / "step-00000004"
        (file,) = newest.glob("*.safetensors")
        if damage == "short":
            file.write_bytes(file.read_bytes()[:-1])
        elif damage == "zeros":
            file.write_bytes(bytes(file.stat().st_size))
        elif damage in ("gone", "no state"):
            (file if damage == "gone" else newest / "state.json").unlink()
        else:
            state = json.loads((newest / "state.json").read_text())
            states = {"a list": [], "another field": state | {"other": 1}, "another type": state | {"step": "four"}}
            (newest / "state.json").write_text(json.dumps(states[damage]) if damage in states else "")
            (folder / "checkpoint" / "out_of_memory").write_text("")
        with pytest.warns(UserWarning, match="step-00000004: this checkpoint is incomplete"):
            again = train(tiny, cached, folder, **INTERRUPTED)
        assert same_run(again, straight)


def test_a_checkpoint_survives_a_power_cut_once_it_is_saved(tiny, tmp_path, monkeypatch):
    """Whatever a cut leaves of what was not synced, the newest checkpoint that was said to be saved is complete."""
    monkeypatch.setenv("WINNOW_SYNC", "on")
    network = load_network(tiny)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    (tmp_path / "disk").mkdir()
    with recorded(tmp_path / "disk") as recorder:
        kept = checkpoints.Checkpoints(Mirror(tmp_path / "disk", tmp_path / "disk"), Distributed())
        for step in (1, 2):
            kept.save(checkpoints.TrainState(step), network, optimizer)
            recorder.claim(step)
    for disk, claims in restarts(recorder.operations, tmp_path):
        found = [0]
        for folder in (disk / "checkpoint").glob("step-*"):
            with contextlib.suppress(OSError, ValueError):
                state = json.loads((folder / "state.json").read_text())
                if all((folder / name).stat().st_size == size for name, size in state["files"].items()):
                    found.append(state["step"])
        assert max(found) >= max([0, *(step for (step,) in claims)]), disk.name
        shutil.rmtree(disk)


# Metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny, imitated, tmp_path):
    """An absurd learning rate makes step 1 overflow; the prompts of that step are in the message."""
    name = imitated.column("prompt_id")[0].as_py()
    with pytest.raises(WinnowError, match=f"step 1: .*not finite.*{name}/"):
        train(tiny, imitated.slice(0, 1), tmp_path, objective="nll", learning_rate=1e30, epochs=3)


def test_heldout_metrics_appear_and_do_not_train(tiny, cached, tmp_path):
    """heldout/ names at the last step, of the final weights; the weights are those of a run without.

    margin = mean h = mean [lp(w) - lp(l)] - [rp(w) - rp(l)], from the saved weights and the cache.
    """
    train_rows, heldout = cached.slice(0, 6), cached.slice(6)
    plain, expected, _ = train(tiny, train_rows, tmp_path / "a", epochs=2)
    model, metrics, policy = train(tiny, train_rows, tmp_path / "b", inputs={"heldout": heldout}, epochs=2)
    assert largest_difference(weights_of(plain), weights_of(model)) == 0
    assert {key: metrics[key] for key in expected} == expected
    at_end = {name: value for (step, name), value in metrics.items() if step == policy["steps"]}
    assert at_end["heldout/pairs"] == sum(len(row["pairs"]) for row in heldout.to_pylist())
    term = term_of(Model(model.folder, tiny.digest), heldout.to_pylist(), "sigmoid_norm", tokens_per_pass=1)
    _, by_hand = loss_of(term, load_network(model))
    for name in ("loss", "margin", "accuracy"):
        assert at_end[f"heldout/{name}"] == pytest.approx(by_hand[name], abs=1e-4)


# What is saved


SMALL_MOVES = dict(learning_rate=2e-5, epochs=3)  # half a step of bfloat16 is 5e-4 of a weight of the tiny model


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """The tiny model as a folder of bfloat16, as most policies are."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(tiny.folder, folder)
    load_network(tiny).to(torch.bfloat16).save_pretrained(folder)
    return Model(folder, model_digest(folder))


@pytest.fixture(scope="module")
def rows_of_half(half):
    return cache(half, random_rows(prompts=12))


def margin_of(model, init, rows):
    """Return the mean margin over the reference of all pairs by the network in this folder."""
    return loss_of(term_of(init, rows, "sigmoid_norm"), load_network(model))[1]["margin"]


def test_a_policy_of_bfloat16_is_saved_as_it_was_trained(half, rows_of_half, tmp_path):
    """The folder's margin is the one in memory, measured by its last batch; read in bfloat16, it has less than half."""
    one_batch = dict(SMALL_MOVES, epochs=6, batch_size=100)
    with pytest.warns(WinnowWarning, match="`sample` with `dtype: bfloat16`.*of what training changed") as caught:
        model, metrics, policy = train(half, rows_of_half, tmp_path, **one_batch)
    assert len(caught) == 1
    last = policy["steps"]
    assert metrics[last, "saved/margin_kept"] == pytest.approx(1, abs=1e-3)
    assert metrics[last, "saved/margin_kept_bfloat16"] < 0.5
    assert margin_of(model, half, rows_of_half) > metrics[last, "margin"] > 0.01  # before the last step


def test_what_was_kept_is_of_weights_whatever_training_runs_in(half, tmp_path):
    """Autocast rounds weights where they are used, so in its arithmetic the policy has not moved either."""
    options = dict(SMALL_MOVES, objective="sigmoid_mean", dtype="bfloat16", batch_size=100)
    with pytest.warns(WinnowWarning, match="of what training changed"):
        _, metrics, policy = train(half, random_rows(prompts=12), tmp_path, **options)
    assert metrics[policy["steps"], "saved/margin_kept"] == pytest.approx(1, abs=1e-3)
    assert metrics[policy["steps"], "saved/margin_kept_bfloat16"] < 0.5


def test_the_kept_fraction_is_of_pairs_and_not_of_their_mean():
    """Moves of 1 and -1 nats have a mean near 0, of which noise is many times as much."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64) + 1e-5
    noise = 0.1 * torch.randn(100, generator=generator, dtype=torch.float64)
    kept = 0.7 * moved + noise
    assert kept_fraction(moved, kept) == pytest.approx(0.7, abs=0.05)
    assert abs(float(kept.mean() / moved.mean()) - 0.7) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kept", [{"float32": 0.65, "bfloat16": 0.65}, {"float32": 1.0, "bfloat16": 0.2}])
def test_a_lost_margin_is_said_with_cures_that_are_not_set(dtype, rounding, kept):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_lost_margin(kept, 0.01, dtype, rounding)
    texts = [str(warning.message) for warning in caught]
    if dtype == "bfloat16" and kept["float32"] == 1:
        assert texts == []  # what is read in bfloat16 is what was saved
        return
    (text,) = texts
    assert f"save_dtype: {dtype}" not in text
    assert f"save_rounding: {rounding}" not in text
    assert "raise learning_rate" in text
    assert ("noise" in text) == (dtype == "bfloat16" and rounding == "stochastic")


@pytest.mark.parametrize(("rounding", "low", "high"), [("nearest", -0.1, 0.5), ("stochastic", 0.5, 1.5)])
def test_a_margin_that_bfloat16_loses_is_said_and_held_out_figures_are_of_what_was_saved(
    half, rows_of_half, tmp_path, rounding, low, high
):
    """Their margin is that of the folder, not the one in memory."""
    options = dict(SMALL_MOVES, save_dtype="bfloat16", save_rounding=rounding, batch_size=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WinnowWarning)
        model, metrics, policy = train(half, rows_of_half, tmp_path, **options, inputs={"heldout": table(rows_of_half)})
    last = policy["steps"]
    kept = metrics[last, "saved/margin_kept"]
    assert low < kept < high
    messages = [str(warning.message) for warning in caught]
    assert [message for message in messages if f"the saved policy has {kept:.1%}" in message] == messages
    assert bool(messages) == (abs(kept - 1) > 0.1)
    assert metrics[last, "heldout/margin"] == pytest.approx(margin_of(model, half, rows_of_half), abs=1e-5)


def test_stochastic_rounding_is_the_seeds(half, rows_of_half, tmp_path):
    options = dict(SMALL_MOVES, save_dtype="bfloat16", save_rounding="stochastic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WinnowWarning)
        runs = [train(half, rows_of_half, tmp_path / str(n), **options)[0] for n in range(2)]
    assert [model_digest(run.folder) for run in runs] == [model_digest(runs[0].folder)] * 2


# Cost


class SmallDevice:
    """Device on which a forward pass of more than so many tokens does not fit."""

    def __init__(self, monkeypatch, tokens):
        self.tokens, self.largest = tokens, 0
        monkeypatch.setattr(sharded, "load_network", self.load)

    def load(self, *args, **options):
        network = load_network(*args, **options)
        network.base_model.register_forward_pre_hook(self.check, with_kwargs=True)
        return network

    def check(self, module, args, kwargs):
        if torch.is_grad_enabled():
            if kwargs["input_ids"].numel() > self.tokens:
                raise torch.OutOfMemoryError("does not fit")
            self.largest = max(self.largest, kwargs["input_ids"].numel())


def test_out_of_memory_once_halves_the_micro_batches(tiny, cached, tmp_path, monkeypatch):
    """It says so, shows it in `speeds`, and ends with the weights of small micro-batches from the start, to rounding.

    A restart on the same machine begins with half.
    """
    plain, _, _ = train(tiny, cached, tmp_path / "plain", epochs=2, tokens_per_pass=60)
    device = SmallDevice(monkeypatch, tokens=80)
    with pytest.warns(UserWarning, match="out of memory: tokens_per_pass is 75 from now on"):
        model, speeds = train_speeds(tiny, cached, tmp_path / "small", epochs=2, tokens_per_pass=150)
    assert 0 < device.largest <= 80
    assert set(speeds["tokens_per_pass"]) == {75}
    assert relative_difference(weights_of(model), weights_of(plain), weights_of(tiny)) < 1e-3
    with pytest.warns(UserWarning, match="tokens_per_pass is 75"):
        again, _ = train_speeds(tiny, cached, tmp_path / "small", epochs=2, tokens_per_pass=150)
    assert largest_difference(weights_of(again), weights_of(model)) == 0


def test_out_of_memory_twice_stops_with_what_would_fit(tiny, cached, tmp_path, monkeypatch):
    """One row of a group is already too large: the message has the option, its value, and a value to set."""
    SmallDevice(monkeypatch, tokens=3)
    facts = r"halved to 75; set `tokens_per_pass` to \d+"
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(WinnowError, match=facts):
        train(tiny, cached, tmp_path, tokens_per_pass=150)


def test_tokens_of_a_step_and_of_a_policy(tiny, tmp_path):
    """Forwarded: P + sum over responses of (R - 1) per group; saved, against 2 (P + R) per pair, here 3 pairs of 4
    responses. A policy's tokens are those of its data, P + sum R per group and epoch, however they are split."""
    row = random_rows(prompts=3)[2]
    prompt, lengths = len(row["prompt_ids"]), [len(response["token_ids"]) for response in row["responses"]]
    assert len(row["pairs"]) == 3
    rows = table(cache(tiny, [row]))
    _, speeds = train_speeds(tiny, rows, tmp_path / "whole", epochs=2)
    unshared = sum(2 * prompt + lengths[0] + length for length in lengths[1:])
    forwarded = prompt + sum(lengths) - len(lengths)
    assert speeds["tokens/read"] == [forwarded, forwarded]
    assert speeds["tokens/saved"] == [pytest.approx(1 - forwarded / unshared)] * 2
    _, _, policy = train(tiny, rows, tmp_path / "parts", epochs=3, tokens_per_pass=1)
    assert policy["tokens"] == 3 * (prompt + sum(lengths))


@pytest.mark.parametrize("sharing", [True, False])
def test_the_reference_counts_the_tokens_of_its_forward_passes(tiny, preferred, monkeypatch, sharing):
    """P + sum over responses of (R - 1) per prompt; in padded rows, one per response, all as wide as the longest."""
    if not sharing:
        monkeypatch.setattr("stages.network.load.share_prefixes", lambda *_: None)
    prompts, candidates, _ = preferred
    ctx = context()
    for _ in range(2):  # on one cached network
        reference(prompts, candidates, tiny, ctx)
    lengths: dict = {row["prompt_id"]: (len(row["token_ids"]), []) for row in prompts.to_pylist()}
    for row in candidates.to_pylist():
        lengths[row["prompt_id"]][1].append(len(row["token_ids"]))
    packed = sum(prompt + sum(responses) - len(responses) for prompt, responses in lengths.values())
    padded = max(prompt + max(responses) for prompt, responses in lengths.values()) * candidates.num_rows
    assert padded < SCORING_TOKENS_PER_PASS
    assert ctx.counters["tokens"] == 2 * (packed if sharing else padded)


def test_flops_of_what_is_trained_and_of_what_is_frozen(tiny):
    """A token without gradients takes 2 N; with them 6 per trained weight and 4 per frozen one, 2 N more if layers run
    again."""
    network = load_network(tiny)
    network.lm_head.weight.requires_grad_(False)
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    frozen = network.lm_head.weight.numel()
    once, again = (ThroughputMeter(network, Distributed(), checkpointing) for checkpointing in (False, True))
    assert once.flops(10, 0) == 10 * 2 * (trained + frozen)
    assert once.flops(10, 10) == 10 * (6 * trained + 4 * frozen)
    assert again.flops(10, 10) == 10 * (8 * trained + 6 * frozen)


def test_the_papers_names_are_names_of_the_same_objectives():
    """One entry, so that both names give a step the same key."""
    for alias, name in dict(dpo="sigmoid_norm", ipo="squared", simpo="sigmoid_mean", orpo="odds_ratio", rrhf="rank",
                            slic="hinge", bradley_terry="sigmoid").items():  # fmt: skip
        assert bound(objectives.objective, alias) == bound(objectives.objective, name)


def test_a_scale_multiplies_the_learning_rate(tiny, cached, tmp_path):
    """Half of 1e-3 trains as 5e-4 does, bit for bit, and is the rate that the metrics have."""
    scaled, metrics, _ = train(tiny, cached.slice(0, 4), tmp_path / "scaled", learning_rate_scale=0.5)
    plain, expected, _ = train(tiny, cached.slice(0, 4), tmp_path / "plain", learning_rate=5e-4)
    assert metrics == expected
    assert largest_difference(weights_of(scaled), weights_of(plain)) == 0

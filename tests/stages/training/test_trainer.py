"""The loop of room 7 on the tiny model: its first loss, its refusals, its sums, and its return from the dead."""

import math
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound
from pipeline.store.fingerprints import DataPath, model_digest
from schemas import Model, WinnowError
from schemas.tables import CANDIDATES, EXAMPLES, PROMPTS
from stages.data.preferences import preferences
from stages.limits import BUDGET
from stages.network.forward import completion_logp
from stages.network.load import load_network
from stages.training import trainer as training
from stages.training.distributed import Distributed
from stages.training.examples import examples
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.reference import reference
from stages.training.throughput import ThroughputMeter
from tests.conftest import write_jsonl
from tests.material import alone, cache, random_rows, table

LN2 = math.log(2)
ROOT = Path(__file__).parents[3]
REPLIES = ["Gladly, a boat.", "No.", "Um, well, perhaps a car on Monday.", "Booked."]


def space(folder=Path("unused"), tell=lambda done, total, unit: None):
    return StageContext(folder, WarmCache(), tell)


def bound(name, **options):
    return Bound(objective.entries[name], options)


def train(init, rows, folder, *, heldout=None, tell=lambda done, total, unit: None, **options):
    """`optimize` with short defaults: (model, metrics as {(step, name): value}, counters)."""
    given = dict(
        objective=bound("sigmoid_norm"),
        learning_rate=1e-3,
        batch_size=4,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
    )
    ctx = space(folder, tell)
    made, policy, metrics, _ = optimize(init, rows, ctx, heldout, **(given | options))
    values = {(row["step"], row["metric"]): row["value"] for row in metrics.to_pylist()}
    return made, values, policy.to_pylist()[0]


def weights(model):
    return {name: each for file in model.folder.glob("*.safetensors") for name, each in load_file(file).items()}


def furthest(a, b):
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def edited(table, change):
    """The examples with `change` applied to every response, in place."""
    rows = table.to_pylist()
    for row in rows:
        for n, response in enumerate(row["responses"]):
            change(row, n, response)
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A tiny network is faster on one thread, and these tests share the machine."""
    monkeypatch.setattr("stages.network.load.THREADS", 1)


@pytest.fixture(scope="module")
def labelled(tiny, tmp_path_factory):
    """Ten prompts; prompt n stands in 1 + n % 3 pairs, so groups differ in their number of pairs and responses."""
    path = tmp_path_factory.mktemp("labels") / "preferences.jsonl"
    rows = [
        {"prompt": f"Please {n} book {'now ' * n}", "chosen": f"{REPLIES[0]} {n}", "rejected": REPLIES[1 + m]}
        for n in range(10)
        for m in range(1 + n % 3)
    ]
    return preferences(tiny, space(), path=DataPath(str(write_jsonl(path, rows))), heldout=0.0)


@pytest.fixture(scope="module")
def cached(tiny, labelled):
    """The whole chain: labels, log-probs under the tiny model by the `reference` stage, joined by `examples`."""
    prompts, candidates, pairs = labelled
    return examples(prompts, space(), candidates, pairs, reference=reference(prompts, candidates, tiny, space()))


@pytest.fixture(scope="module")
def imitated(labelled):
    """Examples for nll, with weights that differ."""
    prompts, candidates, pairs = labelled
    rows = examples(prompts, space(), candidates, pairs, imitate="chosen")
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


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_the_first_loss_of_dpo_is_ln_2(tiny, cached, tmp_path, batch_size):
    """Policy = reference: h = 0 for every pair, so the loss is -ln s(0) = ln 2, and the margin 0."""
    _, metrics, _ = train(tiny, cached, tmp_path, batch_size=batch_size)
    assert metrics[1, "loss"] == pytest.approx(LN2, abs=1e-5)
    assert metrics[1, "margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("name", "first"), [("sigmoid_norm", LN2), ("hinge_norm", 1.0)])
def test_the_first_loss_in_bfloat16(tiny, labelled, tmp_path, name, first):
    """The cache and the loop read with the same autocast: within 1e-2 of the loss at h = 0."""
    prompts, candidates, pairs = labelled
    scores = reference(prompts, candidates, tiny, space(), dtype="bfloat16")
    rows = examples(prompts, space(), candidates, pairs, reference=scores)
    _, metrics, _ = train(tiny, rows, tmp_path, objective=bound(name), dtype="bfloat16")
    assert metrics[1, "loss"] == pytest.approx(first, abs=1e-2)


def test_a_reference_of_other_weights_is_refused(tiny, other, labelled, tmp_path):
    """By their digests, both named, and the cure."""
    prompts, candidates, pairs = labelled
    rows = examples(prompts, space(), candidates, pairs, reference=reference(prompts, candidates, other, space()))
    with pytest.raises(WinnowError, match=f"{other.digest[:12]}.*{tiny.digest[:12]}.*same step"):
        train(tiny, rows, tmp_path)


def test_other_weights_under_the_same_name_are_caught_by_the_first_loss(tiny, other, cached, tmp_path):
    """If the digest lies (a hand-made table), the loss at step 0 is not ln 2 and training does not start."""
    with pytest.raises(WinnowError, match=r"step 0.*0\.693147.*stale"):
        train(Model(other.folder, tiny.digest), cached, tmp_path)


def test_a_reference_on_other_prompt_ids_is_refused(tiny, labelled):
    """Another chat template gives other prompt ids: the digest of the tokens read says so."""
    prompts, candidates, pairs = labelled
    scores = reference(prompts, candidates, tiny, space())
    rows = [row | {"token_ids": [*row["token_ids"], 9]} for row in prompts.to_pylist()]
    with pytest.raises(WinnowError, match=r"other tokens than those to train on.*chat template"):
        examples(pa.Table.from_pylist(rows, schema=PROMPTS), space(), candidates, pairs, reference=scores)


def test_a_reference_on_a_response_that_was_cut_since_is_refused(tiny, labelled):
    """A response cut after scoring has another digest."""
    prompts, candidates, pairs = labelled
    scores = reference(prompts, candidates, tiny, space())
    cut = [row | {"token_ids": row["token_ids"][:-1]} for row in candidates.to_pylist()]
    with pytest.raises(WinnowError, match="truncation; score it again"):
        examples(prompts, space(), pa.Table.from_pylist(cut, schema=CANDIDATES), pairs, reference=scores)


@pytest.mark.parametrize("objective_name", ["sigmoid_norm", "hinge_norm"])
def test_tampered_log_probs_are_refused(tiny, cached, tmp_path, objective_name):
    """0.01 nats off on each first response: beta h / 2 = 5e-4 off in the loss, fifty times the tolerance."""

    def change(row, n, response):
        response["ref_logp"] += 0.01 * (n == 0)

    with pytest.raises(WinnowError, match=r"step 0.*run `reference` again"):
        train(tiny, edited(cached, change), tmp_path, objective=bound(objective_name))


def test_log_probs_that_are_no_numbers_are_refused(tiny, cached, tmp_path):
    """A NaN compares false with any bound; the gate must not take that for agreement."""
    with pytest.raises(WinnowError, match="step 0"):
        train(tiny, edited(cached, lambda row, n, response: response.update(ref_logp=math.nan)), tmp_path)


def test_a_missing_reference_is_refused(tiny, labelled, tmp_path):
    """The objective reads one; the message says what to wire."""
    prompts, candidates, pairs = labelled
    with pytest.raises(WinnowError, match="wire `reference`"):
        train(tiny, examples(prompts, space(), candidates, pairs), tmp_path)


@pytest.mark.parametrize(("cache", "loop"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_reference_in_another_arithmetic_is_refused(tiny, labelled, tmp_path, cache, loop):
    """Both dtypes are named, and the cure."""
    prompts, candidates, pairs = labelled
    scores = reference(prompts, candidates, tiny, space(), dtype=cache)
    rows = examples(prompts, space(), candidates, pairs, reference=scores)
    with pytest.raises(WinnowError, match=f"scored in {cache}.*training runs in {loop}.*dtype"):
        train(tiny, rows, tmp_path, dtype=loop)


def test_a_stale_heldout_cache_is_refused_too(tiny, other, labelled, cached, tmp_path):
    """Held-out margins against another reference would be wrong without any sign of it."""
    prompts, candidates, pairs = labelled
    stale = examples(prompts, space(), candidates, pairs, reference=reference(prompts, candidates, other, space()))
    with pytest.raises(WinnowError, match="same step"):
        train(tiny, cached, tmp_path, heldout=stale)


def test_refusals_before_any_weight_is_loaded(tiny, cached, imitated, tmp_path):
    """No pairs; nothing to imitate; rows longer than the model; nothing at all: each with its own message."""
    nothing = edited(cached, lambda row, n, response: response.update(weight=0.0))
    lonely = pa.Table.from_pylist([row | {"pairs": []} for row in cached.to_pylist()], schema=EXAMPLES)
    long = edited(imitated, lambda row, n, response: response.update(token_ids=[5] * 200))
    for rows, options, message in [
        (lonely, {}, "reads pairs, and the examples have none"),
        (EXAMPLES.empty_table(), {}, "reads pairs, and the examples have none"),
        (nothing, dict(objective=bound("nll")), "the examples have none; set `imitate`"),
        (long, dict(objective=bound("nll")), "rows of 2.. tokens, and the model takes 128"),
    ]:
        with pytest.raises(WinnowError, match=message):
            train(Model(tiny.folder, tiny.digest), rows, tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("sigmoid_norm", {}), ("sigmoid_norm", {"nll_weight": 0.7}), ("nll", {})]
)
def test_accumulation_changes_nothing(tiny, cached, imitated, tmp_path, name, options):
    """L = sum over all pairs / pairs of the step (+ w sum nll / tokens of the step), however it is cut.

    Groups have 1, 2 or 3 pairs, so a mean of micro-batch means would be another number. From a stirred policy
    (h far from 0), one group at a time against all at once: loss, gradient norm and weights agree to 1e-5.
    """
    rows = cached if name == "sigmoid_norm" else imitated
    if options:
        rows = edited(cached, lambda row, n, response: response.update(weight=0.5 + n))
    runs = {}
    for tokens_per_pass in (1, 150, 100_000):
        given = dict(objective=bound(name), batch_size=100, epochs=2, tokens_per_pass=tokens_per_pass) | options
        made, metrics, policy = train(tiny, rows, tmp_path / str(tokens_per_pass), **given)
        runs[tokens_per_pass] = weights(made), metrics, policy
    whole, first, row = runs[100_000]
    for found, metrics, policy in (runs[1], runs[150]):
        assert policy == row
        assert metrics.keys() == first.keys()
        for step in (1, 2):
            for metric in ("loss", "grad_norm"):
                assert metrics[step, metric] == pytest.approx(first[step, metric], rel=1e-5, abs=1e-5)
        assert furthest(found, whole) < 1e-5


def test_nll_is_a_mean_over_the_imitated_tokens_of_the_whole_step(tiny, imitated, tmp_path):
    """L = -sum_i w_i lp_i / sum_i |y_i| over the responses with w_i > 0 of the step: not a mean of groups' means."""
    network = load_network(tiny)
    total = tokens = 0.0
    for row in imitated.to_pylist():
        for response in row["responses"]:
            with torch.inference_mode():
                logp, _ = completion_logp(network, alone([(row["prompt_ids"], response["token_ids"])]), "float32")
            total -= response["weight"] * logp.item()
            tokens += len(response["token_ids"]) * (response["weight"] > 0)
    _, metrics, _ = train(tiny, imitated, tmp_path, objective=bound("nll"), batch_size=100, tokens_per_pass=60)
    assert metrics[1, "loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert metrics[1, "nll"] == pytest.approx(total / tokens, rel=1e-6)


def test_dpo_overfits_four_groups(tiny, cached, tmp_path):
    """The gradient points the right way: all pairs right, the loss far below ln 2, chosen above rejected."""
    _, metrics, _ = train(tiny, cached.slice(0, 4), tmp_path, epochs=25, learning_rate=3e-3)
    assert metrics[25, "accuracy"] == 1.0
    assert metrics[25, "loss"] < 0.3
    assert metrics[25, "margin"] > 10


def test_nll_overfits_four_groups(tiny, labelled, tmp_path):
    """One response a prompt is learnt by heart: every token is the argmax."""
    prompts, candidates, pairs = labelled
    rows = examples(prompts, space(), candidates, pairs, imitate="chosen").slice(0, 4)
    _, metrics, _ = train(tiny, rows, tmp_path, objective=bound("nll"), epochs=120, learning_rate=3e-3)
    assert metrics[120, "nll"] < 0.1
    assert metrics[120, "token_accuracy"] == 1.0


def test_the_schedule_has_its_shape(tiny, imitated, tmp_path):
    """20 steps, 4 of warm-up: lr t/4 up to lr, then constant; or down a line; or down half a cosine; never to below 0.

    With u = (20 - step) / 16 left: linear lr u, cosine lr (1 - cos(pi u)) / 2.
    """
    one = imitated.slice(0, 1)
    left = [(20 - step) / 16 for step in range(4, 20)]
    tails = {
        "constant": [1.0] * 16,
        "linear": left,
        "cosine": [(1 - math.cos(math.pi * u)) / 2 for u in left],
    }
    for name, tail in tails.items():
        given = dict(
            objective=bound("nll"),
            epochs=20,
            warmup_ratio=0.2,
            lr_scheduler_type=name,
            learning_rate=1e-3,
            batch_size=1,
        )
        _, metrics, _ = train(tiny, one, tmp_path / name, **given)
        found = [metrics[step, "learning_rate"] / 1e-3 for step in range(1, 21)]
        assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *tail])
        assert max(found) == pytest.approx(1.0)
        assert min(found) > 0


def test_every_group_is_seen_once_an_epoch(tiny, cached, tmp_path):
    """A step is whole groups until they hold batch_size pairs, the last of an epoch what is left: none twice."""
    pairs = sum(len(row["pairs"]) for row in cached.to_pylist())
    most = max(len(row["pairs"]) for row in cached.to_pylist())
    _, metrics, policy = train(tiny, cached, tmp_path, epochs=2)
    seen = [metrics[step, "pairs"] for step in range(1, policy["steps"] + 1)]
    assert sum(seen) == 2 * pairs
    assert pairs in np.cumsum(seen)
    assert all(size < 4 + most for size in seen)
    assert sum(size < 4 for size in seen) <= 2


def test_the_seed_orders_the_groups_and_nothing_else_moves(tiny, cached, tmp_path):
    """Equal seeds: bit for bit the same weights. Another seed: another order. Shuffled rows: the same run."""
    order = np.random.default_rng(0).permutation(len(cached))
    runs = [
        weights(train(tiny, rows, tmp_path / str(n), seed=seed)[0])
        for n, (rows, seed) in enumerate([(cached, 0), (cached, 0), (cached.take(pa.array(order)), 0), (cached, 1)])
    ]
    assert furthest(runs[0], runs[1]) == 0
    assert furthest(runs[0], runs[2]) == 0
    assert furthest(runs[0], runs[3]) > 0


def killer(at):
    """A `progress` that ends the run in the middle of its work, as Ctrl-C does."""

    def tell(done, total, unit):
        if done == at:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(("died", "torn"), [(2, False), (5, False), (5, True), (7, True)])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tiny, cached, tmp_path, died, torn):
    """A checkpoint every 2 steps: the second start ends with the same weights, metrics and counts, bit for bit.

    Dying at step 2 leaves no checkpoint, so all is done again. `torn`: a checkpoint that was being written
    (.writing, half a file) when the machine died is not read.
    """
    options = dict(epochs=3, lr_scheduler_type="cosine", warmup_ratio=0.3, checkpoint_every=2, weight_decay=0.1)
    straight, metrics, policy = train(tiny, cached, tmp_path / "straight", **options)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(tiny, cached, folder, tell=killer(died), **options)
    whole = sorted(path.name for path in folder.glob("checkpoint/step-*"))
    last = (died - 1) // 2 * 2
    assert whole == [f"step-{step:08d}" for step in (last - 2, last) if step > 0]
    if torn:
        (folder / "checkpoint" / ".writing").mkdir()
        (folder / "checkpoint" / ".writing" / "weights.safetensors").write_bytes(b"half")
    told = []
    again, metrics_again, policy_again = train(
        tiny, cached, folder, tell=lambda done, total, unit: told.append(done), **options
    )
    assert min(told) == last + 1
    assert furthest(weights(again), weights(straight)) == 0
    assert metrics_again == metrics
    assert policy_again == policy


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from stages.training import checkpoints
from tests.stages.training.test_trainer import train

write, written = checkpoints.save, []

def killed(tensors, **options):
    write(tensors, **options)
    written.append(1)
    if len(written) == 2:
        (file,) = Path(options["storage_writer"].path).glob("*.safetensors")
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save = killed
init, rows, folder, options = pickle.loads(Path(sys.argv[1]).read_bytes())
train(init, rows, folder, **options)
"""


def test_kill_9_during_a_checkpoint_write(tiny, cached, tmp_path):
    """Half of the second checkpoint is on the disk; the same call goes on from the first, to the same bits."""
    options = dict(epochs=3, checkpoint_every=2, lr_scheduler_type="cosine")
    straight, metrics, _ = train(tiny, cached, tmp_path / "straight", **options)
    folder = tmp_path / "killed"
    (tmp_path / "call").write_bytes(pickle.dumps((tiny, cached, folder, options)))
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "call")], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoint/step-*")] == ["step-00000002"]
    assert (folder / "checkpoint" / ".writing").exists()
    again, metrics_again, _ = train(tiny, cached, folder, **options)
    assert furthest(weights(again), weights(straight)) == 0
    assert metrics_again == metrics


@pytest.mark.parametrize("harm", ["short", "gone", "no state"])
def test_a_torn_checkpoint_is_passed_over_with_a_message(tiny, cached, tmp_path, harm):
    """A disk that lost the end of a file: the checkpoint before it is taken, and the run ends as undisturbed."""
    options = dict(epochs=3, checkpoint_every=2)
    straight, metrics, _ = train(tiny, cached, tmp_path / "straight", **options)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(tiny, cached, folder, tell=killer(5), **options)
    newest = folder / "checkpoint" / "step-00000004"
    if harm == "no state":
        (newest / "state.json").unlink()
    else:
        (file,) = newest.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1]) if harm == "short" else file.unlink()
    with pytest.warns(UserWarning, match="step-00000004: this checkpoint is torn"):
        again, metrics_again, _ = train(tiny, cached, folder, **options)
    assert furthest(weights(again), weights(straight)) == 0
    assert metrics_again == metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_prompts(tiny, imitated, tmp_path):
    """An absurd learning rate makes step 1 overflow; the prompts of that step are in the message."""
    one = imitated.slice(0, 1)
    name = one.column("prompt_id")[0].as_py()
    with pytest.raises(WinnowError, match=f"step 1: .*not finite.*{name}/"):
        train(tiny, one, tmp_path, objective=bound("nll"), learning_rate=1e30, epochs=3)


def test_heldout_metrics_appear_and_do_not_train(tiny, cached, tmp_path):
    """heldout/ names at the last step, of the final weights; the weights are those of a run without."""
    train_rows, held = cached.slice(0, 6), cached.slice(6)
    bare, plain, _ = train(tiny, train_rows, tmp_path / "a", epochs=2)
    with_held, metrics, policy = train(tiny, train_rows, tmp_path / "b", heldout=held, epochs=2)
    names = {name for step, name in metrics if step == policy["steps"] and name.startswith("heldout/")}
    assert {"heldout/loss", "heldout/margin", "heldout/accuracy", "heldout/pairs"} <= names
    assert furthest(weights(bare), weights(with_held)) == 0
    assert {key: metrics[key] for key in plain} == plain
    assert metrics[policy["steps"], "heldout/pairs"] == sum(len(row["pairs"]) for row in held.to_pylist())


def test_the_margin_of_the_metrics_is_h(tiny, cached, tmp_path):
    """After training, mean h = mean [lp(w) - lp(l)] - [rp(w) - rp(l)], from the saved weights and the cache."""
    made, metrics, policy = train(tiny, cached, tmp_path, heldout=cached, epochs=2)
    network = load_network(made)
    gaps = []
    for row in cached.to_pylist():
        with torch.inference_mode():
            ids = [(row["prompt_ids"], response["token_ids"]) for response in row["responses"]]
            logp = completion_logp(network, alone(ids), "float32")[0].tolist()
        shift = [a - response["ref_logp"] for a, response in zip(logp, row["responses"], strict=True)]
        gaps += [shift[pair["chosen"]] - shift[pair["rejected"]] for pair in row["pairs"]]
    assert metrics[policy["steps"], "heldout/margin"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert metrics[policy["steps"], "heldout/accuracy"] == pytest.approx(np.mean(np.array(gaps) > 0))


def test_a_reference_of_another_policy_is_taken_when_it_is_said(tiny, other, labelled, tmp_path):
    """`reference: other`: h at step 0 is the gap of shifts between the two policies, not 0, and training runs."""
    prompts, candidates, pairs = labelled
    rows = examples(prompts, space(), candidates, pairs, reference=reference(prompts, candidates, other, space()))
    with pytest.raises(WinnowError, match="reference: other"):
        train(tiny, rows, tmp_path / "init")
    _, metrics, _ = train(tiny, rows, tmp_path / "other", reference="other", batch_size=100)
    assert abs(metrics[1, "margin"]) > 0.01


# What it costs


class Crowded:
    """A device on which a pass of more than `room` tokens does not fit."""

    def __init__(self, monkeypatch, room):
        self.room, self.largest = room, 0
        load = load_network

        def loaded(*args, **options):
            network = load(*args, **options)
            network.base_model.register_forward_pre_hook(self.look, with_kwargs=True)
            return network

        monkeypatch.setattr(training, "load_network", loaded)

    def look(self, module, args, kwargs):
        if not torch.is_grad_enabled():
            return
        if kwargs["input_ids"].numel() > self.room:
            raise torch.OutOfMemoryError("no room")
        self.largest = max(self.largest, kwargs["input_ids"].numel())


def test_out_of_memory_once_halves_the_tokens_of_a_pass(tiny, cached, tmp_path, monkeypatch):
    """It says so, remembers it in `speeds`, and ends with the weights of small passes from the start, to rounding."""
    plain, _, _ = train(tiny, cached, tmp_path / "plain", epochs=2, tokens_per_pass=60)
    crowded = Crowded(monkeypatch, room=80)
    with pytest.warns(UserWarning, match="out of memory: tokens_per_pass is 75 from now on"):
        made, speeds = train_speeds(tiny, cached, tmp_path / "crowded", epochs=2, tokens_per_pass=150)
    assert 0 < crowded.largest <= 80
    assert set(speeds["tokens_per_pass"]) == {75}
    for name, weight in weights(made).items():
        assert torch.allclose(weight, weights(plain)[name], atol=1e-5), name


def test_out_of_memory_twice_stops_with_what_would_fit(tiny, cached, tmp_path, monkeypatch):
    """One row of a group is already too large: the message has the option, its value, and a value to set."""
    Crowded(monkeypatch, room=3)
    message = r"halved to 75; set `tokens_per_pass` to \d+"
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(WinnowError, match=message):
        train(tiny, cached, tmp_path, tokens_per_pass=150)


def test_tokens_read_and_saved(tiny, tmp_path):
    """P + sum over responses of (R - 1) tokens a group, against 2 (P + R) a pair: here 3 pairs of 4 responses."""
    row = random_rows(prompts=3)[2]
    prompt, lengths = len(row["prompt_ids"]), [len(each["token_ids"]) for each in row["responses"]]
    assert len(row["pairs"]) == 3
    _, speeds = train_speeds(tiny, table(cache(tiny, [row])), tmp_path, epochs=2)
    alone = sum(2 * prompt + lengths[0] + other for other in lengths[1:])
    read = prompt + sum(lengths) - len(lengths)
    assert speeds["tokens/read"] == [read, read]
    assert speeds["tokens/saved"] == [pytest.approx(1 - read / alone)] * 2


def test_the_tokens_of_a_policy_are_those_of_its_data(tiny, tmp_path):
    """Prompt once and each response, as often as a step takes the group, whatever it takes to read them."""
    rows = cache(tiny, random_rows())
    _, _, policy = train(tiny, table(rows), tmp_path, epochs=3, tokens_per_pass=1)
    once = sum(len(row["prompt_ids"]) + sum(len(each["token_ids"]) for each in row["responses"]) for row in rows)
    assert policy["tokens"] == 3 * once


@pytest.mark.parametrize("sharing", [True, False])
def test_the_reference_counts_the_tokens_that_it_reads(tiny, labelled, monkeypatch, sharing):
    """P + sum over responses of (R - 1) a prompt; in plain rows, one a response, all as wide as the longest."""
    if not sharing:
        monkeypatch.setattr("stages.network.load.share_prefixes", lambda network: None)
    prompts, candidates, _ = labelled
    ctx = space()
    for _ in range(2):  # on one warm network
        reference(prompts, candidates, tiny, ctx)
    responses: dict = {row["prompt_id"]: (len(row["token_ids"]), []) for row in prompts.to_pylist()}
    for row in candidates.to_pylist():
        responses[row["prompt_id"]][1].append(len(row["token_ids"]))
    packed = sum(prompt + sum(said) - len(said) for prompt, said in responses.values())
    wide = max(prompt + max(said) for prompt, said in responses.values()) * candidates.num_rows
    assert wide < BUDGET
    assert ctx.counters["tokens"] == 2 * (packed if sharing else wide)


def test_flops_of_what_is_trained_and_of_what_is_frozen(tiny):
    """A token without gradients takes 2 N, one with them 6 a trained weight and 4 a frozen one, 2 N more if again."""
    network = load_network(tiny)
    network.lm_head.weight.requires_grad_(False)
    sizes = [weight.numel() for weight in network.parameters() if weight.requires_grad]
    trained, frozen = sum(sizes), network.lm_head.weight.numel()
    once, again = (
        ThroughputMeter(network, Distributed(), gradient_checkpointing) for gradient_checkpointing in (False, True)
    )
    assert once.flops(10, 0) == 10 * 2 * (trained + frozen)
    assert once.flops(10, 10) == 10 * (6 * trained + 4 * frozen)
    assert again.flops(10, 10) == 10 * (8 * trained + 6 * frozen)


def train_speeds(init, rows, folder, **options):
    given = (
        dict(
            objective=bound("sigmoid_norm"),
            learning_rate=1e-3,
            batch_size=4,
            warmup_ratio=0.0,
            lr_scheduler_type="constant",
        )
        | options
    )
    made, _, _, speeds = optimize(init, rows, StageContext(folder, WarmCache(), lambda *_: None), **given)
    values: dict = {}
    for row in speeds.to_pylist():
        values.setdefault(row["measure"], []).append(row["value"])
    return made, values

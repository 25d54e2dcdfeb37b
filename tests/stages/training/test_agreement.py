"""The engine's log-probs against the trainer's own: compared on every run, and another network is refused."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from jobs.console import ProgressReporter
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from schemas import Model, WinnowError
from schemas.tables import SELECTIONS
from stages.sampling import sample as sampling
from stages.sampling.engines import open_engine
from stages.sampling.sample import sample
from stages.training.agreement import LIMITS, MEASURE, Draw, check_agreement
from stages.training.examples import examples
from stages.training.reference import reference
from tests.families import write_family
from tests.material import context, train
from tests.pipeline.execution.test_run import without
from tests.runs import SHORT, Silent, plan_of
from tests.stages.test_stages import prompts_of

NAMES = ["a", "b", "c", "d"]
DRAWS = dict(n=4, temperature=1.0, top_k=0, max_tokens=24)
# The causes that the message names.
CAUSES = ("wrong file", "rope", "dtype", "sampler")


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(NAMES)


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    return write_family("llama", tiny, tmp_path_factory.mktemp("families") / "llama")


@pytest.fixture(scope="module")
def by_vllm(policy, prompts, tmp_path_factory):
    """Draws of the policy by vLLM itself."""
    ctx = context(tmp_path_factory.mktemp("vllm"))
    table = sample(prompts, policy, ctx, engine="vllm", **DRAWS)
    ctx.open_once(open_engine, "vllm", policy.folder, "float32", 1).close()
    return table


@pytest.fixture(scope="module")
def by_transformers(policy, prompts):
    return sample(prompts, policy, context(), engine="transformers", **DRAWS)


def changed(policy: Model, folder: Path, weights=None, **config) -> Model:
    """Return a copy with other weights or another config that passes for the same policy: it has its digest."""
    shutil.copytree(policy.folder, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    if weights:
        file = folder / "model.safetensors"
        save_file(weights(load_file(file)), file, {"format": "pt"})
    return Model(folder, policy.digest)


ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}


# In `reference`


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_draws_of_the_same_weights_agree_and_the_difference_is_recorded(engine, prompts, policy, request):
    """To 1e-5 nats per token in float32: five hundred times less than what is refused."""
    candidates = request.getfixturevalue(f"by_{engine}")
    assert set(candidates["model"].to_pylist()) == {policy.digest}
    ctx = context()
    reference(prompts, candidates, policy, ctx)
    difference = ctx.measures[MEASURE]
    assert difference["count"] == pc.sum(candidates["n_tokens"]).as_py()
    assert 0 < difference["total"] / difference["count"] < 1e-5
    assert difference["total"] / difference["count"] <= difference["largest"] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_file_or_rope_scale_is_refused_with_its_likely_causes(dtype, prompts, policy, by_vllm, tmp_path, tiny):
    """What vLLM sampled is not what the trainer reads, although the digest says so: in either arithmetic."""
    other = write_family("llama", tiny, tmp_path / "other", seed=2)
    wrong_file = changed(
        policy, tmp_path / "file", weights=lambda tensors: load_file(other.folder / "model.safetensors")
    )
    for planted in (wrong_file, changed(policy, tmp_path / "rope", **ROPE)):
        with pytest.raises(WinnowError, match="not the network that is trained") as caught:
            reference(prompts, by_vllm, planted, context(), dtype=dtype)
        assert all(cause in str(caught.value) for cause in (*CAUSES, policy.digest[:12]))


def test_weights_of_another_epoch_are_refused(prompts, policy, by_vllm, tmp_path):
    """1 % of noise in every matrix is less than an epoch of fine-tuning changes."""

    def moved(tensors):
        torch.manual_seed(0)
        return {name: value + 0.01 * value.std() * torch.randn_like(value) for name, value in tensors.items()}

    with pytest.raises(WinnowError, match="two sets of weights"):
        reference(prompts, by_vllm, changed(policy, tmp_path / "moved", weights=moved), context())


def test_a_wrong_dtype_is_refused(prompts, policy, monkeypatch):
    """An engine that computes in bfloat16 where float32 was asked of it."""

    def in_bfloat16(name, folder, dtype, *more):
        return open_engine(name, folder, "bfloat16", *more)

    monkeypatch.setattr(sampling, "open_engine", in_bfloat16)
    candidates = sample(prompts, policy, context(), engine="transformers", **DRAWS)
    with pytest.raises(WinnowError, match="dtype is not that of `sample`"):
        reference(prompts, candidates, policy, context())


def test_bfloat16_where_it_was_asked_for_is_rounding(prompts, policy):
    candidates = sample(prompts, policy, context(), engine="transformers", dtype="bfloat16", **DRAWS)
    for dtype in ("float32", "bfloat16"):
        ctx = context()
        reference(prompts, candidates, policy, ctx, dtype=dtype)
        assert 1e-4 < ctx.measures[MEASURE]["total"] / ctx.measures[MEASURE]["count"] < 0.02


def test_a_known_difference_can_be_tolerated(prompts, policy, by_transformers, tmp_path):
    ctx = context()
    planted = changed(policy, tmp_path / "rope", **ROPE)
    reference(prompts, by_transformers, planted, ctx, engine_tolerance=1e6)
    assert ctx.measures[MEASURE]["total"] / ctx.measures[MEASURE]["count"] > 0.1


def test_a_log_prob_that_is_not_finite_is_refused_by_its_prompt(prompts, policy, by_transformers, tmp_path):
    """Finite weights whose logits are not: nothing else notices before training, which would blame its own options."""
    huge = changed(
        policy, tmp_path / "huge", lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * 1e38}
    )
    with pytest.raises(WinnowError, match=r"prompt a the log-prob -?(nan|inf): its activations in float32"):
        reference(prompts, by_transformers, huge, context())


def test_what_is_under_another_law_is_not_compared(prompts, policy, by_transformers, tmp_path):
    """Steered draws, those of other weights, those without log-prob, those of the fake engine."""

    def with_column(name, value):
        place = by_transformers.schema.get_field_index(name)
        column = pa.array([value] * by_transformers.num_rows, by_transformers.schema.field(name).type)
        return by_transformers.set_column(place, by_transformers.schema.field(name), column)

    tables = [
        with_column("logp_kind", "steered"),
        with_column("model", "of another step"),
        with_column("logp", None),
        sample(prompts, policy, context(), engine="fake", **DRAWS),
    ]
    planted = changed(policy, tmp_path / "rope", **ROPE)
    for candidates in tables:
        ctx = context()
        reference(prompts, candidates, planted, ctx)
        assert ctx.measures == {}


def test_draws_of_a_temperature_are_compared_under_the_policy_itself(prompts, policy):
    """Their logp is raw: the policy's own."""
    candidates = sample(prompts, policy, context(), engine="transformers", **DRAWS | dict(temperature=0.7, top_k=5))
    ctx = context()
    reference(prompts, candidates, policy, ctx)
    assert ctx.measures[MEASURE]["largest"] < 1e-4


def test_the_limit_allows_for_few_tokens_and_not_for_a_nan():
    """A draw of one token may be off by a + b, one of n by a n + b sqrt(n)."""
    linear, root = LIMITS["bfloat16"]
    for count in (1, 100):
        bound = linear * count + root * count**0.5
        for off, agrees in ((0.99 * bound, True), (1.01 * bound, False), (float("nan"), False)):
            rows = [(Draw(-5.0, "m", "bfloat16"), -5.0 - off, count)]
            if agrees:
                assert check_agreement(rows, "float32", 1.0, "m", "reference") is not None
            else:
                with pytest.raises(WinnowError):
                    check_agreement(rows, "float32", 1.0, "m", "reference")
    assert check_agreement([], "float32", 1.0, "m", "reference") is None


# Without a reference: in the first batch of training


@pytest.fixture(scope="module")
def imitated(prompts, by_transformers):
    """Examples as RAFT makes them: one draw per prompt is imitated, and no reference scores it."""
    return examples(prompts, context(), by_transformers, selections=all_of(by_transformers), imitate="selected")


def all_of(candidates):
    """Return `selections` of all candidates, with weight 1."""
    ids = candidates.select(["prompt_id", "candidate_id"]).to_pylist()
    return pa.Table.from_pylist([row | dict(draw=0, round=0, reward=1.0, weight=1.0) for row in ids], SELECTIONS)


def test_a_method_without_reference_compares_its_first_batch(policy, imitated, tmp_path):
    _, metrics, _ = train(policy, imitated, tmp_path / "run", objective="nll")
    assert 0 < metrics[0, "engine_difference"] <= metrics[0, "engine_difference/largest"] < 1e-4


def test_a_wrong_file_is_refused_before_the_first_step_of_a_method_without_reference(policy, imitated, tmp_path):
    planted = changed(policy, tmp_path / "rope", **ROPE)
    with pytest.raises(WinnowError, match=r"step 0: .* not the network that is trained"):
        train(planted, imitated, tmp_path / "run", objective="nll")
    _, metrics, _ = train(planted, imitated, tmp_path / "known", objective="nll", engine_tolerance=1e6)
    assert metrics[0, "engine_difference"] > 0.1


def test_what_the_reference_has_compared_is_not_compared_again(policy, prompts, by_transformers, imitated, tmp_path):
    scored = reference(prompts, by_transformers, policy, context())
    selections = all_of(by_transformers)
    table = examples(prompts, context(), by_transformers, selections=selections, reference=scored, imitate="selected")
    _, metrics, _ = train(policy, table, tmp_path / "run", objective="nll")
    assert (0, "engine_difference") not in metrics


# In the summary of a run


def test_the_difference_is_in_the_manifest_of_a_run_and_in_what_it_prints(data_dir, finished, tmp_path):
    console = Console(record=True, width=300, file=StringIO())
    plan = plan_of(data_dir, "target=reference")
    store = without(finished, plan, "reference", tmp_path / "store")
    reporter = ProgressReporter(console)
    run(plan, store, LocalExecutor(), reporter)
    reporter.close()
    measures = store.folder(plan.target).manifest["measures"]
    assert 0 < measures[MEASURE]["total"] / measures[MEASURE]["count"] < 1e-4
    lines = [line.split() for line in console.export_text().splitlines()]
    line = " ".join(next(words for words in lines if words[:2] == ["reference", "finished"]))
    assert "engine difference in nats per token" in line


def test_rounds_without_reference_record_it_too(data_dir, finished, tmp_path):
    plan = plan_of(data_dir, "target=optimize", *SHORT, recipe="raft")
    shutil.copytree(finished, tmp_path / "store")
    run(plan, Store(tmp_path / "store"), LocalExecutor(), Silent())
    trained = [step for step in plan.steps if step.name.startswith("optimize")]
    assert len(trained) == 2
    for step in trained:
        measures = Store(tmp_path / "store").folder(step).manifest["measures"]
        assert 0 < measures[MEASURE]["total"] < 1e-4

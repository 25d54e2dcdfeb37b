"""vLLM's engine arguments as an option: names, values, what is part of a key, and what the log-probs then are."""

import gc
import json
import os
import tempfile
import weakref
from contextlib import closing
from typing import Any

import pytest
import torch

from pipeline.store.fingerprints import DataPath
from schemas import WinnowError
from stages.network.forward import completion_logp
from stages.network.load import load_network
from stages.network.models import untrained
from stages.sampling.devices import cpu_head_sizes
from stages.sampling.engines import Completion, DeadEngineError, Request, Sampling, open_engine
from stages.sampling.engines.fake import FakeEngine
from stages.sampling.engines.options import EXECUTION_OPTIONS, REFUSED, vllm_arguments
from stages.sampling.engines.vllm import VllmEngine
from stages.sampling.sample import sample
from stages.training.agreement import draw_of
from tests.material import alone
from tests.runs import plan_of
from tests.stages.network.test_limits import one_prompt

VLLM = "sample.engine=vllm"
LAW: dict[str, Any] = {"temperature": 1.0, "top_k": 0}


def key_of(data_dir, *sets, step="sample"):
    return next(item.key for item in plan_of(data_dir, *sets).steps if item.name == step)


def test_the_table_names_arguments_of_the_installed_vllm():
    assert vllm_arguments() >= EXECUTION_OPTIONS | REFUSED.keys()
    assert len(vllm_arguments()) > 200


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("{gpu_memory_utilisation: 0.5}", ["gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'"]),
        ("{tensor_parallel_size: 2}", ["tensor_parallel_size", "tensor_parallel` in the profile"]),
        ("{dtype: bfloat16}", ["dtype", "set `dtype`"]),
        ("{override_generation_config: {top_p: 0.5}}", ["override_generation_config", "distribution"]),
        ("{hf_token: abc}", ["hf_token", "environment"]),
        ("{max_model_len: -1}", ["max_model_len", "-1"]),
        ("{max_num_batched_tokens: many}", ["max_num_batched_tokens", "'many'"]),
        ("{gpu_memory_utilization: 0}", ["gpu_memory_utilization", "got 0"]),
        ("{load_format: [dummy]}", ["load_format", "random"]),
        ("{speculative_config: {rejection_sample_method: synthetic}}", ["speculative_config", "policy"]),
    ],
)
@pytest.mark.parametrize("place", ["sample.engine_options", "compare.by.engine_options"])
def test_an_argument_that_cannot_be_is_refused_when_the_plan_is_made(data_dir, place, options, facts):
    with pytest.raises(WinnowError) as refusal:
        plan_of(data_dir, "compare.by=llm_judge", f"{place}={options}")
    assert f"{place}: " in str(refusal.value)
    for fact in facts:
        assert fact in str(refusal.value)


@pytest.mark.parametrize("place", ["sample", "compare.by"])
def test_another_engine_refuses_them(data_dir, place):
    """That of the demo is transformers for `sample`."""
    sets = ["compare.by=llm_judge", f"{place}.engine=transformers", f"{place}.engine_options={{max_num_seqs: 8}}"]
    with pytest.raises(WinnowError, match=r"engine_options: .*transformers.*engine: vllm"):
        plan_of(data_dir, *sets)


def test_speculation_with_what_vllm_cannot_speculate_with_is_refused(data_dir):
    sets = [VLLM, "sample.engine_options={spec_method: ngram}", "sample.min_p=0.1"]
    with pytest.raises(WinnowError, match=r"sample: min_p: .*spec_method"):
        plan_of(data_dir, *sets)


@pytest.mark.parametrize(
    ("step", "place", "sets"),
    [("sample", "sample", (VLLM,)), ("compare", "compare.by", ("compare.by=llm_judge",))],
)
def test_what_says_how_the_engine_runs_is_not_part_of_the_key(data_dir, step, place, sets):
    plain = key_of(data_dir, *sets, step=step)
    execution, numbers, both, default = (
        key_of(data_dir, *sets, f"{place}.engine_options={options}", step=step)
        for options in (
            "{gpu_memory_utilization: 0.5, speculative_config: {method: ngram}}",
            "{kv_cache_dtype: fp8}",
            "{kv_cache_dtype: fp8, max_num_seqs: 8}",
            "{kv_cache_dtype: null}",
        )
    )
    assert execution == plain == default
    assert numbers == both != plain


def test_draws_share_the_blocks_of_a_prompt_on_a_cpu_and_have_its_log_probs(engine, tiny):
    """Of 70 tokens two blocks of 32 are read from the cache; log-probs are our forward's."""
    if hasattr(engine, "llm") and not torch.cuda.is_available():
        assert engine.llm.llm_engine.vllm_config.cache_config.block_size == 32
    prompt = [0, *(5 + n % 200 for n in range(69))]
    completions = engine.generate([Request(prompt, seed) for seed in range(16)], Sampling(1.0, 0, 12, (1,)))
    rows = alone([(prompt, completion.token_ids) for completion in completions])
    with torch.inference_mode():
        ours, _ = completion_logp(load_network(tiny), rows, "float32")
    assert [completion.logp for completion in completions] == pytest.approx(ours.tolist(), abs=1e-3)


def test_a_value_that_vllm_refuses_is_one_line_before_anything_is_drawn(tiny):
    with pytest.raises(
        WinnowError, match=r"engine_options: vLLM refuses .*kv_cache_dtype.*should be 'auto'"
    ) as refusal:
        open_engine("vllm", tiny.folder, "float32", 1, json.dumps({"kv_cache_dtype": "fp9"}))
    assert "\n" not in str(refusal.value)


def test_the_death_of_an_engines_process_is_told_with_its_last_error():
    """What the process printed after its start is in the file that was its stderr then."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine = VllmEngine.__new__(VllmEngine)
    with tempfile.TemporaryFile() as file:
        file.write(b"Traceback\nRuntimeError: first\n(EngineCore) torch.AcceleratorError: CUDA error: misaligned\n")
        file.flush()
        engine.log = file.fileno()
        with pytest.raises(DeadEngineError, match="AcceleratorError: CUDA error: misaligned"), engine._named_death():
            raise EngineDeadError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Engine core failed. See root cause above."), OSError),
        (ValueError("no such architecture"), WinnowError),
        (AssertionError("heads must be divisible by ranks"), WinnowError),
        (KeyError("model.layers.0.mlp.weight"), WinnowError),
    ],
)
def test_an_engine_that_does_not_start_is_one_line_with_the_cause(tiny, monkeypatch, capfd, error, kind):
    """On a GPU the cause is only in the log of the engine's process. It may pass there, and Ray tries another worker;
    what vLLM refuses is refused again."""
    import vllm

    def start(**arguments):
        os.write(2, b"(EngineCore pid=7) ERROR 11-26 [core.py:7] Traceback\n(EngineCore pid=7) ERROR 11-26 [core.py:7] "
                    b"ValueError: Free memory on device cuda:0 (1.2/80.0 GiB) is too little\n")  # fmt: skip
        raise error

    monkeypatch.setattr(vllm, "LLM", start)
    with pytest.raises(kind) as failure:
        open_engine("vllm", tiny.folder, "float32")
    cause = "ValueError: Free memory on device cuda:0 (1.2/80.0 GiB) is too little" if kind is OSError else str(error)
    assert f"{cause}; " in str(failure.value)
    assert "set `engine: transformers`" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_first_step_that_fails_is_one_line_with_the_cause_and_the_cure(tmp_path, data_dir, ctx):
    """On a CPU, vLLM starts with heads of any size; its first step ends where no kernel has that size, here 16."""
    corpus = DataPath(str(data_dir / "demonstrations.jsonl"))
    folder = untrained(ctx, corpus=corpus, columns=["prompt"], vocabulary=400, hidden=32, layers=1, heads=2).folder
    opened = open_engine("vllm", folder, "float32")
    with closing(opened), pytest.raises(WinnowError, match=r"head_dim=16.*set `engine: transformers`") as failure:
        opened.generate([Request([5, 6, 7], 0)], Sampling(1.0, 0, 4, (1,)))
    assert "\n" not in str(failure.value)


def test_head_sizes_are_those_that_the_kernels_take(monkeypatch):
    """Read from vLLM's source; each size up to 600 is what its kernel says."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    def has_kernel(size):
        isa = _get_attn_isa(torch.float32, 32, size, "auto")
        lengths, starts = torch.tensor([5], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
        try:
            ops.cpu_attn_get_scheduler_metadata(1, 4, 4, size, lengths, torch.float32, starts, True, -1, isa, True)
        except RuntimeError:
            return False
        return True

    assert cpu_head_sizes() == {size for size in range(1, 600) if has_kernel(size)}


class Recorder(FakeEngine):
    """Engine that draws one token."""

    def __init__(self):
        self.lengths = []

    def generate(self, requests, sampling, progress=None):
        self.lengths += [len(request.prompt_ids) for request in requests]
        return [Completion([40], -1.0, "length") for _ in requests]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (None, "exact"),
        ({"max_num_seqs": 8, "max_model_len": 100}, "exact"),
        ({"kv_cache_dtype": "fp8"}, "approximate"),
        ({"quantization": "fp8"}, "approximate"),
        ({"hf_overrides": {"rope_theta": 1.0}}, "approximate"),
    ],
)
def test_the_log_prob_of_another_network_is_approximate_and_compared_with_none(tiny, ctx, monkeypatch, options, kind):
    monkeypatch.setattr("stages.sampling.sample.open_engine", lambda *arguments: Recorder())
    (row,) = sample(one_prompt(), tiny, ctx, n=1, max_tokens=8, **LAW, engine_options=options).to_pylist()
    assert row["logp_kind"] == kind
    assert (draw_of(row) is None) == (kind == "approximate")


def test_prompts_are_rejected_by_the_length_that_the_engine_takes(tiny, ctx, monkeypatch):
    monkeypatch.setattr("stages.sampling.sample.open_engine", lambda *arguments: Recorder())
    prompts = one_prompt()
    length = len(prompts["token_ids"][0])
    options = {"max_model_len": length + 7}
    assert sample(prompts, tiny, ctx, n=1, max_tokens=7, engine_options=options).num_rows == 1
    assert sample(prompts, tiny, ctx, n=1, max_tokens=8, engine_options=options).num_rows == 0
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["prompt too long"]


def test_the_start_and_end_of_an_engine_leave_its_libraries_frozen_and_its_weights_free(tiny):
    """On a CPU it is in this process: vLLM would freeze the engine, or unfreeze what there are millions of."""
    engine = open_engine("vllm", tiny.folder, "float32")
    frozen = gc.get_freeze_count()
    assert isinstance(engine, VllmEngine)
    (weight,) = engine.llm.apply_model(lambda network: weakref.ref(network.model.norm.weight))
    assert weight() is not None
    engine.close()
    assert weight() is None
    assert gc.get_freeze_count() == frozen > 0


def test_draws_on_a_cpu_need_no_compiler(engine, monkeypatch):
    import torch._inductor.compile_fx

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", fail)
    assert len(engine.generate([Request([0, 5, 9], 1)], Sampling(1.0, 0, 2, (1,)))) == 1

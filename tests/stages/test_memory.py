"""Memory and work of stages as a plan knows them, as laws. tests/bench/memory.py measures peaks."""

import shutil
from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open

from pipeline import InputStep, ModelPath
from pipeline.costs import GIB, Amount, Device, Need, NotEstimatedError, Work, memory_problem
from pipeline.registry import Bound
from pipeline.stage import signature_of, stages
from schemas import Model
from stages.model_config import ModelConfig
from stages.network.memory import planned_shape, scoring_need, shape_of
from stages.ranking.rankers import ranker
from stages.sampling.memory import cache_per_token
from stages.training.memory import training_need
from tests.families import write_family
from tests.material import bound

CARD = Device("cuda", 80 * GIB)
OPTIMIZE = {"tokens_per_pass": 8192, "world_size": 1, "lora_r": 0, "dtype": "float32", "gradient_checkpointing": False,
            "batch_size": 64}  # fmt: skip


def model_step(folder: Path) -> InputStep:
    return InputStep("model", {"path": ModelPath(str(folder))})


def large_step(hidden: int = 4096, layers: int = 32) -> InputStep:
    """A step that makes a network of some 6B parameters, of which only the plan is needed."""
    sizes = dict(vocabulary=128_000, hidden=hidden, layers=layers, heads=32, context=8192)
    return InputStep("untrained", sizes)


def total(init: InputStep, **options: object) -> float:
    need = training_need(OPTIMIZE | options, {"init": init}, CARD)
    assert need is not None
    return need.total


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_parameters_are_those_of_the_headers(family: str, tiny: Model, tmp_path: Path):
    """Each weight of the files is counted once; of a LoRA, those that peft would add."""
    folder = write_family(family, tiny, tmp_path / family).folder
    shape = shape_of(ModelConfig(folder))
    with safe_open(folder / "model.safetensors", "np") as file:
        expected = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
    assert shape is not None
    assert shape.parameters == expected


def test_a_network_that_is_not_made_yet_has_the_shape_that_it_will_have(tiny: Model):
    """What `untrained` says of its options is what the folder that it wrote says; also through a training."""
    options = dict(vocabulary=ModelConfig(tiny.folder).vocabulary, hidden=64, layers=2, heads=2, context=128)
    trained = InputStep("optimize", {}, {"init": InputStep("untrained", options)})
    assert planned_shape(trained) == shape_of(ModelConfig(tiny.folder))


def test_memory_of_a_lora_is_what_peft_adds(tiny: Model):
    """Weights, gradients and moments of as many numbers as peft trains."""
    from stages.network.load import load_network
    from stages.network.lora import add_adapter

    network = load_network(tiny, train=True, adapt=lambda net: add_adapter(net, 4, None, [], 0))
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    need = training_need(OPTIMIZE | {"lora_r": 4}, {"init": model_step(tiny.folder)}, CARD)
    assert need is not None
    assert need.parts["gradients"] == 4 * trained
    assert need.parts["optimizer"] == 8 * trained


def test_memory_grows_with_the_pass_and_falls_with_what_saves_it():
    init = large_step()
    assert total(init) > total(init, tokens_per_pass=4096) > total(init, tokens_per_pass=2048)
    assert total(init) > total(init, dtype="bfloat16", gradient_checkpointing=True)
    assert total(init, gradient_checkpointing=True) < total(init)
    assert total(init, lora_r=16) < total(init)
    assert total(init, world_size=8, gradient_checkpointing=True) < total(init, gradient_checkpointing=True)


def test_checkpointing_that_is_decided_by_memory_is_what_a_device_needs():
    """Without it where that surely fits, with it where that might not; the plan says so."""
    inputs = {"init": large_step()}

    def need(way: bool | str, memory: float | None = None) -> Need:
        found = training_need(OPTIMIZE | {"gradient_checkpointing": way}, inputs, Device("cpu", memory))
        assert found is not None
        return found

    without = need(False).total
    for memory, way in ((None, False), (1.2 * without, False), (1.1 * without, True), (1.0, True)):
        assert need("auto", memory).total == need(way).total
        assert ("gradient_checkpointing: auto is on" in need("auto", memory).note) == way


def test_the_ranker_of_evaluations_takes_the_place_of_gradients_and_activations():
    """So that one of the policy's size needs nothing more, unless there were few of both, as with a LoRA."""
    init = large_step()
    evaluated = OPTIMIZE | {"evaluate_every": 10, "by": bound(ranker, "pairwise")}
    lean = {"lora_r": 16, "gradient_checkpointing": True, "tokens_per_pass": 1024}
    for options, is_more in [({}, False), (lean, True)]:
        plain = training_need(OPTIMIZE | options, {"init": init}, CARD)
        need = training_need(evaluated | options, {"init": init, "ranker": init}, CARD)
        assert plain is not None
        assert need is not None
        assert (need.total > plain.total) == is_more
    program = training_need(evaluated | {"by": bound(ranker, "brevity", words=3)}, {"init": init}, CARD)
    assert program == training_need(OPTIMIZE, {"init": init}, CARD)


def test_gradients_and_moments_are_divided_among_ranks():
    parts = [training_need(OPTIMIZE | {"world_size": ranks}, {"init": large_step()}, CARD) for ranks in (1, 8)]
    assert parts[0]
    assert parts[1]
    for name in ("gradients", "optimizer"):
        assert parts[0].parts[name] == 8 * parts[1].parts[name]


def test_the_cache_of_a_token_is_two_vectors_per_layer_and_key_head(tiny: Model, tmp_path: Path):
    shape = shape_of(ModelConfig(write_family("qwen2", tiny, tmp_path / "q").folder))
    assert shape is not None
    assert cache_per_token(shape, 2) == 2 * shape.layers * shape.kv_heads * shape.head_size * 2


@pytest.mark.parametrize(
    ("memory", "setting"),
    [
        (700, "`tokens_per_pass: 32768`"),
        (130, "`gradient_checkpointing: true`"),
        (70, "`world_size: "),
        (1, "no setting"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_that_would(memory: float, setting: str):
    """The named setting is one with which it fits; the first of them that leaves the result as it is."""
    cost = signature_of(stages.find("optimize")).cost
    device = Device("cuda", memory * GIB)
    options = OPTIMIZE | {"tokens_per_pass": 65_536 if memory == 700 else 8192}
    inputs = {"init": large_step()}
    need, problem = memory_problem(cost, options, inputs, device)
    assert need is not None
    assert setting in problem, problem
    fitting = [
        less
        for text, changed, changed_device in cost.less(options, device)
        if text in problem and (less := cost.need(changed, inputs, changed_device))
    ]
    assert (not fitting) == (setting == "no setting")
    assert all(less.total <= memory * GIB for less in fitting[-1:])


def test_an_engine_too_large_for_one_card_is_told_how_many_it_needs():
    cost = signature_of(stages.find("sample")).cost
    options = {"engine": "vllm", "dtype": "bfloat16", "engine_options": None, "max_tokens": 512, "n": 8}
    device = Device("cuda", 8 * GIB)
    _, problem = memory_problem(cost, options, {"policy": large_step()}, device)
    assert "`tensor_parallel: 4` in the profile" in problem


def test_scoring_holds_weights_in_fp32_and_copies_under_autocast(tiny: Model):
    step = model_step(tiny.folder)
    full, low = (scoring_need(step, dtype, Device()) for dtype in ("float32", "bfloat16"))
    shape = planned_shape(step)
    assert full
    assert low
    assert shape
    assert full.parts["weights"] == 4 * shape.parameters
    assert low.parts["weights"] > full.parts["weights"]


@pytest.mark.parametrize(
    ("key", "kind"), [('"num_experts": 4,', "mixture of experts"), ('"is_encoder_decoder": true,', "encoder-decoder")]
)
def test_kinds_of_networks_that_are_not_counted_are_said(tiny: Model, tmp_path: Path, key: str, kind: str):
    """No number is better than a wrong one, and the plan says that there is none, and why."""
    folder = tmp_path / "other"
    shutil.copytree(tiny.folder, folder)
    config = (folder / "config.json").read_text().replace("{", "{" + key, 1)
    (folder / "config.json").write_text(config)
    with pytest.raises(NotEstimatedError, match=f"other is an? {kind}"):
        scoring_need(model_step(folder), "float32", CARD)
    trained = InputStep("optimize", {}, {"init": model_step(folder)})
    with pytest.raises(NotEstimatedError, match=kind):
        training_need(OPTIMIZE, {"init": trained}, CARD)


def test_draws_are_at_most_n_per_prompt_and_max_tokens_each():
    cost = signature_of(stages.find("sample")).cost
    options = {"n": 8, "max_tokens": 100, "split": "train"}
    prompts = Work({"prompts": Amount(12)}, splits={"train": Amount(10), "heldout": Amount(2)})
    work = cost.work(options, {}, {"prompts": prompts})
    assert work.of("candidates") == Amount(80, "at most")
    assert work.units == Amount(8000, "at most")


def test_a_judge_needs_its_engine_and_a_program_nothing():
    from stages.ranking.rankers import ranker

    cost = signature_of(stages.find("judge")).cost
    program: Bound = ranker.bind({"name": "brevity", "words": 3})
    judge: Bound = ranker.bind({"name": "llm_judge", "dtype": "bfloat16"})
    assert cost.need({"by": program}, {}, CARD) is None
    served = ranker.bind({"name": "endpoint", "url": "http://host/v1", "model": "m"})  # has a memory of its own
    assert cost.need({"by": served}, {"ranker": large_step()}, CARD) is None
    need = cost.need({"by": judge}, {"ranker": large_step()}, CARD)
    assert need is not None
    assert need.parts["KV cache"] > 0

"""Model folders by their own files: what cannot be used is refused when the plan is made, with the cure."""

import inspect
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline import AdapterPath, ModelPath
from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError, WinnowWarning
from stages.data.chat_templates import ARGUMENTS
from stages.data.tokenizer import Tokenizer
from stages.limits import check_ids, context_length
from stages.model_config import ModelConfig, network_classes
from stages.network.forward import forward_rows, logp_of
from stages.network.load import load_network
from stages.network.models import model
from stages.sampling.engines import open_engine
from tests.families import write_chat_model
from tests.stages.ranking.test_reward_models import headed
from tests.stages.training.test_checks import planned

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=400)


def copied(of: Model, folder: Path, **changes) -> Path:
    """Copy a model folder; `changes` are to its config, and those that are None are removed from it."""
    shutil.copytree(of.folder, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(folder: Path, change) -> Path:
    """Write the weights of a folder again as `change` returns them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


@pytest.fixture
def bare(data_dir, tmp_path):
    """Return a call that plans RSO with a folder as SFT policy, and returns the problems of the plan."""
    config = (data_dir / "demo.yaml").read_text().splitlines()
    lines = [line for line in config if not line.startswith("sft:")]
    home = tmp_path / "config"
    shutil.copytree(data_dir, home)
    (home / "demo.yaml").write_text("\n".join(lines))

    def problems(folder, **steps) -> str:
        sft = {"sft": {"use": "model", "with": {"path": str(folder)}}}
        try:
            planned(home, tmp_path, sft | steps)
        except WinnowError as error:
            return str(error)
        return ""

    return problems


# The kind of a network


def test_a_folder_that_is_a_policy_is_planned(tiny, bare):
    assert bare(tiny.folder) == ""


def test_models_that_read_more_than_text_are_refused(tiny, bare, tmp_path):
    """Gemma-3, Qwen-VL, Mistral-3: their vocabulary is in text_config, and their own weights have other names."""
    for name, architecture, part in [
        ("gemma3", "Gemma3ForConditionalGeneration", "vision_config"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "vision_config"),
        ("mistral3", "Mistral3ForConditionalGeneration", "vision_config"),
        ("voxtral", "VoxtralForConditionalGeneration", "audio_config"),
    ]:
        nested = {"text_config": SIZES, part: {}, "vocab_size": None, "model_type": name}
        folder = copied(tiny, tmp_path / name, architectures=[architecture], **nested)
        assert ModelConfig(folder).vocabulary == SIZES["vocab_size"]
        message = bare(folder)
        assert all(fact in message for fact in (str(folder), architecture, "text_config"))


def test_limits_are_read_from_a_nested_config(tiny, tmp_path):
    nested = {"text_config": {"vocab_size": 50, "max_position_embeddings": 64}, "vocab_size": None}
    nested["max_position_embeddings"] = None
    folder = copied(tiny, tmp_path / "nested", **nested)
    assert context_length(folder) == 64
    with pytest.raises(WinnowError, match="only ids below 50"):
        check_ids(Model(folder, "nested"), "prompts", [[50]])


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model_type": None}, ["model_type"]),
        ({"model_type": "ours", "architectures": ["OurForCausalLM"]}, ["model_type ours", "transformers"]),
        ({"architectures": ["LlamaModel"]}, ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"]),
        ({"architectures": ["LlamaForRewardModel"]}, ["LlamaForRewardModel", "LlamaForSequenceClassification"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "model_type llama"]),
    ],
)
def test_architectures_that_the_two_libraries_would_not_take_for_the_same_are_refused(
    tiny, bare, tmp_path, changes, facts
):
    message = bare(copied(tiny, tmp_path / "odd", **changes))
    assert all(fact in message for fact in ("sft: path: ", *facts))


def test_the_names_of_network_classes_are_transformers_own():
    """They are read from its source; here is the module itself."""
    from transformers.models.auto import modeling_auto

    assert {name: dict(getattr(modeling_auto, name)) for name in network_classes()} == network_classes()
    assert len(network_classes()) == 3


def test_a_damaged_config_is_refused(tiny, bare, tmp_path):
    folder = copied(tiny, tmp_path / "damaged")
    (folder / "config.json").write_text('{"model_type": "lla')
    assert all(fact in bare(folder) for fact in (str(folder / "config.json"), "copy it again"))


# Files of a folder


@pytest.mark.parametrize("content", [b"{oops", b"[1]", b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b'"x"'])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.json"]
)
def test_a_damaged_file_of_a_folder_is_refused_by_its_name(tiny, bare, tmp_path, name, content):
    folder = copied(tiny, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    message = bare(folder)
    assert str(folder / name) in message
    assert "sft: path:" in message or name == "config.json"
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "vocab_size", "303"),
        ("config.json", "text_config", [1]),
        ("config.json", "text_config.vocab_size", "9"),
        ("config.json", "quantization_config", "x"),
        ("config.json", "max_position_embeddings", "big"),
        ("config.json", "architectures", "LlamaForCausalLM"),
        ("config.json", "model_type", 3),
        ("generation_config.json", "eos_token_id", "<|im_end|>"),
        ("generation_config.json", "stop_strings", 3),
    ],
)
def test_a_value_of_a_wrong_type_in_a_folders_file_is_refused_by_its_key(tiny, bare, tmp_path, name, key, value):
    folder = copied(tiny, tmp_path / "odd")
    outer, _, inner = key.partition(".")
    content = json.loads((folder / name).read_text()) | {outer: {inner: value} if inner else value}
    (folder / name).write_text(json.dumps(content))
    assert all(fact in bare(folder) for fact in (str(folder / name), key, repr(value)))


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        (b"{% for m in messages %}{{ m.content }", "chat_template.jinja, line 1"),
        (b"{{ messages }}\n{% endfor %}", "chat_template.jinja, line 2"),
        (b"{{ messages }}\xe9", "chat_template.jinja is not UTF-8"),
    ],
)
def test_a_chat_template_that_cannot_be_read_is_refused_when_the_plan_is_made(tiny, bare, tmp_path, template, fact):
    folder = copied(tiny, tmp_path / "damaged")
    (folder / "chat_template.jinja").write_bytes(template)
    message = bare(folder)
    assert "sft: path: " in message
    assert fact in message


def test_the_template_of_an_adapter_with_a_tokenizer_is_the_one_that_is_read(sharp, resized, bare):
    folder, _ = resized
    (folder / "chat_template.jinja").write_text("{{ oops }")
    message = bare(sharp.folder, sft={"use": "model", "with": {"path": str(sharp.folder), "adapter": str(folder)}})
    assert f"adapter: {folder}: chat_template.jinja, line 1" in message


# Variables of a chat template

READING = "{% if thinking is not defined %}{% set thinking = true %}{% endif %}{{ thinking }}"


def options_of_template(folder, **options):
    return {"use": "model", "with": {"path": str(folder)} | options}


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"chat_template_kwargs": {"thinkng": False}}, ["thinkng", "did you mean 'thinking'"]),
        ({"chat_template_kwargs": {"tokenize": True}}, ["tokenize", "apply_chat_template"]),
        ({"chat_template_kwargs": {"chat_template": "X"}}, ["chat_template", "apply_chat_template"]),
        ({"chat_template_kwargs": {"documents": []}}, ["documents", "apply_chat_template"]),
        ({"chat_template_kwargs": {"messages": []}}, ["messages", "apply_chat_template"]),
        ({"date": "2026-01-31"}, ["date: no chat template", "unset"]),
        ({"date": "31 Jan"}, ["'31 Jan' is not a day"]),
        ({"chat_template_kwargs": {"thinking": False}}, []),
        ({"chat_template_kwargs": {"deep": 1}}, []),
    ],
)
def test_variables_that_reach_no_template_are_refused(tiny, bare, tmp_path, options, facts):
    """A misspelt name, an argument of `apply_chat_template`, a date that nothing reads; `deep` is of a named one."""
    folder = copied(tiny, tmp_path / "reading")
    template = folder / "chat_template.jinja"
    template.write_text(READING + template.read_text())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}{{ deep }}")
    message = bare(folder, sft=options_of_template(folder, **options))
    assert all(fact in message for fact in facts)
    assert bool(message) == bool(facts)


def test_a_variable_named_date_is_none_of_our_options(tiny, ctx, tmp_path):
    """Two names of one word: the day that `strftime_now` reads, and a variable of the template."""
    folder = copied(tiny, tmp_path / "dated")
    template = folder / "chat_template.jinja"
    asks = "{% if date is defined %}[{{ date }}]{% endif %}({{ strftime_now('%d %b') }})"
    template.write_text(asks + template.read_text())
    options = {"chat_template_kwargs": {"date": "today"}, "date": "2026-01-31"}
    tokenizer = Tokenizer(model(ctx, path=ModelPath(str(folder)), **options))
    assert tokenizer.rendered(tokenizer.prompt_ids("Hi")).startswith("[today](31 Jan)")


def test_the_arguments_that_no_template_is_free_to_read_are_transformers_own():
    names = set(inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert names - {"kwargs"} <= set(ARGUMENTS)


# Options of generation_config.json


def test_ends_at_texts_and_other_laws_of_a_folder_are_named_when_it_is_sampled(tiny, bare, tmp_path):
    """Texts that end a response would be drawn over: refused. What changes a draw is for the step to say: noted."""
    folder = copied(tiny, tmp_path / "options")
    file = folder / "generation_config.json"
    neutral = {"eos_token_id": 1, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.0, "suppress_tokens": []}
    file.write_text(json.dumps(neutral))
    with warnings.catch_warnings():
        warnings.simplefilter("error", WinnowWarning)
        assert bare(folder) == ""
    file.write_text(json.dumps(neutral | {"stop_strings": ["\nUser:"], "suppress_tokens": [5], "top_p": 0.9}))
    with pytest.warns(WinnowWarning) as notes:
        message = bare(folder)
    (note,) = [
        str(note.message) for note in notes if "generation_config" in str(note.message)
    ]  # of all steps that draw
    ignored, used = note.split("; they use")
    assert all(fact in ignored for fact in ("temperature: 0.6", "top_k: 20", "top_p: 0.9", "suppress_tokens: [5]"))
    assert all(name in used for name in ("temperature", "top_k", "top_p"))
    assert all(
        fact in message
        for fact in (
            "sample, eval_sample, eval_baseline: stop",
            "generation_config.json",
            "User:",
            "add them to `stop`",
        )
    )


# Policies and reward models


def test_a_reward_model_as_policy_is_refused_wherever_a_policy_is_needed(tiny, bare, tmp_path):
    message = bare(headed(tiny, tmp_path / "head").folder)
    for step, name in (("sample", "policy"), ("reference", "policy"), ("optimize", "init")):
        assert re.search(rf"^(.*, )?{step}(, .*)?: {name}: ", message, re.MULTILINE)
    assert "reward model" in message


def test_a_policy_as_reward_model_is_refused(tiny, bare):
    by = {name: {"with": {"by": "pointwise"}} for name in ("reward", "compare", "judge")}
    message = bare(tiny.folder, **by)
    assert "reward, compare, judge: ranker: needs a reward model" in message


@pytest.mark.filterwarnings("ignore:.*dtype. bfloat16, and its policy")
@pytest.mark.parametrize("dtype", [{}, {"dtype": "bfloat16"}])
def test_a_reward_model_is_a_ranker_by_one_line(tiny, data_dir, tmp_path, dtype):
    """What a ranker is says how it is read, in all three stages that rank; what a user says outranks that."""
    home = shutil.copytree(data_dir, tmp_path / "config")
    lines = [line for line in (data_dir / "demo.yaml").read_text().splitlines() if not line.startswith("ranker")]
    (home / "demo.yaml").write_text("\n".join(lines))
    ranker = {"ranker": {"use": "model", "with": {"path": str(headed(tiny, tmp_path / "head").folder)}}}
    plan = planned(home, tmp_path, ranker | dtype)
    by = {step.name: step.options["by"] for step in plan.steps if step.name in ("reward", "compare", "judge")}
    assert {name: bound.name for name, bound in by.items()} == dict.fromkeys(
        ("reward", "compare", "judge"), "pointwise"
    )
    assert {bound.options["dtype"] for bound in by.values()} == {dtype.get("dtype", "float32")}
    with pytest.raises(WinnowError, match="judge: ranker: needs a policy"):
        planned(home, tmp_path, ranker | {"judge": {"with": {"by": "pairwise"}}})


def test_a_policy_made_of_a_reward_model_is_none(tiny, data_dir, tmp_path):
    """The kind is followed through `optimize` and `reward_head`."""
    steps = {
        "head": {"use": "reward_head", "from": {"policy": "sft"}},
        "reward_model": {
            "use": "optimize",
            "from": {"init": "head", "examples": "preference_examples"},
            "with": {"objective": "sigmoid", "learning_rate": 1e-3},
        },
        "sample": {"from": {"policy": "reward_model"}},
    }
    with pytest.raises(WinnowError, match=r"sample: policy: needs a policy.*given a reward model"):
        planned(data_dir, tmp_path, steps)


def test_a_reward_model_whose_config_names_no_labels_is_one_by_its_weights(tiny, ctx, tmp_path):
    """transformers' default is two labels, for which the weights do not fit."""
    head = headed(tiny, tmp_path / "head")
    none = {"id2label": None, "label2id": None, "num_labels": None}
    folder = copied(head, tmp_path / "unnamed", **none)
    assert ModelConfig(folder).labels == 1
    assert ModelConfig(folder).problems() == []
    assert load_network(model(ctx, path=ModelPath(str(folder)))).config.num_labels == 1


def test_classifiers_of_several_classes_are_no_reward_models(tiny, bare, tmp_path):
    head = headed(tiny, tmp_path / "head")
    wide = rewritten(copied(head, tmp_path / "wide"), lambda t: t | {"score.weight": t["score.weight"].repeat(3, 1)})
    lost = rewritten(copied(head, tmp_path / "lost"), lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    assert "3 scores" in bare(wide)
    assert "no tensor `score.weight`" in bare(lost)


# Tokenizers of two models


def with_tokens(policy: Model, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a model whose tokenizer.json is changed."""
    copy = Path(shutil.copytree(policy.folder, folder))
    content = json.loads((copy / "tokenizer.json").read_text())
    change(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def swapped(content: dict[str, Any]) -> None:
    """Give the last two tokens of the vocabulary each other's id."""
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def larger(content: dict[str, Any]) -> None:
    """Add a token behind all others."""
    added = content["added_tokens"]
    added.append(added[-1] | {"id": len(content["model"]["vocab"]) + len(added), "content": "<new>"})


def renamed(content: dict[str, Any]) -> None:
    """Give the last added token another name, as a policy does with a reserved one."""
    content["added_tokens"][-1]["content"] = "<renamed>"


def test_ids_of_another_tokenizer_are_refused_when_the_plan_is_made(tiny, data_dir, tmp_path):
    """With the first id that is another token; of an added one, warn. Tokens more, or the same, are no reason."""
    changes = {"swapped": swapped, "renamed": renamed, "larger": larger, "same": lambda content: None}
    for name, change in changes.items():
        folder = with_tokens(tiny, tmp_path / name, change)
        steps = {
            "policy": {"use": "model", "with": {"path": str(tiny.folder)}},
            "prompts": {"from": {"tokenizer": "policy"}},
            "other": {"use": "model", "with": {"path": str(folder)}},
            "sample": {"from": {"policy": "other"}},
            "optimize": {"from": {"init": "other"}, "with": {"reference": "other"}},
        }
        if name == "renamed":
            with pytest.warns(WinnowWarning) as notes:
                planned(data_dir, tmp_path, steps)
            assert all(
                "and '<renamed>' here; all tokens that are not added are the same" in str(w.message) for w in notes
            )
            continue
        if name != "swapped":
            planned(data_dir, tmp_path, steps)
            continue
        with pytest.raises(WinnowError) as caught:
            planned(data_dir, tmp_path, steps)
        text = str(caught.value)
        for fact in ("policy: the ids of `prompts`", "optimize: init: the ids of `examples`", str(folder)):
            assert fact in text
        assert re.search(r"id \d+ is '.+' there and '.+' here", text)


def test_a_reward_model_is_not_trained_on_the_policys_reading_of_pairs(unmarked, data_dir, tmp_path):
    """Refuse it where its own template reads them otherwise; stage `ranker_examples` reads them by that."""
    policy = write_chat_model("qwen2", unmarked, tmp_path / "policy")
    scorer = write_chat_model("llama", unmarked, tmp_path / "scorer", score=True)
    of_policy = {"prompts": "preferences", "candidates": "preferences", "pairs": "preferences"}
    steps = {
        "sft": {"use": "model", "with": {"path": str(policy.folder)}},
        "scorer": {"use": "model", "with": {"path": str(scorer.folder)}},
        "preferences": {"from": {"tokenizer": "sft"}},
        "read": {"use": "examples", "from": of_policy},
        "better": {
            "use": "optimize",
            "from": {"init": "scorer", "examples": "read"},
            "with": {"objective": "sigmoid", "learning_rate": 1e-5},
        },
        "target": "better",
    }
    with pytest.raises(WinnowError, match=r"examples: .*ids of the policy.*`ranker_examples` whose `tokenizer` is"):
        planned(data_dir, tmp_path, steps)
    steps["read"] = {"use": "ranker_examples", "from": of_policy | {"tokenizer": "scorer"}}
    planned(data_dir, tmp_path, steps)


def test_a_reward_models_pairs_have_no_labels_to_choose(tiny, data_dir, tmp_path):
    steps = {
        "head": {"use": "reward_head", "from": {"policy": "sft"}},
        "ranker_examples": {"from": {"tokenizer": "head"}, "with": {"labels": "right"}},
    }
    with pytest.raises(WinnowError, match="labels: right, and `tokenizer` is a reward model"):
        planned(data_dir, tmp_path, steps)


# Quantised weights


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_weights_can_be_sampled_by_vllm_and_nothing_else(tiny, bare, tmp_path, method):
    folder = copied(tiny, tmp_path / method, quantization_config={"quant_method": method, "bits": 4})
    message = bare(folder, sample={"with": {"engine": "vllm"}})
    for step, name in (("reference", "policy"), ("optimize", "init")):
        assert re.search(
            rf"^(.*, )?{step}(, .*)?: {name}: .* has quantised weights \({method}\)", message, re.MULTILINE
        )
    assert not re.search("^(.*, )?sample(, .*)?: policy", message, re.MULTILINE)
    message = bare(folder, sample={"with": {"engine": "transformers"}})
    assert re.search("^(.*, )?sample(, .*)?: policy", message, re.MULTILINE)
    with pytest.raises(WinnowError, match=f"quantised \\({method}\\)"):
        load_network(Model(folder, "quantised"))


# Config and weights


def tensors_without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_hidden_layers": 3}, ["lack", "layers.2."]),
        ({"num_hidden_layers": 1}, ["have, and", "layers.1."]),
        ({"intermediate_size": 7}, ["mlp.", "7"]),
    ],
)
def test_a_config_of_another_model_is_refused_before_anything_is_drawn(tiny, ctx, tmp_path, changes, facts):
    """transformers would draw what is missing at random, and leave out what is too much."""
    folder = copied(tiny, tmp_path / "other", **changes)
    with pytest.raises(WinnowError, match="two models") as caught:
        model(ctx, path=ModelPath(str(folder)))
    assert all(fact in str(caught.value) for fact in facts)
    for load in (lambda: load_network(Model(folder, "x")), lambda: open_engine("transformers", folder, "float32")):
        with pytest.raises(WinnowError, match="two models"):
            load()


def only_integers(tensors):
    return {name: tensor.to(torch.int8) for name, tensor in tensors.items()}


def short_embedding(tensors):
    return {name: tensor[:-3].clone() if "embed_tokens" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("changes", "change", "facts"),
    [
        ({}, tensors_without("layers.1."), ["lack layer 1", "1 of 2 layers"]),
        ({"num_hidden_layers": 1}, dict, ["have layer 1", "config.json 1 layers"]),
        ({}, short_embedding, ["embed_tokens.weight has", "vocab_size"]),
        ({"tie_word_embeddings": False}, tensors_without("lm_head"), ["lack the head", "lm_head"]),
        ({}, only_integers, ["is of type I8", "no quantization_config"]),
    ],
    ids=["a layer missing", "a layer too many", "short embedding", "no head", "integers"],
)
def test_headers_of_weights_that_contradict_the_config_are_refused_when_the_plan_is_made(
    tiny, bare, tmp_path, changes, change, facts
):
    message = bare(rewritten(copied(tiny, tmp_path / "other", **changes), change))
    assert all(fact in message for fact in ["sft: path: ", str(tmp_path / "other"), *facts])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_tensors_name(tiny, ctx, tmp_path, value):
    """When the folder is copied, and wherever a network is loaded."""

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        return tensors

    folder = rewritten(copied(tiny, tmp_path / "spoilt"), spoil)
    facts = r"1 of [\d,]+ weights of model.layers.1.mlp.up_proj.weight are not finite"
    for load in (
        lambda: model(ctx, path=ModelPath(str(folder))),
        lambda: load_network(Model(folder, "spoilt")),
        lambda: open_engine("transformers", folder, "float32"),
    ):
        with pytest.raises(WinnowError, match=facts):
            load()


# Vocabularies


def test_tokens_without_an_embedding_are_refused_unless_they_are_special(tiny, ctx, tmp_path):
    """Gemma-3's tokenizer has one for images beyond its text model's vocabulary: no text with it is read."""
    for special in (True, False):
        folder = copied(tiny, tmp_path / str(special))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<image>"], special_tokens=special)
        tokenizer.save_pretrained(folder)
        if special:
            model(ctx, path=ModelPath(str(folder)))
        else:
            with pytest.raises(WinnowError, match=r"'<image>'.*resize"):
                model(ctx, path=ModelPath(str(folder)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_an_id_of_an_end_that_the_tokenizer_lacks_is_refused_when_the_plan_is_made(tiny, bare, tmp_path, name, key):
    """No response would end there: config and tokenizer are of two models."""
    folder = copied(tiny, tmp_path / "other")
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(content | {key: 99_999}))
    message = bare(folder)
    assert all(fact in message for fact in ["sft: path: ", name, f"{key} 99999", str(folder), "tokenizer"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": "x"}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}}, "added_tokens": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("added_tokens.json", '{"a": [1]}'),
    ],
)
def test_files_of_a_tokenizer_of_another_form_are_refused_when_the_plan_is_made(tiny, bare, tmp_path, name, content):
    folder = copied(tiny, tmp_path / "other")
    (folder / name).write_text(content)
    message = bare(folder)
    assert all(fact in message for fact in [str(folder), name, "copy them again"])


def test_a_tokenizer_larger_than_the_network_is_refused_when_the_plan_is_made(tiny, bare, tmp_path):
    """A special token beyond is not: Gemma-3 has one, and no text with it is read."""
    for special in (True, False):
        folder = copied(tiny, tmp_path / str(special))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<image>"], special_tokens=special)
        tokenizer.save_pretrained(folder)
        message = bare(folder)
        assert ("resize the network's embeddings" in message) != special
        assert special or f"only ids below {ModelConfig(folder).vocabulary}" in message


@pytest.fixture
def resized(sharp, tmp_path):
    """A LoRA whose training added two tokens: peft saves embedding and head with it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(sharp.folder)
    tokenizer.add_tokens(["<|one|>", "<|two|>"], special_tokens=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(sharp.folder)
    network.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    network = get_peft_model(network, config)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(1.5)
    network.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", network


def test_an_adapter_that_added_tokens_brings_their_embeddings(sharp, resized, bare, ctx):
    folder, network = resized
    assert bare(sharp.folder, sft={"use": "model", "with": {"path": str(sharp.folder), "adapter": str(folder)}}) == ""
    merged = model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(folder)))
    vocabulary = ModelConfig(sharp.folder).vocabulary
    assert vocabulary is not None
    rows = [([3, 4, 5], [6, 7, vocabulary + 1])]
    expected = forward_rows(logp_of, network.base_model.model.eval(), rows, "float32", 100)
    merged = Model(merged.folder, model_digest(merged.folder))
    assert forward_rows(logp_of, load_network(merged), rows, "float32", 100) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_that_added_tokens_without_their_embeddings_is_refused(sharp, resized, bare):
    folder, _ = resized
    file = folder / "adapter_model.safetensors"
    save_file(tensors_without("embed_tokens")(tensors_without("lm_head")(load_file(file))), file)
    message = bare(sharp.folder, sft={"use": "model", "with": {"path": str(sharp.folder), "adapter": str(folder)}})
    assert all(fact in message for fact in ("adapter: its tokenizer has '<|one|>'", "2 such tokens", "embeddings"))


def test_a_folder_that_changes_while_it_is_copied_is_refused(sharp, ctx, tmp_path, monkeypatch):
    """Also where it is put back in time: the copy is what every later step reads, and its content must be the key's."""
    path = ModelPath(str(copied(sharp, tmp_path / "policy")))
    copyfile = shutil.copyfile

    def copy_of_another_version(source, target):
        copyfile(source, target)
        if source.name == "model.safetensors":
            rewritten(target.parent, lambda weights: {name: weight * 0 for name, weight in weights.items()})

    monkeypatch.setattr("stages.network.models.shutil.copyfile", copy_of_another_version)
    with pytest.raises(WinnowError, match="policy changed while it was copied; run again"):
        model(ctx, path=path)

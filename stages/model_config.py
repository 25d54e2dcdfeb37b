"""Facts about a model, read from its folder's config and the headers of its weights before any weight is loaded."""

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline import InputStep, ModelPath
from pipeline.store.fingerprints import TOKENIZER_FILES
from pipeline.store.weights import tensor_shapes, weight_files
from schemas import WinnowError

Output = Literal["vocabulary", "score"]
CLASSIFIER = "ForSequenceClassification"
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
OTHER_INPUTS = {"vision_config": "images", "audio_config": "sound"}  # parts of a config that a text model has not
AUTO_CLASSES = (  # transformers' lists of network classes by model type: policies, and reward models among classifiers
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)


class ModelConfig:
    """Config of a model folder. The numbers of a language model inside a larger one are in its `text_config`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.content: dict[str, Any] = dict(json.loads((folder / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            raise WinnowError(f"{folder / 'config.json'} is not a JSON object ({error}); copy it again") from None
        self.text: dict[str, Any] = self.content.get("text_config") or self.content

    @property
    def architecture(self) -> str | None:
        """Return the name of the network's class, as vLLM looks it up; transformers goes by `model_type`."""
        return next(iter(self.content.get("architectures") or []), None)

    @property
    def output(self) -> Output:
        """Return what it ends in: a policy in a vocabulary, a reward model in a score."""
        return "score" if str(self.architecture).endswith(CLASSIFIER) else "vocabulary"

    @property
    def vocabulary(self) -> int | None:
        """Return the number of ids that it has embeddings for, padding included; None if the config does not say."""
        return self.text.get("vocab_size")

    @property
    def context_length(self) -> int | None:
        """Return the length of the longest sequence that it reads, in tokens; None if the config does not say."""
        return next((int(self.text[name]) for name in CONTEXT_LENGTHS if self.text.get(name)), None)

    @property
    def quantization(self) -> str | None:
        """Return the method by which its weights are quantised (gptq, awq, bitsandbytes), or None."""
        method = self.content.get("quantization_config") or self.text.get("quantization_config")
        return str(method.get("quant_method") or "unknown") if method else None

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of each of its weights by name."""
        return tensor_shapes(weight_files(self.folder))

    @property
    def labels(self) -> int | None:
        """Return the number of scores that a reward model's weights give; None if no tensor is named `score.weight`.

        Configs name it by `num_labels` or `id2label`, or not at all, which transformers takes for two.
        """
        shape = self.shapes.get("score.weight")
        return shape[0] if shape else None

    def problems(self) -> list[str]:
        """Return why it is no network that sampling, scoring and training would all take for the same."""
        kind, architecture = self.content.get("model_type"), self.architecture
        for part, what in OTHER_INPUTS.items():
            if part in self.content:
                return [
                    f"{architecture} reads {what} too, and only text models can be sampled and trained: save its "
                    "language model alone (of `text_config`, with the head) and give that folder"
                ]
        if not kind:
            return ["config.json has no `model_type`; copy it again"]
        classes = network_classes()
        expected = [names[kind] for names in classes.values() if kind in names]
        if classes and not expected:
            return [
                f"config.json has model_type {kind}, of which the installed transformers has no language model or "
                "sequence classifier: update transformers, or take another model (code in a folder is not run)"
            ]
        if classes and architecture is not None and architecture not in expected:
            return [
                f"config.json names {architecture}, and of model_type {kind} transformers has {', '.join(expected)}: "
                "give a folder of one of these (an embedding model or a reward model of another form is none)"
            ]
        if self.output == "score" and self.labels != 1:
            actual = "no tensor `score.weight`" if self.labels is None else f"{self.labels} scores"
            return [f"{architecture} with {actual} is no reward model: one score, by a layer `score`, is what is read"]
        return []


def planned_output(step: InputStep) -> Output | None:
    """Return what the model of a step will end in, as far as a plan can know it."""
    if step.stage == "reward_head":
        return "score"
    if step.stage == "optimize" and "init" in step.inputs:
        return planned_output(step.inputs["init"])
    if step.stage == "untrained":
        return "vocabulary"
    config = planned_config(step)
    return config.output if config else None


def input_problems(
    inputs: Mapping[str, InputStep], name: str, needs: Output | None = None, *, quantized: bool = False
) -> list[str]:
    """Return at plan time why a stage cannot use the model of its input `name`.

    needs: what the model must end in; `quantized`: whether quantised weights will do.
    """
    problems = []
    step = inputs.get(name, InputStep(""))
    output, config = planned_output(step), planned_config(step) if step.stage == "model" else None
    if needs and output and output != needs:
        kinds = {"vocabulary": "a policy, which ends in a vocabulary", "score": "a reward model, which ends in a score"}
        problems.append(f"{name}: needs {kinds[needs]}, and is given {kinds[output]}; name another step under `from`")
    if config and config.quantization and not quantized:
        problems.append(
            f"{name}: {config.folder} has quantised weights ({config.quantization}), which only vLLM reads, to sample; "
            "give the folder that they were quantised from"
        )
    return problems


def planned_config(step: InputStep) -> ModelConfig | None:
    """Return the config of the user's folder that the model of a step is made from, if it is made from one."""
    for name in ("init", "policy"):  # of `optimize` and `reward_head`
        if name in step.inputs:
            return planned_config(step.inputs[name])
    path = step.options.get("path")
    if step.stage == "model" and isinstance(path, ModelPath):
        with suppress(WinnowError):  # a damaged config is the `model` step's own problem
            return ModelConfig(path.path)
    return None


def chat_template_of(folder: Path) -> str:
    """Return the text of a folder's chat templates, empty if it has none, without loading its tokenizer."""
    texts = []
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (file := folder / name).is_file():
            texts.append(str(json.loads(file.read_text(encoding="utf-8")).get("chat_template", "")))
    texts += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("**/*.jinja"))]
    return "\n".join(texts)


def planned_chat_template(step: InputStep) -> str | None:
    """Return the text of the chat template that a step's model will have, empty for none; None if no plan knows it."""
    for name in ("init", "policy"):  # of `optimize` and `reward_head`, which keep it
        if name in step.inputs:
            return planned_chat_template(step.inputs[name])
    path = step.options.get("path")
    if step.stage != "model" or not isinstance(path, ModelPath):
        return None
    if (template := step.options["chat_template"]) is not None:
        return str(template.path.read_text(encoding="utf-8"))
    folders = [path.path, *([step.options["adapter"].path] if step.options["adapter"] else [])]
    with_tokenizer = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    return chat_template_of(with_tokenizer[-1])  # the adapter's comes first


@lru_cache
def network_classes() -> dict[str, dict[str, str]]:
    """Return transformers' names of network classes by model type, by list.

    They are read from its source: to import the module takes torch and seconds, and a plan should take neither. Empty
    where transformers is not installed: the machine that plans need not be the one that loads.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse((Path(spec.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8"))
    return {
        node.targets[0].id: dict(ast.literal_eval(node.value.args[0]))
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in AUTO_CLASSES
        and isinstance(node.value, ast.Call)
    }

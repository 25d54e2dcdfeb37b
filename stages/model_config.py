"""Facts about a model, read from its folder's config and the headers of its weights before any weight is loaded."""

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import InputStep, ModelPath
from pipeline.store.weights import not_finite, tensor_shapes, tensor_types, weight_files
from schemas import WinnowError, WinnowWarning

Output = Literal["vocabulary", "score"]
# Options of `from_pretrained`: nothing is downloaded, and code that a folder names is neither run nor asked for.
FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}
CLASSIFIER = "ForSequenceClassification"
# Key of a reward model's config.json: it was made of a policy here, and is trained on responses up to the end of their
# turn, and on nothing of what its chat template writes behind that. Others are trained on all that it renders.
SCORED_AT_END = "winnow_scored_at_end_of_turn"
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # in the names of a layer's tensors
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.", "embed_out.", "output.")  # layers that end in the vocabulary
NARROW_EMBEDDINGS = ("word_embed_proj_dim", "embedding_size", "embed_dim")  # of another width than the layers
HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")
HEAD_COUNTS = ("num_attention_heads", "n_head")
GENERATION = "generation_config.json"
OTHER_INPUTS = {"vision_config": "images", "audio_config": "sound"}  # parts of a config that a text model has not
AUTO_CLASSES = (  # transformers' lists of network classes by model type: policies, and reward models among classifiers
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)


# Options of generation_config.json that change what a model's own `generate` draws, with the values that change
# nothing. Those with options of stage `sample` (temperature, top_k) are left out: everybody sets them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "min_p": (0,), "top_h": (), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],), "force_words_ids": ([],), "sequence_bias": ({}, []),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "forced_decoder_ids": ([],), "min_length": (0,), "min_new_tokens": (0,), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "watermarking_config": (), "penalty_alpha": (0,), "num_beams": (1,), "constraints": ([],),
}  # fmt: skip


class _File(BaseModel):
    """Types of what is read of a file; other keys may hold anything."""

    model_config = ConfigDict(strict=True)

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


class _TextConfig(_File):
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    max_seq_len: int | None = None
    max_sequence_length: int | None = None
    seq_length: int | None = None
    quantization_config: dict[str, Any] | None = None


class _Config(_TextConfig):
    type: str | None = Field(None, alias="model_type")  # a name that pydantic keeps for itself
    architectures: list[str] | None = None
    text_config: _TextConfig | None = None


class _GenerationConfig(_File):
    stop_strings: str | list[str] | None = None


def json_object(file: Path, types: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; raise WinnowError with its name if it is none, or not of these types."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"but a {type(content).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise WinnowError(f"{file} is not a JSON object ({error}); copy it again") from None
    try:
        if types:
            types.model_validate(content)
    except ValidationError as error:
        # Of `X | None`, pydantic names each alternative: the key is what precedes them.
        keys = {"text_config", *_Config.model_fields, *_GenerationConfig.model_fields, "model_type"}
        wrong = {".".join(str(key) for key in item["loc"] if key in keys): item["input"] for item in error.errors()}
        problems = (f"{key} is {value!r}, which is of a wrong type" for key, value in wrong.items())
        raise WinnowError(*(f"{file}: {problem}; copy it again" for problem in problems)) from None
    return content


class ModelConfig:
    """Config of a model folder. The numbers of a language model inside a larger one are in its `text_config`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = json_object(folder / "config.json", _Config)
        self.text: dict[str, Any] = self.content.get("text_config") or self.content

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Return the folder's options of `generate`; empty if it has no file of them."""
        file = self.folder / GENERATION
        return json_object(file, _GenerationConfig) if file.is_file() else {}

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
    def head_size(self) -> int | None:
        """Return the size of a head of attention; None if the config does not say, or if keys are latent (MLA)."""
        hidden, heads = (
            next((self.text[name] for name in names if self.text.get(name)), None)
            for names in (HIDDEN_SIZES, HEAD_COUNTS)
        )
        if self.text.get("kv_lora_rank") or not isinstance(hidden, int) or not isinstance(heads, int):
            return None
        return int(self.text.get("head_dim") or hidden // heads)

    @property
    def quantization(self) -> str | None:
        """Return the method by which its weights are quantised (gptq, awq, bitsandbytes), or None."""
        method = self.content.get("quantization_config") or self.text.get("quantization_config")
        return str(method.get("quant_method") or "unknown") if method else None

    @property
    def narrow_attention(self) -> str:
        """Return by which key layers attend to less than all that precedes a token; "" if the config names none.

        A config that leaves windows to its class's defaults names none.
        """
        types = self.text.get("layer_types")
        if isinstance(types, list):
            others = sorted({str(kind) for kind in types} - {"full_attention"})
            return f"layer_types: {', '.join(others)}" if others else ""
        layers, first = self.text.get("num_hidden_layers"), self.text.get("max_window_layers")  # Qwen2's
        has_windows = self.text.get("use_sliding_window", first is None) and (
            first is None or not layers or first < layers
        )
        for key in ("sliding_window", "attention_chunk_size"):
            if self.text.get(key) and (has_windows or key != "sliding_window"):
                return f"{key}: {self.text[key]}"
        return ""

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
            remote = self.content.get("auto_map")
            named = f", and auto_map names code for it ({json.dumps(remote)[:100]}), which is not run" if remote else ""
            return [
                f"config.json has model_type {kind}, of which the installed transformers has no language model or "
                f"sequence classifier{named}: update transformers, or take another model (code in a folder is not run)"
            ]
        if classes and architecture is not None and architecture not in expected:
            return [
                f"config.json names {architecture}, and of model_type {kind} transformers has {', '.join(expected)}: "
                "give a folder of one of these (an embedding model or a reward model of another form is none)"
            ]
        if self.output == "score" and self.labels != 1:
            actual = "no tensor `score.weight`" if self.labels is None else f"{self.labels} scores"
            return [f"{architecture} with {actual} is no reward model: one score, by a layer `score`, is what is read"]
        return self.weight_problems()

    def weight_problems(self) -> list[str]:
        """Return where the headers of the weights contradict the config: types, layers, embedding, head.

        When a model is read, all names and shapes are compared with the network's, for which it takes torch.
        """
        of_two = "config.json and weights are of two models, or files of one are missing; copy both again"
        if self.quantization:  # of other names, shapes and types
            return []
        types = tensor_types(weight_files(self.folder))
        if not types:
            return [f"its weight files are empty: {of_two}"]
        integer = [name for name, kind in types.items() if name.endswith("weight") and kind[0] in "IU"]
        if integer:
            return [
                f"{min(integer)} is of type {types[min(integer)]} ({len(integer)} such tensors), and config.json has "
                "no quantization_config that says what these integers stand for: give the folder that they were "
                "quantised from"
            ]
        count = next((self.text[name] for name in LAYER_COUNTS if isinstance(self.text.get(name), int)), None)
        layers = {int(match[1]) for name in self.shapes if (match := LAYER.search(name))}
        missing = sorted({*range(count)} - layers) if count is not None and layers else []
        if missing and not self.content.get("is_encoder_decoder"):
            return [f"its weights lack layer {missing[0]} ({len(missing)} of {count} layers): {of_two}"]
        # Some have layers beyond the count that predict further tokens, and transformers leaves these out.
        extra = [layer for layer in layers if count is not None and layer >= count]
        if extra and not self.content.get("is_encoder_decoder") and "num_nextn_predict_layers" not in self.text:
            return [f"its weights have layer {max(extra)}, and config.json {count} layers: {of_two}"]
        if problems := self._layer_problems(of_two) or self._embedding_problems(of_two):
            return problems
        is_untied = self.text.get("tie_word_embeddings") is False and self.output == "vocabulary"
        if is_untied and layers and not any(head in name for name in self.shapes for head in HEADS):
            return [f"its weights lack the head (lm_head), which by config.json is not tied to the embedding: {of_two}"]
        if counts := not_finite(weight_files(self.folder)):
            return [
                f"{counts[min(counts)]:,} weights of {min(counts)} are not finite (NaN or infinite; {len(counts)} such "
                "tensors): a training that failed, or a damaged copy; give a folder from before that"
            ]
        return []

    def _layer_problems(self, cause: str) -> list[str]:
        """Return which layer lacks a weight that all others of its kind have, or has it in another shape.

        Two layers do not say which of them is right, and the first may have no norm (ModernBERT). What is left to find
        is found when the network is built.
        """
        kinds = self.text.get("layer_types")
        by_layer: dict[tuple[str, str], dict[int, dict[str, list[int]]]] = {}
        for name, shape in self.shapes.items():
            if match := LAYER.search(name):
                number = int(match[1])
                kind = str(kinds[number]) if isinstance(kinds, list) and number < len(kinds) else ""
                of_kind = by_layer.setdefault((name[: match.start()], kind), {})
                of_kind.setdefault(number, {})[name[match.end() :]] = shape
        # A config that lists a size per layer says itself that they differ.
        lists = [value for name, value in self.text.items() if isinstance(value, list) and name != "layer_types"]
        for (prefix, _), layers in by_layer.items():
            if len(layers) < 3:
                continue
            layers_with = Counter(name for shapes in layers.values() for name in shapes)
            for number, shapes in layers.items():
                lacking = [
                    name for name, count in layers_with.items() if count == len(layers) - 1 and name not in shapes
                ]
                lacking = [name for name in lacking if number or "norm" not in name]
                has_others = any(layers_with[name] == 1 for name in shapes)  # which no other layer has: another kind
                if lacking and not has_others:
                    return [
                        f"its weights lack {min(lacking)} in layer {number} of {prefix or 'the network'} "
                        f"({len(lacking)} such weights), which all other layers have: {cause}"
                    ]
            if any(len(value) >= len(layers) for value in lists):
                continue
            for name, count in layers_with.items():
                shapes_of = {number: tuple(shapes[name]) for number, shapes in layers.items() if name in shapes}
                (usual, times), *others = Counter(shapes_of.values()).most_common()
                if count > 2 and times == count - 1 and others:
                    number = next(number for number, shape in shapes_of.items() if shape != usual)
                    return [
                        f"{name} is {list(shapes_of[number])} in layer {number}, and {list(usual)} in all other "
                        f"layers: {cause}"
                    ]
        return []

    def _embedding_problems(self, cause: str) -> list[str]:
        """Return where the embedding or the head has another size than the config says."""
        size, rows = self.vocabulary, {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        if size is None or not rows:
            return []
        width = next((self.text[name] for name in HIDDEN_SIZES if isinstance(self.text.get(name), int)), None)
        if any(name in self.text for name in NARROW_EMBEDDINGS):
            width = None
        for name, shape in rows.items():
            if name.endswith(EMBEDDINGS) and shape[0] != size:
                return [f"{name} has {shape[0]} rows, and config.json vocab_size {size}: {cause}"]
            if name.endswith(EMBEDDINGS) and width is not None and shape[1] != width:
                return [f"{name} has {shape[1]} columns, and by config.json a state has {width} numbers: {cause}"]
            is_head = any(f".{name}".endswith(f".{head}weight") for head in HEADS) and not LAYER.search(name)
            if is_head and self.output == "vocabulary" and shape[0] != size:
                return [f"{name} has {shape[0]} rows, and config.json vocab_size {size}: {cause}"]
        if not any(shape[0] == size for shape in rows.values()):
            return [f"its weights lack the embedding: none has {size} rows, which is config.json's vocab_size: {cause}"]
        return []

    def token_problems(self, folder: Path, rows: int | None) -> list[str]:
        """Return where the tokenizer in a folder is not this network's: ids without an embedding, ends that it lacks.

        rows: number of ids that the network has embeddings for; None if unknown.
        """
        try:
            tokens = tokenizer_ids(folder)
        except WinnowError as error:
            return list(error.problems)
        if tokens is None:
            return []
        ids, special = tokens
        named = {("config.json", name): self.content.get(name) for name in ("bos_token_id", "eos_token_id")}
        named |= {(GENERATION, name): self.generation.get(name) for name in ("bos_token_id", "eos_token_id")}
        problems = []
        for (file, name), value in named.items():
            lacking = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
            if lacking := [token for token in lacking if token not in ids]:
                problems.append(
                    f"{file} has {name} {lacking[0]}, and the tokenizer in {folder} no such token: they are of two "
                    "models; copy the model's own tokenizer, or set the id that ends its responses"
                )
        # A special token beyond is never read: texts with one are rejected.
        beyond = [] if rows is None else [token for token in ids - special if token >= rows]
        if beyond:
            problems.append(
                f"the tokenizer in {folder} has id {max(beyond)} ({len(beyond)} such tokens), and its network only ids "
                f"below {rows}: they are of two models; to keep both, resize the network's embeddings first"
            )
        return problems


def remote_tokenizer(folder: Path) -> list[str]:
    """Return why a folder's tokenizer would be another one without the code that it names, which is not run."""
    file = folder / "tokenizer_config.json"
    content = json_object(file) if file.is_file() else {}
    remote = content.get("auto_map")
    if isinstance(remote, dict):
        remote = remote.get("AutoTokenizer")
    name = content.get("tokenizer_class")
    spec = find_spec("transformers")
    if not remote or spec is None or spec.origin is None:
        return []
    if isinstance(name, str) and name.isidentifier():
        pattern = re.compile(rf"^(class )?{name.removesuffix('Fast')}(Fast)?\b", re.MULTILINE)
        package = Path(spec.origin).parent
        files = [*package.glob("tokenization_utils*.py"), *package.glob("models/*/tokenization_*.py")]
        if any(pattern.search(file.read_text(encoding="utf-8")) for file in files):
            return []
    return [
        f"{file}: its tokenizer is code that auto_map names ({json.dumps(remote)[:100]}), which is not run, and "
        f"transformers has no class {name}: give a folder whose tokenizer transformers has (a `tokenizer.json`, and "
        "`tokenizer_class: PreTrainedTokenizerFast` where that is all of it)"
    ]


def tokenizer_ids(folder: Path) -> tuple[set[int], set[int]] | None:
    """Return all ids of a folder's tokenizer, and those of its special tokens; None if no tokenizer.json has them.

    Raises WinnowError for files of another form.
    """
    content, config, more = (
        json_object(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    )
    try:
        vocabulary = (content.get("model") or {}).get("vocab")
        if not vocabulary:
            return None
        ids = {*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))}
        added = {token["id"]: token.get("special", False) for token in content.get("added_tokens") or []}
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            added[int(number)] = added.get(int(number), False) or token.get("special", False)
        ids |= {*added, *more.values()}
        if not all(type(token) is int for token in ids):
            raise TypeError("an id is no whole number")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WinnowError(
            f"{folder}: its tokenizer.json, tokenizer_config.json and added_tokens.json are not those of a tokenizer "
            f"({type(error).__name__}: {error}); copy them again"
        ) from None
    return ids, {number for number, is_special in added.items() if is_special}


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


def generation_problems(config: ModelConfig, drawing: Mapping[str, Any]) -> list[str]:
    """Return at plan time why a sampler would not end where a policy's own folder says; warn of what else it says.

    generation_config.json may hold options that change what a model draws. Only its EOS ids are honoured: what is drawn
    is for the options of a stage to say, whichever folder the policy is in. These are `drawing`.
    """
    folder, options = config.folder.name, config.generation
    changing = [
        name for name, neutral in NEUTRAL.items() if options.get(name) is not None and options[name] not in neutral
    ]
    if changing:
        law = ["temperature", "top_k", *changing]
        unread = ", ".join(f"{name}: {json.dumps(options[name])}" for name in law if options.get(name) is not None)
        warnings.warn(
            f"{folder}: of its {GENERATION} only the EOS ids are read, and draws apply none of {unread}; they use the "
            f"options of the step ({', '.join(name for name in law if name in drawing)})",
            WinnowWarning,
            stacklevel=2,
        )
    texts = options.get("stop_strings") or []
    stop = drawing["stop"] or ()
    missing = [text for text in ([texts] if isinstance(texts, str) else texts) if text not in stop]
    if not missing:
        return []
    return [f"stop: {GENERATION} of {folder} ends responses at {json.dumps(missing)} too; add them to `stop`"]


def planned_config(step: InputStep) -> ModelConfig | None:
    """Return the config of the user's folder that the model of a step is made from, if it is made from one."""
    for name in ("init", "policy"):  # of `optimize` and `reward_head`
        if name in step.inputs:
            return planned_config(step.inputs[name])
    path = step.options.get("path")
    if step.stage == "model" and isinstance(path, ModelPath):
        with suppress(WinnowError):  # a damaged config is the `model` step's own problem
            config = ModelConfig(path.path)
            _ = config.generation  # which is read here, so that its damage is that step's problem too
            return config
    return None


def id_problems(inputs: Mapping[str, InputStep], table: str, model: str) -> list[str]:
    """Return at plan time why the ids of an input are none of a model's: the tokenizer that wrote them is another.

    Only an id that is another token there counts, and tokenizers that a plan can read: one may have tokens more. Of an
    added token, such as a reserved one that a policy has renamed, only warn.
    """
    writer, reader = _writer_of_ids(inputs.get(table)), _owner_of_tokenizer(inputs.get(model))
    if writer is None or reader is None or writer == reader:
        return []
    folders = [_tokenizer_folder(step) for step in (writer, reader)]
    if None in folders or (difference := _first_difference(*folders)) is None:  # type: ignore[arg-type]
        return []
    number, written, read, is_added = difference
    text = (
        f"{model}: the ids of `{table}` were written by the tokenizer of {folders[0]}, and that of {folders[1]} is "
        f"another: id {number} is {written!r} there and {read!r} here"
    )
    if is_added:
        warnings.warn(f"{text}; all tokens that are not added are the same", WinnowWarning, stacklevel=2)
        return []
    return [f"{text}; give both the same model under `from`"]


def _writer_of_ids(step: InputStep | None) -> InputStep | None:
    """Return the step whose tokenizer wrote the ids of a table, None if a plan cannot know it."""
    if step is None:
        return None
    if "tokenizer" in step.inputs:
        return _owner_of_tokenizer(step.inputs["tokenizer"])
    sources = (step.inputs[name] for name in ("prompts", "candidates", "examples", *step.inputs) if name in step.inputs)
    return next((writer for source in sources if (writer := _writer_of_ids(source))), None)


def _owner_of_tokenizer(step: InputStep | None) -> InputStep | None:
    """Return the step from which the model of a step has its tokenizer: `optimize` and `reward_head` keep it."""
    while step is not None and (source := step.inputs.get("init") or step.inputs.get("policy")):
        step = source
    return step


def _tokenizer_folder(step: InputStep) -> Path | None:
    path = step.options.get("path")
    return path.path if step.stage == "model" and isinstance(path, ModelPath) else None


def _first_difference(first: Path, second: Path) -> tuple[int, str, str, bool] | None:
    """Return the first id that is another token in another folder's tokenizer, both, and whether only added ones are.

    None if no difference is known.
    """
    files = [folder / "tokenizer.json" for folder in (first, second)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return None
    (ours, added_to_ours), (theirs, added_to_theirs) = map(_tokens_by_id, files)
    different = [number for number in sorted(ours.keys() & theirs.keys()) if ours[number] != theirs[number]]
    of_vocabulary = [number for number in different if number not in added_to_ours | added_to_theirs]
    number = next(iter(of_vocabulary or different), None)
    return None if number is None else (number, ours[number], theirs[number], not of_vocabulary)


def _tokens_by_id(file: Path) -> tuple[dict[int, str], set[int]]:
    """Return the tokens of a tokenizer.json by their ids, and the ids of added ones.

    None of a damaged file, which its own step reports.
    """
    with suppress(WinnowError, KeyError, TypeError):
        content = json_object(file)
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        pairs = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((item[0], n) for n, item in enumerate(vocabulary))
        )
        tokens = {int(number): str(token) for token, number in pairs}
        return tokens | {int(item["id"]): str(item["content"]) for item in added}, {int(item["id"]) for item in added}
    return {}, set()


def planned_context(step: InputStep | None) -> int | None:
    """Return the length of the longest sequence that the model of a step reads, as far as a plan can know it."""
    while step is not None and (source := step.inputs.get("init") or step.inputs.get("policy")):
        step = source
    if step is None:
        return None
    if step.stage == "untrained":
        return step.options.get("context")
    config = planned_config(step)
    return config.context_length if config else None


def planned_head_size(step: InputStep | None) -> int | None:
    """Return the size of a head of attention of the model of a step, as far as a plan can know it."""
    while step is not None and (source := step.inputs.get("init") or step.inputs.get("policy")):
        step = source
    if step is None:
        return None
    if step.stage == "untrained" and step.options:
        return int(step.options["hidden"] // step.options["heads"])
    config = planned_config(step)
    return config.head_size if config else None


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

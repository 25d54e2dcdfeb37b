"""Stages that provide a model: a folder of the user, a reward model to train, or, for demos, random weights."""

import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pipeline import EXECUTION, AdapterPath, DataPath, InputStep, ModelPath, StageContext, TemplatePath, stage
from pipeline.store.fingerprints import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    COPY_OF,
    TOKENIZER_FILES,
    model_digest,
    model_files,
    network_digest,
    policy_of_copy,
)
from pipeline.store.weights import let_others_read, tensor_shapes
from schemas import MachineError, Model, WinnowError
from stages.data.chat_templates import (
    TODAY,
    chat_templates,
    unread_options,
    unreadable,
    variables,
    with_defaults,
)
from stages.data.files import DataSource
from stages.data.texts import TEMPLATE_OPTIONS
from stages.model_config import FROM_FOLDER, ModelConfig, input_problems, json_object, remote_tokenizer
from stages.network.card import carried, write_card, write_copy_card
from stages.options import Count, Precision, Seed

PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file
JSON_FILES = (  # that transformers reads, each an object; other files of a folder may hold anything
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
CONFIGS = ("config.json", "generation_config.json", ADAPTER)
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
ROLE_TOKENS = ("<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _check_model(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return at plan time what the folders' own files say against them."""
    path, adapter = options["path"], options["adapter"]
    problems: list[str] = []
    folders = {"path": path.path} | ({"adapter": adapter.path} if adapter else {})
    for option, folder in folders.items():
        for name in JSON_FILES:
            try:
                if (folder / name).is_file():
                    json_object(folder / name)
            except WinnowError as error:
                problems += [f"{option}: {problem}" for problem in error.problems]
    if problems:
        return problems
    try:
        config = ModelConfig(path.path)
        _ = config.generation  # for what it says of its file
    except WinnowError as error:
        return [f"path: {problem}" for problem in error.problems]
    problems += [f"path: model folder {path}: {problem}" for problem in config.problems()]
    problems += [f"{name}: {problem}" for name, home in folders.items() for problem in remote_tokenizer(home)]
    # The tokenizer of an adapter, if it has one, is the policy's.
    option, folder = "path", path.path
    if adapter is not None and any((adapter.path / name).is_file() for name in TOKENIZER_FILES):
        option, folder = "adapter", adapter.path
    try:
        templates = chat_templates(folder)
        if (file := options["chat_template"]) is not None:
            option, templates = "chat_template", {file.path.name: file.path.read_text(encoding="utf-8")}
        problems += _template_problems(
            templates, folder, option, options["date"], options["chat_template_kwargs"] or {}
        )
    except WinnowError as error:
        problems += [f"{option}: {problem}" for problem in error.problems]
    if adapter is None or option == "path":
        rows = config.vocabulary if adapter is None else None  # an adapter may bring more
        problems += [f"path: model folder {path}: {problem}" for problem in config.token_problems(folder, rows)]
    if adapter is None and options["save_dtype"] != "float32":
        problems.append(
            f"save_dtype: {options['save_dtype']}, and without an adapter the folder's files are copied as they are; "
            "unset it"
        )
    if adapter is None or problems:
        return problems
    if config.quantization:
        problems.append(
            f"adapter: its base has quantised weights ({config.quantization}), in which nothing can be merged; set "
            "path to the folder that they were quantised from"
        )
    rows, problem = adapted_rows(config, adapter.path)
    problems += [f"adapter: {problem}"] if problem else []
    file = adapter.path / "tokenizer.json"
    added = json_object(file).get("added_tokens", []) if file.is_file() else []
    if beyond := [token["content"] for token in added if rows is not None and token["id"] >= rows]:
        problems.append(
            f"adapter: its tokenizer has {beyond[0]!r} ({len(beyond)} such tokens), and neither base nor adapter have "
            f"an embedding of it, but {rows}: save the adapter with its embeddings (`save_embedding_layers=True`)"
        )
    if adapter.base not in (None, path.digest, policy_of_copy(path.path)):
        problems.append(
            f"adapter: it was trained from the policy {adapter.base[:12]}, and path holds {path.digest[:12]}; set path "
            "to the model folder of the step that was its run's `init` (the column `init` of `policies` has the digest)"
        )
    return problems


def _template_problems(
    templates: dict[str, str], folder: Path, option: str, day: str | None, more: dict[str, Any]
) -> list[str]:
    """Return what is wrong with the chat templates that `option` gives, and with what they are to read."""
    if damaged := unreadable(templates):
        return [f"{option}: {folder}: {problem}" for problem in damaged]
    problems = [f"chat_template_kwargs: {problem}" for problem in unread_options(templates, more)]
    asks = any(TODAY in variables(template) for template in templates.values())
    options = _template_options(folder)
    if day is not None:
        try:
            datetime.date.fromisoformat(day)
        except ValueError:
            problems.append(f"date: {day!r} is not a day as in 2026-01-31")
        if not asks:
            problems.append(
                f"date: no chat template of {folder.name} asks for today's date; unset it (a variable `date` is one "
                "of `chat_template_kwargs`)"
            )
    elif asks and "date_string" not in {**options.get("chat_template_kwargs", {}), **more} and "date" not in options:
        problems.append(
            f"date: the chat template of {folder.name} reads today's date, and would give other ids from day to "
            "day; set the day that it is to read, as in `date: 2026-01-31`"
        )
    return problems


def _template_options(folder: Path) -> dict[str, Any]:
    """Return the options for chat templates that a model of a store has, as stage `model` wrote them there."""
    file = folder / "tokenizer_config.json"
    return (json_object(file) if file.is_file() else {}).get(TEMPLATE_OPTIONS) or {}


def write_template_options(folder: Path, date: str | None, chat_template_kwargs: dict[str, Any] | None) -> None:
    """Write what the chat template reads into the tokenizer's config of a folder."""
    options = {"date": date, "chat_template_kwargs": chat_template_kwargs}
    if options := {name: value for name, value in options.items() if value}:
        file = folder / "tokenizer_config.json"
        config = json_object(file) if file.is_file() else {}
        config[TEMPLATE_OPTIONS] = _template_options(folder) | options
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_template_defaults(folder: Path) -> None:
    """Write what a model's chat templates read from Winnow into them, as defaults for transformers, vLLM and others.

    Winnow reads the folder as before. For a copy of a store's folder, whose content is its identity: the copy has
    another, and says of which policy it is.
    """
    options = _template_options(folder)
    if not options:
        return
    policy = model_digest(folder)

    def converted(template: str) -> str:
        return with_defaults(template, options.get("chat_template_kwargs") or {}, options.get("date"))

    for file in (folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")):
        if file.is_file():
            file.write_text(converted(file.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if file.is_file() and (template := (content := json_object(file)).get("chat_template")):
            if isinstance(template, str):
                template = converted(template)
            else:
                template = [item | {"template": converted(item["template"])} for item in template]
            file.write_text(json.dumps(content | {"chat_template": template}, indent=2), encoding="utf-8")
    if model_digest(folder) != policy:
        file = folder / "tokenizer_config.json"
        origin = {"policy": policy, "network": network_digest(folder)}
        file.write_text(json.dumps(json_object(file) | {COPY_OF: origin}, indent=2), encoding="utf-8")


@stage(version=4, unsharded=True, check=_check_model)
def model(
    ctx: StageContext,
    *,
    revision: Annotated[str | None, EXECUTION] = None,
    path: ModelPath,
    adapter_revision: Annotated[str | None, EXECUTION] = None,
    adapter: AdapterPath | None = None,
    save_dtype: Precision = "float32",
    date: str | None = None,
    chat_template: TemplatePath | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Model:
    """Copy a Hugging Face model into the store: config, tokenizer, safetensors. Its content is its identity.

    path: its folder, or its name on the hub (org/name), which is read from the hub's cache at `revision` (a branch, tag
    or commit) and never downloaded: `hf download org/name` does that. So is `adapter`, at `adapter_revision`. A folder
    org/name below the working folder comes first, unless the cache has that name too; `./org/name` is always a folder.

    chat_template: a Jinja file in place of the folder's own chat templates, or for a folder without one. date: the day
    that a chat template which asks for today's date reads, such as 2026-01-31. chat_template_kwargs: other
    variables that it reads, such as `{enable_thinking: false}`; refused are names that it does not read, and arguments
    of `apply_chat_template` itself. All three stay with the folder and every model trained from it, so that
    prompts, responses and draws are rendered alike on any day. Other programs read them in the copies that
    `winnow model --to` and `--push` write, as defaults of the chat template itself.

    adapter: a LoRA trained on it by peft. One from another base of the same shapes is only noticed if its config
    contains the digest of that base, as those of Winnow do. It is merged in fp32 and saved in `save_dtype`, fp32
    unless set, since bfloat16 would undo most of a small adapter: from here on the policy is both together, for
    sampling, as reference and to train. If the adapter's folder has a tokenizer, it is the policy's.
    """
    from transformers import AutoConfig

    from stages.data.tokenizer import Tokenizer
    from stages.network.load import check_weights

    folder = ctx.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = model_files(path.path)
    for n, file in enumerate(files):
        ctx.progress(n, len(files), "files")
        (folder / file.relative_to(path.path)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.relative_to(path.path))
    if model_digest(folder) != path.digest:
        raise MachineError(f"model: folder {path} changed while it was copied; run again once nothing writes there")
    policy = Model(folder, path.digest)
    if adapter is not None:
        policy = _merge_into_base(policy, adapter.path, save_dtype)
    if chat_template is not None:
        replace_chat_templates(folder, chat_template.path)
    write_template_options(folder, date, chat_template_kwargs)
    write_copy_card(folder, path, adapter)

    # Check here what would fail after hours: a config or tokenizer that does not load, ids without embedding.
    try:
        vocabulary = AutoConfig.from_pretrained(folder, **FROM_FOLDER).get_text_config().vocab_size
        reader = Tokenizer(policy)
        tokenizer, _ = reader.inner, reader.stop
        check_weights(folder)
    except WinnowError:
        raise
    except Exception as error:  # the libraries raise anything from KeyError to OSError here
        raise WinnowError(f"model: its folder cannot be used ({type(error).__name__}: {error})") from None
    if chat_template is not None:
        try:
            reader.prompt_ids("Hello!")
        except ValueError as error:  # no prompt would be left
            raise WinnowError(f"chat_template: {chat_template}: {error}") from None
    # A special token beyond is never read: texts with one are rejected. Gemma-3 has one, for images that it cannot see.
    special = tokenizer.added_tokens_decoder
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= vocabulary and not (number in special and special[number].special)
    }
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        raise WinnowError(
            f"model: its tokenizer has id {number} ({token!r}, {len(beyond)} such tokens), and its network only ids "
            f"below {vocabulary}: they are of two models; to keep both, resize the network's embeddings first"
        )
    return policy


def replace_chat_templates(folder: Path, template: Path) -> None:
    """Give a folder this chat template and no other, wherever transformers would look for one."""
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copyfile(template, folder / "chat_template.jinja")


def adapted_rows(base: ModelConfig, adapter: Path) -> tuple[int | None, str]:
    """Return the ids of a base with its adapter, None if unknown, and what is wrong with the adapter's embeddings.

    An adapter from a training that added tokens brings the resized embedding and head along, whole.
    """
    shapes = {
        name.removeprefix(PEFT_PREFIX): shape for name, shape in tensor_shapes([adapter / ADAPTER_WEIGHTS]).items()
    }
    embeddings = [name for name, shape in base.shapes.items() if shape[0] == base.vocabulary and len(shape) == 2]
    resized = {name: shapes[name][0] for name in embeddings if name in shapes and shapes[name] != base.shapes[name]}
    if not resized:
        return base.vocabulary, ""
    if len(resized) < len(embeddings) or len(set(resized.values())) > 1:
        name = next(name for name in embeddings if resized.get(name) != max(resized.values()))
        return base.vocabulary, (
            f"its vocabulary was resized to {max(resized.values())}, and it has no {name} of that size: save it with "
            "both embedding and head (`modules_to_save`), or resize the base to it and set path to that"
        )
    return max(resized.values()), ""


def _merge_into_base(base: Model, adapter: Path, dtype: Precision) -> Model:
    """Merge the adapter in the base's own folder, and take its tokenizer if it has one."""
    from stages.network.load import load_network, save_network
    from stages.network.lora import merge_adapter, merge_layers

    network = load_network(base, adapt=merge_layers)
    rows, _ = adapted_rows(ModelConfig(base.folder), adapter)
    try:
        if rows not in (None, ModelConfig(base.folder).vocabulary):
            network.resize_token_embeddings(rows, mean_resizing=False)  # all of which the adapter replaces
        merge_adapter(network, adapter)
    except WinnowError:
        raise
    except Exception as error:  # peft and torch raise anything from TypeError to RuntimeError here
        lines = str(error).splitlines() or [""]  # torch writes one for every weight
        raise WinnowError(f"adapter: it does not fit its base ({type(error).__name__}: {lines[0]})") from None
    merged = save_network(network, base, base.folder, dtype=dtype)

    # All files of one tokenizer: a chat template of one with the vocabulary of the other would belong to neither.
    if any((adapter / name).is_file() for name in TOKENIZER_FILES):
        base_files, adapter_files = (
            [file for file in model_files(folder) if ".safetensors" not in file.name and file.name not in CONFIGS]
            for folder in (merged.folder, adapter)
        )
        for file in base_files:
            file.unlink()
        for file in adapter_files:
            (merged.folder / file.relative_to(adapter)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, merged.folder / file.relative_to(adapter))
    return merged


@stage(version=3, unsharded=True, check=lambda options, inputs: input_problems(inputs, "policy", "vocabulary"))
def reward_head(policy: Model, ctx: StageContext) -> Model:
    """Turn a policy into a reward model to train: its weights, with one score (0 at first) in place of the vocabulary.

    The result is an `AutoModelForSequenceClassification` folder with one label; the score is that of a response's last
    token. It has a pad token other than EOS, so that transformers' own forward reads the same score from a batch. Its
    config.json says that it is scored at the end of the last turn, and not behind it (see the ranker `pointwise`).
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from stages.network.load import check_head, is_reward_model, load_network, save_network
    from stages.network.lora import merge_layers

    if is_reward_model(policy):
        raise WinnowError("reward_head: this model ends in a score already; remove the step")
    config = AutoConfig.from_pretrained(policy.folder, num_labels=1, **FROM_FOLDER)
    # The policy's weights as they are stored; the score is of zeros, which every dtype has.
    on_grid = config.dtype is torch.bfloat16 and not (policy.folder / ADAPTER).exists()
    dtype: Precision = "bfloat16" if on_grid else "float32"
    try:
        with torch.device("meta"):  # the policy's own layers take its place: one network in memory
            network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError:
        raise WinnowError(f"reward_head: transformers has no sequence classifier of type {config.model_type}") from None
    check_head(network)
    network.score.to_empty(device="cpu").requires_grad_(True)
    for weight in network.score.parameters():
        torch.nn.init.zeros_(weight)
    setattr(network, network.base_model_prefix, load_network(policy, adapt=merge_layers).base_model.cpu())
    model = save_network(network, policy, ctx.folder / "model", dtype=dtype)
    write_card(
        model.folder,
        "\n# Reward model to train\n\nA policy with a score of zeros, by Winnow.\n",
        carried(policy.folder),
    )
    return model


@stage(
    version=1,
    unsharded=True,
    check=lambda options, inputs: (
        [f"hidden {options['hidden']} is not a multiple of heads {options['heads']}"]
        if options["hidden"] % options["heads"]
        else []
    ),
)
def untrained(
    ctx: StageContext,
    *,
    corpus: DataPath,
    columns: list[str],
    vocabulary: Count = 512,
    marks: list[str] = [],  # noqa: B006 - read, never written
    hidden: Count = 128,
    layers: Count = 4,
    heads: Count = 4,
    context: Count = 256,
    seed: Seed = 0,
) -> Model:
    """Make a small Llama with random weights and a byte-level BPE tokenizer trained on columns of `corpus`.

    `marks` are texts that become one token each, such as the ranker's `[RESPONSE A]`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    texts = [str(row[name]) for _, row in DataSource(corpus).rows(ctx, columns) for name in columns]
    if not texts:
        raise WinnowError(f"untrained: {corpus} has no text in {', '.join(columns)}")
    folder = ctx.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)

    # Bytes as alphabet, so that every text has ids; frequent words become one token.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL_TOKENS.values(), *ROLE_TOKENS, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=context, **SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=int(bpe.get_vocab_size()),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # Llama's 0.02 is for thousands of dimensions: a small net would not learn
    )
    disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
    network.save_pretrained(folder)
    let_others_read(folder)

    # The config's ids above must be the tokenizer's: special tokens are trained first, in this order.
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    first = [token["content"] for token in sorted(added, key=lambda token: token["id"])[: len(SPECIAL_TOKENS)]]
    if first != list(SPECIAL_TOKENS.values()):
        raise WinnowError(f"untrained: the first special tokens are {first}, not {list(SPECIAL_TOKENS.values())}")
    return Model(folder, "")

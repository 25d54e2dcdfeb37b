"""Where a policy comes from: a folder that the user has, or, for demos and trials, fresh random weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pipeline import AdapterPath, DataPath, InputStep, ModelPath, Range, StageContext, stage
from pipeline.store.fingerprints import ADAPTER, TOKENIZER_FILES, model_files
from schemas import Model, WinnowError
from stages.data.files import Source

CONFIGS = ("config.json", "generation_config.json", ADAPTER)
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
TURNS = ("<|user|>", "<|assistant|>")
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Positive = Annotated[int, Range(gt=0)]


def its_own_base(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """Plan-time check: an adapter that was trained here belongs to one policy alone, and its config says to which."""
    path, adapter = options["path"], options["adapter"]
    if adapter is None or adapter.base in (None, path.digest):
        return []
    return [
        f"adapter: it was trained from the policy {adapter.base[:12]}, and path holds {path.digest[:12]}; set path to "
        "the model folder of the step that was its run's `init` (the column `init` of `policies` has the digest)"
    ]


@stage(version=1, unsharded=True, check=its_own_base)
def model(ctx: StageContext, *, path: ModelPath, adapter: AdapterPath | None = None) -> Model:
    """Take a Hugging Face folder into the store: config, tokenizer, safetensors. Its content is its identity.

    adapter: a LoRA trained on it, by peft; one from another base of the same shapes is only known if its config has the
    digest of its own, as ours have. It is merged in fp32 and kept in the folder's dtype: from here on the
    policy is both together, for sampling, as reference and to train. Its tokenizer, if it has one, is the policy's.
    """
    folder = ctx.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = model_files(path.path)
    for n, file in enumerate(files):
        ctx.progress(n, len(files), "files")
        shutil.copyfile(file, folder / file.name)
    base = Model(folder, path.digest)
    return _usable(base if adapter is None else _merged(base, adapter.path))


def _merged(base: Model, adapter: Path) -> Model:
    """In the base's own folder."""
    from stages.network.load import load_network, save_network
    from stages.network.lora import merge_adapter

    network = load_network(base)
    try:
        merge_adapter(network, adapter)
    except WinnowError:
        raise
    except Exception as error:  # peft and torch raise anything from TypeError to RuntimeError here
        lines = str(error).splitlines() or [""]  # of which torch has one for every weight
        raise WinnowError(f"adapter: it does not fit its base ({type(error).__name__}: {lines[0]})") from None
    made = save_network(network, base, base.folder)
    if any((adapter / name).is_file() for name in TOKENIZER_FILES):
        _take_tokenizer(adapter, made.folder)
    return made


def _take_tokenizer(source: Path, folder: Path) -> None:
    """All of it: a chat template of the one beside the vocabulary of the other would be neither's."""
    for file in _tokenizer_files(folder):
        file.unlink()
    for file in _tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    """What is neither weights nor a config."""
    return [file for file in model_files(folder) if ".safetensors" not in file.name and file.name not in CONFIGS]


def _usable(model: Model) -> Model:
    """Refuse now what would fail after hours: a tokenizer or config that does not load, ids without embedding."""
    from transformers import AutoConfig

    from stages.data.tokenizer import Tokenizer

    try:
        vocabulary = AutoConfig.from_pretrained(model.folder, local_files_only=True).vocab_size
        known = len(Tokenizer(model).inner)
    except WinnowError:
        raise
    except Exception as error:  # the libraries raise anything from KeyError to OSError here
        raise WinnowError(f"model: its folder cannot be used ({type(error).__name__}: {error})") from None
    if known > vocabulary:
        raise WinnowError(f"model: its tokenizer has {known} ids, and its network only {vocabulary}")
    return model


@stage(version=1, unsharded=True)
def reward_head(policy: Model, ctx: StageContext) -> Model:
    """The policy as a reward model to train: its own weights, and in the vocabulary's place one score, 0 at first.

    An `AutoModelForSequenceClassification` folder with one label, its score read at a response's last token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from stages.network.load import check_head, is_reward_model, load_network, save_network

    if is_reward_model(policy):
        raise WinnowError("reward_head: this model ends in a score already; leave the step out")
    config = AutoConfig.from_pretrained(policy.folder, num_labels=1, local_files_only=True)
    try:
        with torch.device("meta"):  # the policy's own layers take its place: one network in memory
            network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError:
        raise WinnowError(f"reward_head: transformers has no sequence classifier of type {config.model_type}") from None
    check_head(network)
    network.score.to_empty(device="cpu").requires_grad_(True)
    for weight in network.score.parameters():
        torch.nn.init.zeros_(weight)
    setattr(network, network.base_model_prefix, load_network(policy).base_model.cpu())
    return save_network(network, policy, ctx.folder / "model")


def _heads_divide(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    if options["hidden"] % options["heads"]:
        return [f"hidden {options['hidden']} is not a multiple of heads {options['heads']}"]
    return []


@stage(version=1, unsharded=True, check=_heads_divide)
def untrained(
    ctx: StageContext,
    *,
    corpus: DataPath,
    columns: list[str],
    vocabulary: Positive = 512,
    marks: list[str] = [],  # noqa: B006 - read, never written
    hidden: Positive = 128,
    layers: Positive = 4,
    heads: Positive = 4,
    context: Positive = 256,
    seed: int = 0,
) -> Model:
    """A small Llama with random weights and a byte-level BPE tokenizer trained on columns of `corpus`.

    `marks` are texts that become one token each, such as the ranker's `[RESPONSE A]`.
    """
    texts = [str(row[name]) for _, row in Source(corpus).rows(ctx, columns) for name in columns]
    if not texts:
        raise WinnowError(f"untrained: {corpus} holds no text in {', '.join(columns)}")
    folder = ctx.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    size = _save_tokenizer(folder, texts, vocabulary, marks, context)
    _save_llama(folder, size, hidden, layers, heads, context, seed)
    return Model(folder, "")


def _save_tokenizer(folder: Path, texts: list[str], vocabulary: int, marks: list[str], context: int) -> int:
    """Byte-level BPE: every text has ids, and frequent words are one token. Returns the number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL.values(), *TURNS, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=context, **SPECIAL)
    outer.chat_template = CHAT
    outer.save_pretrained(folder)
    return int(inner.get_vocab_size())


def _save_llama(folder: Path, size: int, hidden: int, layers: int, heads: int, context: int, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=size,
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
    network.save_pretrained(folder)
    _check_special(folder)


def _check_special(folder: Path) -> None:
    """The config's ids above are the tokenizer's: special tokens are trained first, in this order."""
    saved = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    found = [token["content"] for token in sorted(saved, key=lambda token: token["id"])[:3]]
    if found != list(SPECIAL.values()):
        raise WinnowError(f"untrained: special tokens came out as {found}")

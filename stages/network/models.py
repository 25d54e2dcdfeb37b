"""Stages that provide a model: a folder of the user, a reward model to train, or, for demos, random weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import AdapterPath, DataPath, InputStep, ModelPath, StageContext, stage
from pipeline.store.fingerprints import ADAPTER, TOKENIZER_FILES, model_files
from schemas import Model, WinnowError
from stages.data.files import DataSource
from stages.options import Count, Seed

CONFIGS = ("config.json", "generation_config.json", ADAPTER)
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
ROLE_TOKENS = ("<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _check_adapter_base(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Compare the base in an adapter's config with `path`: an adapter trained here belongs to one policy only."""
    path, adapter = options["path"], options["adapter"]
    if adapter is None or adapter.base in (None, path.digest):
        return []
    return [
        f"adapter: it was trained from the policy {adapter.base[:12]}, and path holds {path.digest[:12]}; set path to "
        "the model folder of the step that was its run's `init` (the column `init` of `policies` has the digest)"
    ]


@stage(version=1, unsharded=True, check=_check_adapter_base)
def model(ctx: StageContext, *, path: ModelPath, adapter: AdapterPath | None = None) -> Model:
    """Copy a Hugging Face folder into the store: config, tokenizer, safetensors. Its content is its identity.

    adapter: a LoRA trained on it by peft. One from another base of the same shapes is only noticed if its config
    contains the digest of that base, as those of Winnow do. It is merged in fp32 and saved in the folder's dtype: from
    here on the policy is both together, for sampling, as reference and to train. If the adapter's folder has a
    tokenizer, it is the policy's.
    """
    from transformers import AutoConfig

    from stages.data.tokenizer import Tokenizer

    folder = ctx.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = model_files(path.path)
    for n, file in enumerate(files):
        ctx.progress(n, len(files), "files")
        shutil.copyfile(file, folder / file.name)
    policy = Model(folder, path.digest)
    if adapter is not None:
        policy = _merge_into_base(policy, adapter.path)

    # Check here what would fail after hours: a config or tokenizer that does not load, ids without embedding.
    try:
        vocabulary = AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
        ids = len(Tokenizer(policy).inner)
    except WinnowError:
        raise
    except Exception as error:  # the libraries raise anything from KeyError to OSError here
        raise WinnowError(f"model: its folder cannot be used ({type(error).__name__}: {error})") from None
    if ids > vocabulary:
        raise WinnowError(f"model: its tokenizer has {ids} ids, but its network only {vocabulary}")
    return policy


def _merge_into_base(base: Model, adapter: Path) -> Model:
    """Merge the adapter in the base's own folder, and take its tokenizer if it has one."""
    from stages.network.load import load_network, save_network
    from stages.network.lora import merge_adapter

    network = load_network(base)
    try:
        merge_adapter(network, adapter)
    except WinnowError:
        raise
    except Exception as error:  # peft and torch raise anything from TypeError to RuntimeError here
        lines = str(error).splitlines() or [""]  # torch writes one for every weight
        raise WinnowError(f"adapter: it does not fit its base ({type(error).__name__}: {lines[0]})") from None
    merged = save_network(network, base, base.folder)

    # All files of one tokenizer: a chat template of one with the vocabulary of the other would belong to neither.
    if any((adapter / name).is_file() for name in TOKENIZER_FILES):
        base_files, adapter_files = (
            [file for file in model_files(folder) if ".safetensors" not in file.name and file.name not in CONFIGS]
            for folder in (merged.folder, adapter)
        )
        for file in base_files:
            file.unlink()
        for file in adapter_files:
            shutil.copyfile(file, merged.folder / file.name)
    return merged


@stage(version=1, unsharded=True)
def reward_head(policy: Model, ctx: StageContext) -> Model:
    """Turn a policy into a reward model to train: its weights, with one score (0 at first) in place of the vocabulary.

    The result is an `AutoModelForSequenceClassification` folder with one label; the score is that of a response's last
    token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from stages.network.load import check_head, is_reward_model, load_network, save_network

    if is_reward_model(policy):
        raise WinnowError("reward_head: this model ends in a score already; remove the step")
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


def _check_heads(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    hidden, heads = options["hidden"], options["heads"]
    return [f"hidden {hidden} is not a multiple of heads {heads}"] if hidden % heads else []


@stage(version=1, unsharded=True, check=_check_heads)
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

    # The config's ids above must be the tokenizer's: special tokens are trained first, in this order.
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    first = [token["content"] for token in sorted(added, key=lambda token: token["id"])[: len(SPECIAL_TOKENS)]]
    if first != list(SPECIAL_TOKENS.values()):
        raise WinnowError(f"untrained: the first special tokens are {first}, not {list(SPECIAL_TOKENS.values())}")
    return Model(folder, "")

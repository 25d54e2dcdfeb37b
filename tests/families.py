"""Small random models of several families in folders that every stage can read: sharp enough that a mistake shows."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tokenizers import AddedToken

from pipeline.store.fingerprints import model_digest
from schemas import Model
from stages.data.tokenizer import Tokenizer

SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    tie_word_embeddings=False,
)
HEADS = SIZES | dict(head_dim=32)
TIED = HEADS | dict(tie_word_embeddings=True)  # all that vLLM knows of Gemma
FAMILIES = {
    "llama": lambda **of: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | of)),
    "mistral": lambda **of: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES | of)),
    "qwen2": lambda **of: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | of)),
    "qwen3": lambda **of: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**HEADS | of)),
    "gemma2": lambda **of: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TIED | of)),
    "gemma3": lambda **of: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TIED | of)),
    "phi3": lambda **of: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES | of)),
    "olmo2": lambda **of: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES | of)),
    "gpt2": lambda **of: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=128, n_layer=4, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1, pad_token_id=2, **of
        )
    ),
}


def write_family(name: str, tokenizer: Model, folder: Path, *, seed: int = 1, **changes) -> Model:
    """Write a model of a family with random weights and the tokenizer of another; `changes` are to its config."""
    shutil.copytree(tokenizer.folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(seed)
    vocabulary = len(Tokenizer(tokenizer).inner)
    network = FAMILIES[name](**{"vocab_size": vocabulary} | changes)
    # Gemma scales its embedding by the root of the width: a larger one would repeat one token, with certainty.
    width = 0.12 if name in ("gemma2", "gemma3") else 0.3
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 1:
                weight.add_(0.05 * torch.randn_like(weight))
            else:
                weight.normal_(0, width if len(weight) == vocabulary else 0.09)
    network.save_pretrained(folder)
    return Model(folder, model_digest(folder))


# As people have them: a policy, a reward model and a judge with a real chat template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONTROL_TOKENS = re.compile(r"<[|｜][\w▁:/ ]+[|｜]>|</?(?:start|end)_of_(?:turn|utterance)>|<turn\|>|<\|turn>")
# By shape: the template of TRL's package, its end of turn, the config, the language model, the reward model.
CHAT_SHAPES: dict[str, tuple[str, str, Any, Any, Any]] = {
    "qwen2": (
        "qwen2_5", "<|im_end|>",
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM, transformers.Qwen2ForSequenceClassification,
    ),
    "llama": (
        "llama3_1", "<|eot_id|>",
        transformers.LlamaConfig, transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification,
    ),
    "gemma": (
        "gemma3", "<end_of_turn>",
        transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, transformers.Gemma3TextForSequenceClassification,
    ),
    "qwen3": (
        "qwen3", "<|im_end|>",
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM, transformers.Qwen3ForSequenceClassification,
    ),
}  # fmt: skip


def write_chat_model(shape: str, tokenizer: Model, folder: Path, *, score: bool = False) -> Model:
    """Write a small random chat model of this shape, or with `score` a reward model, as `save_pretrained` does."""
    name, end, config_class, policy_class, scorer_class = CHAT_SHAPES[shape]
    template = (TEMPLATES / f"{name}.jinja").read_text()
    inner = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    marks = sorted({end, *CONTROL_TOKENS.findall(template)})
    inner.add_tokens([AddedToken(mark, special=True) for mark in marks])
    inner.chat_template, inner.eos_token = template, end
    inner.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    sizes |= dict(num_key_value_heads=1, max_position_embeddings=2048, vocab_size=len(inner))
    sizes |= {f"{token}_token_id": getattr(inner, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    torch.manual_seed(2 if score else 1)
    network = scorer_class(config_class(**sizes, num_labels=1)) if score else policy_class(config_class(**sizes))
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    network.save_pretrained(folder)
    return Model(folder, model_digest(folder))

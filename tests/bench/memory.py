"""Measure the memory of training and scoring, each in a process of its own, beside what a plan says of it.

    python -m tests.bench.memory               # all cases, a table in Markdown; half an hour on one core
    python -m tests.bench.memory 30M 135M      # those of two sizes

Measured is the largest resident set of a fresh process, less that after its imports, on glibc's heap as it is.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

SIZES = {  # shapes of networks with real vocabularies: family and config
    "30M": ("llama", dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
                          num_key_value_heads=6, vocab_size=32_000)),
    "135M": ("llama", dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                           num_key_value_heads=3, vocab_size=49_152)),
    "315M": ("qwen2", dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=12, num_attention_heads=14,
                           num_key_value_heads=2, vocab_size=151_936)),
}  # fmt: skip
PROMPT, RESPONSE, RESPONSES = 64, 32, 6  # tokens of a group's prompt and responses: 256, and 5 pairs
GROUP = PROMPT + RESPONSE * RESPONSES
TRAININGS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA of rank 16": {"lora_r": 16},
}


@dataclass(frozen=True)
class Case:
    """One measurement: `tokens` of a pass; options of `optimize`, or None for scoring."""

    size: str
    name: str
    tokens: int
    options: dict[str, Any] | None = field(default_factory=dict)


CASES = [
    *(Case("135M", name, 512, options) for name, options in TRAININGS.items()),
    *(Case("30M", name, 1024, options) for name, options in TRAININGS.items()),
    Case("30M", "scoring", 4096, None),
    Case("135M", "scoring", 2048, None),
    *(Case("315M", name, 256, options) for name, options in TRAININGS.items()),
    Case("315M", "scoring", 1024, None),
]


def write_network(size: str, folder: Path) -> Path:
    """Write a network of random weights, once."""
    from tests.families import FAMILIES

    family, changes = SIZES[size]
    if not (folder / size).exists():
        import torch

        torch.manual_seed(0)
        FAMILIES[family](**changes | {"tie_word_embeddings": True}).save_pretrained(folder / size)
        (folder / size / "tokenizer.json").write_text("{}")  # a folder of a model has one; nothing here reads it
    return folder / size


def estimate(case: Case, network: Path) -> float:
    """Return what a plan says that the case takes, in bytes."""
    from pipeline import InputStep, ModelPath
    from pipeline.costs import Device
    from stages.network.memory import scoring_need
    from stages.training.memory import training_need

    model = InputStep("model", {"path": ModelPath(str(network))})
    if case.options is None:
        need = scoring_need(model, "float32", Device(), case.tokens)
    else:
        defaults = dict(world_size=1, lora_r=0, dtype="float32", gradient_checkpointing=False)
        need = training_need(defaults | {"tokens_per_pass": case.tokens} | case.options, {"init": model}, Device())
    assert need is not None
    return need.total


def measure(case: Case, network: Path) -> float:
    """Return the peak of a fresh process in bytes, less that of its imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    call = json.dumps([str(network), case.tokens, case.options, SIZES[case.size][1]["vocab_size"]])
    code = f"from tests.bench.memory import run_here; run_here({call!r})"
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(output.stdout.split()[-1])


def run_here(call: str) -> None:
    """Train or score on random ids, two passes a step and two steps, and print the growth of this process's peak."""
    network, tokens, options, vocabulary = json.loads(call)
    from schemas import Model
    from stages.network import lora  # noqa: F401 - imports belong to the baseline
    from stages.network.forward import forward_rows, logp_of
    from stages.network.load import load_network
    from stages.training import trainer  # noqa: F401
    from tests.material import response, run_optimize

    def resident(name: str) -> int:
        # Not ru_maxrss: that of a process begins with its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(5, vocabulary, length).tolist()

    groups_per_pass = tokens // GROUP
    pairs = [{"chosen": 0, "rejected": n, "weight": 1.0, "label": 1.0} for n in range(1, RESPONSES)]
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": f"p{n:04}",
            "prompt_ids": ids(PROMPT),
            "responses": [response(f"c{n}-{m}", ids(RESPONSE)) for m in range(RESPONSES)],
            "pairs": pairs,
            "ref_model": None,
            "ref_dtype": None,
        }
        for n in range(groups_per_pass * (2 if options is None else 4))
    ]
    model, before = Model(Path(network), "d" * 64), resident("VmRSS")
    if options is None:
        texts = [(row["prompt_ids"], answer["token_ids"]) for row in rows for answer in row["responses"]]
        forward_rows(logp_of, load_network(model), texts, "float32", tokens)
    else:
        batch = 2 * groups_per_pass * len(pairs)
        folder = Path(mkdtemp(prefix="winnow-memory-"))
        run_optimize(model, rows, folder, objective="simpo", batch_size=batch, tokens_per_pass=tokens, **options)
    print(resident("VmHWM") - before)


def main(sizes: list[str]) -> None:
    """Print the table, a row as soon as it is measured."""
    folder = Path(mkdtemp(prefix="winnow-memory-"))
    print("| network | what | tokens | plan | measured | off |\n| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        if sizes and case.size not in sizes:
            continue
        network = write_network(case.size, folder)
        planned, measured = estimate(case, network), measure(case, network)
        cells = [case.size, case.name, f"{case.tokens:,}", f"{planned / 1e9:.2f}", f"{measured / 1e9:.2f}"]
        print("|", " | ".join([*cells, f"{planned / measured - 1:+.0%}"]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

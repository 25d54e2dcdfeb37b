"""Margin that a short run leaves in a policy that is rounded to bfloat16, by rule of rounding and learning rate."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound
from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowWarning
from schemas.tables import EXAMPLES
from stages.network.forward import forward_rows, logp_of
from stages.network.load import load_network, round_weights
from stages.network.lora import merge_layers
from stages.training.objectives import objective
from stages.training.optimize import optimize

VOCABULARY, PROMPT, RESPONSE, PAIRS = 2048, 16, 32, 32
RUNS = [(0, rate, steps) for rate in (5e-7, 1e-6, 5e-6) for steps in (6, 112)] + [(16, 1e-4, 112)]
Row = tuple[list[int], list[int]]


def measure(log: Callable[[str], None]) -> pa.Table:
    """Train a random Llama of bfloat16 by each rate and number of steps, and round what was trained by each rule.

    `margin` is that of 64 pairs that were not trained on, in nats over where training started; `*_noise` the standard
    deviation of a response's log-prob between the policy that was trained and the one that was rounded.
    """
    warnings.simplefilter("ignore", WinnowWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init = make_model(folder / "init")
        rows, heldout = make_examples(init, 112 * PAIRS + 64)
        start = logp(load_network(init), heldout)
        results = []
        for rank, rate, steps in RUNS:
            ctx = StageContext(folder / f"{rank} {rate} {steps}", WarmCache(), lambda *progress: None)
            examples = pa.Table.from_pylist(rows[: steps * PAIRS], schema=EXAMPLES)
            dpo = Bound(objective.entries["sigmoid_norm"], {"beta": 0.1, "smoothing": 0.0})
            options: Any = dict(objective=dpo, learning_rate=rate, batch_size=PAIRS, lora_r=rank)
            model, _, metrics, _ = optimize(init, examples, ctx, **options)
            trained = logp(load_network(model), heldout)
            result = {"lora_r": rank, "learning_rate": rate, "steps": steps, "margin": margin(trained - start)}
            kept = {row["metric"]: row["value"] for row in metrics.to_pylist()}  # of the last batch, against memory
            result["saved"] = kept["saved/margin_kept"]
            for rule in ("nearest", "stochastic", "carried"):
                network = load_network(model)
                merge_layers(network)
                carry_errors(network) if rule == "carried" else round_weights(network, rule)  # type: ignore[arg-type]
                rounded = logp(network, heldout)
                result[rule] = margin(rounded - start) / result["margin"]
                result[f"{rule}_noise"] = float((rounded - trained).std())
            result["adapter_nearest"] = float("nan")  # of an adapter beside its base's weights, which are on the grid
            if rank:
                network = load_network(model)
                round_weights(network, "nearest")
                result["adapter_nearest"] = margin(logp(network, heldout) - start) / result["margin"]
            log(", ".join(f"{key} {value:.4g}" for key, value in result.items()))
            results.append(result)
    return pa.Table.from_pylist(results)


def make_model(folder: Path) -> Model:
    """Save a random Llama of 3.7 million weights of the size that those of large models have, 0.02, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return Model(folder, model_digest(folder))


def make_examples(init: Model, pairs: int) -> tuple[list[dict[str, Any]], list[Row]]:
    """Return rows of `examples` that prefer tokens of the lower half of the vocabulary, and 64 more pairs as rows."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(pairs):
        tokens = [rng.integers(1, high, size) for high, size in
                  ((VOCABULARY, PROMPT), (VOCABULARY // 2, RESPONSE), (VOCABULARY, RESPONSE))]  # fmt: skip
        prompt, *responses = [ids.tolist() for ids in tokens]
        answers = [{"candidate_id": f"c{n}-{k}", "token_ids": ids, "weight": 0.0} for k, ids in enumerate(responses)]
        pair = {"chosen": 0, "rejected": 1, "weight": 1.0, "label": 1.0}
        rows.append({"prompt_id": f"p{n:04}", "prompt_ids": prompt, "responses": answers, "pairs": [pair]})
    flat = [(row["prompt_ids"], answer["token_ids"]) for row in rows for answer in row["responses"]]
    reference = iter(logp(load_network(init), flat).tolist())
    for row in rows:
        row |= {"ref_model": init.digest, "ref_dtype": "float32"}
        for answer in row["responses"]:
            answer["ref_logp"] = next(reference)
    return rows[:-64], flat[-128:]


def logp(network: PreTrainedModel, rows: list[Row]) -> np.ndarray:
    return forward_rows(logp_of, network, rows, "float32", 8192)


def margin(logp: np.ndarray) -> float:
    """Return the mean of chosen minus rejected, which alternate."""
    return float((logp[::2] - logp[1::2]).mean())


@torch.no_grad()
def carry_errors(network: PreTrainedModel) -> None:
    """Round to bfloat16 with the error of each weight added to the next of its row: the sum of a row is kept."""
    for weight in network.parameters():
        rows = weight.reshape(-1, weight.shape[-1])
        error = torch.zeros(len(rows))
        for column in range(rows.shape[1]):
            exact = rows[:, column] + error
            rows[:, column] = exact.bfloat16()
            error = exact - rows[:, column]

"""Data of both sides: a random Llama, and groups of random tokens of one shape, with a cached reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError
from schemas.tables import EXAMPLES

MIN_PAIRS = 16  # per step
MIN_GROUPS = 4  # per step


@dataclass(frozen=True)
class Shape:
    """Tokens of a prompt and of each of its responses, how many of those there are, and their pairs."""

    prompt: int
    response: int
    responses: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response}/{self.responses}/{self.pairs}"

    @property
    def group_tokens(self) -> int:
        """Return the tokens of a group, the prompt once."""
        return self.prompt + self.responses * self.response

    @property
    def pair_tokens(self) -> int:
        """Return the tokens of a pair, the prompt once per side."""
        return 2 * (self.prompt + self.response)

    @property
    def groups(self) -> int:
        """Return the groups of a step."""
        return max(MIN_GROUPS, -(-MIN_PAIRS // self.pairs))

    @property
    def matches(self) -> str:
        """Return the name of the ranking that compares a group's responses in so many pairs."""
        return {1: "one pair", self.responses // 2: "first round"}.get(self.pairs, "tournament")


def parse_shape(text: str) -> Shape:
    """Parse `prompt/response/responses/pairs`; raises WinnowError."""
    try:
        shape = Shape(*map(int, text.split("/")))
    except (TypeError, ValueError):
        raise WinnowError(f"--shapes: {text!r} is not prompt/response/responses/pairs, such as 512/64/8/7") from None
    if min(shape.prompt, shape.response, shape.pairs) < 1 or not shape.pairs < shape.responses:
        raise WinnowError(f"--shapes: {text!r}: K responses make 1 to K - 1 matches, of at least one token each")
    return shape


@dataclass(frozen=True)
class BenchData:
    """Folder with one model and, for every shape and dtype, a table of examples."""

    folder: Path
    vocabulary: int
    hidden: int = 384
    layers: int = 6
    context: int = 2048

    @property
    def init(self) -> Model:
        return Model(self.folder / "model", model_digest(self.folder / "model"))

    def examples(self, shape: Shape, dtype: str, groups: int) -> pa.Table:
        return pq.read_table(self._file(shape, dtype), schema=EXAMPLES).slice(0, groups)

    def _file(self, shape: Shape, dtype: str) -> Path:
        return self.folder / f"{shape}".replace("/", "-") / f"{dtype}.parquet"

    def make_model(self) -> None:
        """Save a random Llama with tied embeddings: at a vocabulary of 8192, 3.1 of 13.8 million weights."""
        from transformers import LlamaConfig, LlamaForCausalLM, set_seed
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        set_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            initializer_range=self.hidden**-0.5,
        )
        LlamaForCausalLM(config).save_pretrained(self.folder / "model")

    def make_examples(self, shape: Shape, dtype: str, groups: int) -> None:
        """Write groups of random tokens and winners, with log-probs by the model itself, as `reference` caches them."""
        from stages.limits import SCORING_TOKENS_PER_PASS
        from stages.network.forward import forward_rows, logp_of
        from stages.network.load import load_network

        rng = np.random.default_rng(0)
        rows: list[dict[str, Any]] = []
        for n in range(groups):
            prompt = rng.integers(1, self.vocabulary, shape.prompt).tolist()
            responses = [
                {
                    "candidate_id": f"c{n}-{k}",
                    "token_ids": rng.integers(1, self.vocabulary, shape.response).tolist(),
                    "weight": 0.0,
                }
                for k in range(shape.responses)
            ]
            pairs = [
                {"chosen": chosen, "rejected": rejected, "weight": 1.0, "label": 1.0}
                for (chosen, rejected), _ in zip(matches(shape.responses, rng), range(shape.pairs), strict=False)
            ]
            rows.append({"prompt_id": f"p{n:04}", "prompt_ids": prompt, "responses": responses, "pairs": pairs})
        inputs = [(row["prompt_ids"], response["token_ids"]) for row in rows for response in row["responses"]]
        network = load_network(self.init, train=True)
        logp = iter(forward_rows(logp_of, network, inputs, dtype, SCORING_TOKENS_PER_PASS).tolist())
        for row in rows:
            row |= {"ref_model": self.init.digest, "ref_dtype": dtype}
            for response in row["responses"]:
                response["ref_logp"] = next(logp)
        self._file(shape, dtype).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), self._file(shape, dtype))


def matches(players: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield (winner, loser) of a knock-out tournament, round after round."""
    remaining = list(range(players))
    while len(remaining) > 1:
        neighbours = zip(remaining[::2], remaining[1::2], strict=False)
        rounds = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in neighbours]
        yield from rounds
        remaining = [winner for winner, _ in rounds] + remaining[2 * len(rounds) :]


def one_pair_per_group(examples: pa.Table) -> pa.Table:
    """Return the same pairs, each as a separate group."""
    rows = [
        row
        | {
            "prompt_id": f"{row['prompt_id']}-{n}",
            "responses": [row["responses"][pair["chosen"]], row["responses"][pair["rejected"]]],
            "pairs": [pair | {"chosen": 0, "rejected": 1}],
        }
        for row in examples.to_pylist()
        for n, pair in enumerate(row["pairs"])
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)

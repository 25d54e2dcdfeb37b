"""Reward model on a server: vLLM's `/classify`, which takes token ids and returns the score before any activation."""

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from pydantic import BaseModel

from schemas import Model, WinnowError
from stages.endpoint import Endpoint, EndpointClient
from stages.options import Precision
from stages.ranking.base import PROMPTS_OF_ENGINE
from stages.ranking.pointwise import IdRow, PointwiseRanker, RewardModelReader

TRIALS = 4  # rows whose scores are compared with the folder's own network
# What a score may differ by, in its own unit: absolute, and as a share of it. Other weights differ by units.
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (0.2, 0.03)}


class _Class(BaseModel):
    probs: list[float]


class _Classes(BaseModel):
    data: list[_Class]


class ServedRewardModel(PointwiseRanker):
    """Reward model that reads the same ids as `PointwiseRanker`, in a server's memory.

    It is asked about many prompts at once, so that the server mostly has as many requests as `concurrency`.
    """

    prompts_at_once = PROMPTS_OF_ENGINE

    def __init__(self, model: Model, dtype: Precision, endpoint: Endpoint, verify: bool) -> None:
        RewardModelReader.__init__(self, model)
        self.folder, self.dtype, self.endpoint, self.verify = model.folder, dtype, endpoint, verify
        self.address = endpoint.url.removesuffix("/v1") + "/classify"  # vLLM's own, beside OpenAI's
        self.client = EndpointClient(endpoint)
        self.lock = Lock()  # guards what follows
        self.interruptions = -1  # of the client at the last check; never checked

    def close(self) -> None:
        self.client.close()

    def _scores(self, texts: Sequence[IdRow]) -> np.ndarray:
        """Return one score per row, float64 [N]; raise WinnowError if the server has another model."""
        longest = max((len(prompt) + len(response) for prompt, response in texts), default=0)
        limit = self.client.max_model_len
        if limit is not None and longest > limit:
            raise WinnowError(
                f"{self.endpoint}: a prompt and a response have {longest:,} tokens, and the server has room for "
                f"{limit:,}; start it with `--max-model-len {self.context}`"
            )
        if not texts:
            return np.empty(0)
        self._check_server(texts)
        scores = self._ask(texts)
        self._check_server(texts)  # a server that was lost may have come back as another
        return np.array(scores, dtype=np.float64)

    def _ask(self, rows: Sequence[IdRow]) -> list[float]:
        def body(row: IdRow) -> dict[str, Any]:
            ids = [*row[0], *row[1]]
            return {"model": self.endpoint.model, "input": ids, "use_activation": False, "add_special_tokens": False}

        def read(n: int, answer: Any) -> float:
            parsed = self.client.parse(_Classes, answer)
            if len(parsed.data) != 1:
                raise WinnowError(
                    f"{self.endpoint}: {len(parsed.data)} scores for one response; serve {self.endpoint.model} by "
                    "vLLM, whose `/classify` gives one"
                )
            if len(parsed.data[0].probs) != 1:
                raise WinnowError(
                    f"{self.endpoint}: {self.endpoint.model} has {len(parsed.data[0].probs)} classes; serve a reward "
                    "model, which has one label"
                )
            return parsed.data[0].probs[0]

        return self.client.post_all(self.address, [partial(body, row) for row in rows], read)

    def _check_server(self, rows: Sequence[IdRow]) -> None:
        """Compare the shortest rows' scores with those of the folder's network, once per connection to the server."""
        with self.lock:
            if self.interruptions == self.client.interruptions:
                return
            if self.verify:
                from stages.network.local import scores_on_cpu

                trials = sorted(set(rows), key=lambda row: (len(row[0]) + len(row[1]), row))[:TRIALS]
                expected = scores_on_cpu(self.folder, trials, self.dtype)
                absolute, share = LIMITS[self.dtype]
                for score, local in zip(self._ask(trials), expected, strict=True):
                    if not abs(score - local) <= absolute + share * abs(local):  # NaN is no agreement
                        raise WinnowError(
                            f"{self.endpoint}: what it serves as {self.endpoint.model} scores {score:.4g} where the "
                            f"network in {self.folder} scores {local:.4g} in {self.dtype}: it is another model, or "
                            f"computes in another dtype; start it with `vllm serve {self.folder} --served-model-name "
                            f"{self.endpoint.model} --dtype {self.dtype}`, or set `by.dtype` to the server's"
                        )
            self.interruptions = self.client.interruptions

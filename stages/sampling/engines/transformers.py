"""Engine on Hugging Face `generate`: slow, the reference for the others, and the one that can be steered."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from stages.network.load import free, read_network
from stages.sampling.engines import Completion, Engine, EngineProgress, Request, Sampling, ignore_progress
from stages.sampling.engines.steering import steered_ids

BATCH_ROWS = 256


@dataclass
class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that adds each row's own seeded Gumbel noise: the argmax is a draw from the warped softmax.

    The noise of step t comes from (seed, t), so that a draw does not depend on which batch it is in. `logp` has the
    log-prob of each step's tokens: under the sampling distribution at temperature 1 without top-k, else the policy.
    """

    seeds: Sequence[int]
    prompt_length: int
    sampling: Sampling
    logp: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.noisy(input_ids.shape[1] - self.prompt_length, scores.float(), scores.float())

    def noisy(self, step: int, scores: Tensor, steered: Tensor) -> Tensor:
        """Return `steered` after temperature and top-k plus noise, all fp32 [N, V]; `steered` may be `scores`."""
        warped = steered / self.sampling.temperature
        if 0 < self.sampling.top_k < warped.shape[-1]:
            threshold = warped.topk(self.sampling.top_k, dim=-1).values[:, -1:]
            warped = warped.masked_fill(warped < threshold, -torch.inf)
        # A counter-based generator keyed by (seed, step): no state is carried from one step to the next.
        generators = [np.random.Generator(np.random.Philox(key=[seed, step])) for seed in self.seeds]
        noise = np.stack([generator.gumbel(size=warped.shape[-1]).astype(np.float32) for generator in generators])
        noisy = warped + torch.from_numpy(noise).to(warped.device)
        tokens = noisy.argmax(-1, keepdim=True)
        logits = scores if self.sampling.logp_kind == "raw" else steered
        self.logp.append(logits.log_softmax(-1).gather(-1, tokens).squeeze(-1))
        return noisy


class TransformersEngine(Engine):
    """Engine that batches rows of equal prompt length, so that nothing is padded, for one caller at a time."""

    def __init__(self, folder: Path, dtype: str) -> None:
        disable_progress_bar()
        torch.set_num_threads(1)  # as all scoring: the same numbers whatever else runs on the machine
        self.network = read_network(folder, getattr(torch, dtype))
        self.network.generation_config = GenerationConfig()  # its penalties and minima would change the distribution
        self.network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.lock = Lock()

    def close(self) -> None:
        """Free the weights."""
        free(self.network)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        indices_by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            indices_by_length.setdefault(len(request.prompt_ids), []).append(index)
        completions: dict[int, Completion] = {}
        with self.lock:
            for _, indices in sorted(indices_by_length.items()):
                for start in range(0, len(indices), BATCH_ROWS):
                    batch = indices[start : start + BATCH_ROWS]
                    outputs = self._generate_batch([requests[index] for index in batch], sampling)
                    completions |= zip(batch, outputs, strict=True)
                    progress(len(completions))
        return [completions[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        """Return completions of requests whose prompts have one length."""
        ids = torch.tensor([list(request.prompt_ids) for request in requests], device=self.network.device)
        noise = GumbelNoise([request.seed for request in requests], ids.shape[1], sampling)
        if sampling.steering is None:
            # Greedy: the argmax of noisy logits is the draw, and transformers' own sampling has one seed for all rows.
            greedy = GenerationConfig(
                max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=list(sampling.stop), pad_token_id=0
            )
            output = self.network.generate(
                ids,
                generation_config=greedy,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([noise]),
            )
            tokens = output[:, ids.shape[1] :]
        else:
            tokens = steered_ids(self.network, ids, noise.noisy, sampling, sampling.steering)

        # Rows go on until the last one of the batch has ended: cut each after its first stop id.
        completions = []
        for row, logp in zip(tokens.tolist(), torch.stack(noise.logp, dim=1), strict=True):
            length = next((n for n, token in enumerate(row, 1) if token in sampling.stop), None)
            reason = "length" if length is None else "stop"
            completions.append(Completion(row[:length], float(logp[:length].sum()), reason))
        return completions

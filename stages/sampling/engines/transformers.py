"""Hugging Face `generate` behind the seam: the slow engine that can be trusted, and that can be steered."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from stages.sampling.engines import Completion, Progress, Request, Sampling, ignore_progress
from stages.sampling.engines.steering import steered_ids

ROWS = 256


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds each row's own seeded Gumbel noise, so that the argmax is a draw from the warped softmax.

    The noise of step t comes from (seed, t): a draw does not depend on which batch it is in. `logp` has,
    for each step, the log-prob of the token drawn: under the law drawn from where that is uncut, else the policy's.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, sampling: Sampling) -> None:
        self.seeds, self.prompt_length, self.sampling = seeds, prompt_length, sampling
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.noisy(input_ids.shape[1] - self.prompt_length, scores.float(), scores.float())

    def noisy(self, step: int, scores: Tensor, steered: Tensor) -> Tensor:
        """Both fp32 [N, V]; the draw is made from `steered`, cut and warped; without steering the two are one."""
        warped = steered / self.sampling.temperature
        if 0 < self.sampling.top_k < warped.shape[-1]:
            kept = warped.topk(self.sampling.top_k, dim=-1).values[:, -1:]
            warped = warped.masked_fill(warped < kept, -torch.inf)
        noise = np.stack([_noise(seed, step, warped.shape[-1]) for seed in self.seeds])
        noisy: Tensor = warped + torch.from_numpy(noise).to(warped.device)
        drawn = noisy.argmax(-1, keepdim=True)
        law = steered if self.sampling.uncut else scores
        self.logp.append(law.log_softmax(-1).gather(-1, drawn).squeeze(-1))
        return noisy


def _noise(seed: int, step: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, step])).gumbel(size=size).astype(np.float32)


class TransformersEngine:
    """Rows of equal prompt length go together, so that nothing is padded; one caller after the other."""

    def __init__(self, folder: Path, dtype: str) -> None:
        disable_progress_bar()
        torch.set_num_threads(1)  # as all scoring: the same numbers whatever the machine shares
        kind = getattr(torch, dtype)
        self.network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
        self.network.generation_config = GenerationConfig()  # its penalties and minima would change the law
        self.network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.turn = Lock()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = ignore_progress
    ) -> list[Completion]:
        with self.turn:
            return self._generate(requests, sampling, progress)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress) -> list[Completion]:
        order = sorted(range(len(requests)), key=lambda n: len(requests[n].prompt_ids))
        done: dict[int, Completion] = {}
        for _, same in groupby(order, key=lambda n: len(requests[n].prompt_ids)):
            indices = list(same)
            for start in range(0, len(indices), ROWS):
                batch = indices[start : start + ROWS]
                done |= zip(batch, self._batch([requests[n] for n in batch], sampling), strict=True)
                progress(len(done))
        return [done[n] for n in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        ids = torch.tensor([list(request.prompt_ids) for request in requests], device=self.network.device)
        noise = GumbelNoise([request.seed for request in requests], ids.shape[1], sampling)
        if sampling.steering is None:
            drawn = self._generated(ids, noise, sampling)
        else:
            drawn = steered_ids(self.network, ids, noise.noisy, sampling, sampling.steering)
        logp = torch.stack(noise.logp, dim=1)
        return [_completion(row, each, sampling.stop) for row, each in zip(drawn.tolist(), logp, strict=True)]

    def _generated(self, ids: Tensor, noise: GumbelNoise, sampling: Sampling) -> Tensor:
        plain = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=list(sampling.stop), pad_token_id=0
        )
        output: Tensor = self.network.generate(
            ids,
            generation_config=plain,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([noise]),
        )
        return output[:, ids.shape[1] :]

    def close(self) -> None:
        del self.network


def _completion(ids: list[int], logp: Tensor, stop: Sequence[int]) -> Completion:
    ends = [n for n, token in enumerate(ids) if token in stop]
    length = ends[0] + 1 if ends else len(ids)
    return Completion(ids[:length], float(logp[:length].sum()), "stop" if ends else "length")

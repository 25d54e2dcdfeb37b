"""Engine on Hugging Face `generate`: slow, the reference for the others, and the one that can be steered."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

from schemas import WinnowError
from stages.model_config import FROM_FOLDER
from stages.network.device import default_device
from stages.network.load import free, move_to, read_network
from stages.sampling.engines import Completion, Engine, EngineProgress, Request, Sampling, ignore_progress
from stages.sampling.engines.steering import steered_ids

BATCH_ROWS = 256


@dataclass
class OfResponse(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that reads the response alone, as vLLM's bad words do."""

    processor: LogitsProcessor
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processed: Tensor = self.processor(input_ids[:, self.prompt_length :], scores)
        return processed


@dataclass
class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalty of OpenAI's API, which transformers has not: both count in the response alone."""

    presence: float
    frequency: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def law_of(sampling: Sampling, prompt_length: int, bad_word_ids: list[list[int]], device: Any) -> LogitsProcessorList:
    """Return what turns a policy's logits into those that are drawn from: transformers' processors in vLLM's order."""
    law = LogitsProcessorList()
    if bad_word_ids:
        law.append(OfResponse(NoBadWordsLogitsProcessor(bad_word_ids), prompt_length))
    if sampling.logit_bias:
        law.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias}))
    if sampling.min_tokens:
        stop = list(sampling.stop_token_ids)
        law.append(MinNewTokensLengthLogitsProcessor(prompt_length, sampling.min_tokens, stop, device=device))
    if sampling.repetition_penalty != 1.0:
        law.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        law.append(OfResponse(CountPenalty(sampling.presence_penalty, sampling.frequency_penalty), prompt_length))
    if sampling.temperature != 1.0:
        law.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p:
        law.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        law.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        law.append(TopPLogitsWarper(sampling.top_p))
    return law


@dataclass
class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that adds each row's own seeded Gumbel noise: the argmax is a draw from the warped softmax.

    The noise of step t comes from (seed, t), so that a draw does not depend on which batch it is in. `logp` has the
    log-prob of each step's tokens under the distribution that `logp_kind` of `sampling` names.
    """

    seeds: Sequence[int]
    prompt_length: int
    sampling: Sampling
    law: LogitsProcessorList
    logp: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.noisy(input_ids, scores.float(), scores.float())

    def noisy(self, input_ids: Tensor, scores: Tensor, steered: Tensor) -> Tensor:
        """Return `steered` under the law of the draw plus noise, all fp32 [N, V]; `steered` may be `scores`.

        input_ids: prompt and response so far [N, L + t].
        """
        step, warped = input_ids.shape[1] - self.prompt_length, self.law(input_ids, steered)
        # A counter-based generator keyed by (seed, step): no state is carried from one step to the next.
        generators = [np.random.Generator(np.random.Philox(key=[seed, step])) for seed in self.seeds]
        noise = np.stack([generator.gumbel(size=warped.shape[-1]).astype(np.float32) for generator in generators])
        noisy = warped + torch.from_numpy(noise).to(warped.device)
        tokens = noisy.argmax(-1, keepdim=True)
        logits = scores if self.sampling.logp_kind == "raw" else steered
        self.logp.append(logits.log_softmax(-1).gather(-1, tokens).squeeze(-1))
        return noisy


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Stopping criterion of texts as vLLM checks them: in the response alone, by the token that completes one.

    transformers' own reads prompts too, and special tokens, which are no text.
    """

    def __init__(self, sampling: Sampling, prompts: list[list[int]], tokenizer: Any) -> None:
        self.sampling, self.prompt_length, self.tokenizer = sampling, len(prompts[0]), tokenizer
        self.streams = [DecodeStream(ids=ids, skip_special_tokens=True) for ids in prompts]
        self.texts = [""] * len(prompts)
        self.lengths: list[int | None] = [None] * len(prompts)  # of the responses that completed one

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        for n, token in enumerate(input_ids[:, -1].tolist()):
            if self.lengths[n] is not None:
                continue
            length = len(self.texts[n])
            try:
                text = self.streams[n].step(self.tokenizer, token)
            except Exception as error:  # tokenizers has no other
                if not str(error).startswith("Invalid prefix"):
                    raise
                # What follows bytes that are no UTF-8 starts anew, as in vLLM.
                self.streams[n] = DecodeStream(skip_special_tokens=True)
                text = self.streams[n].step(self.tokenizer, token)
            self.texts[n] += text or ""
            if len(self.texts[n]) > length and step > self.sampling.min_tokens:
                starts = [self.texts[n].find(stop, max(0, length - len(stop) + 1)) for stop in self.sampling.stop]
                self.lengths[n] = step if max(starts) >= 0 else None
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class NetworkEngine(Engine):
    """Engine on a network in memory, in batches of rows of equal prompt length, so that nothing is padded.

    folder: that of the network's tokenizer. max_tokens: of prompts and responses together in a batch of several rows;
    None: BATCH_ROWS rows of any length. One caller at a time.
    """

    def __init__(self, network: PreTrainedModel, folder: Path, max_tokens: int | None = None) -> None:
        self.network, self.folder, self.max_tokens = network, folder, max_tokens
        network.generation_config = GenerationConfig()  # its penalties and minima would change the distribution
        self.lock = Lock()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        indices_by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            indices_by_length.setdefault(len(request.prompt_ids), []).append(index)
        completions: dict[int, Completion] = {}
        with self.lock:
            for length, indices in sorted(indices_by_length.items()):
                rows = BATCH_ROWS
                if self.max_tokens is not None:
                    rows = max(1, min(rows, self.max_tokens // (length + sampling.max_tokens)))
                for start in range(0, len(indices), rows):
                    batch = indices[start : start + rows]
                    outputs = self._generate_batch([requests[index] for index in batch], sampling)
                    completions |= zip(batch, outputs, strict=True)
                    progress(len(completions))
        return [completions[index] for index in range(len(requests))]

    @torch.no_grad()  # and no inference mode: a tensor that a layer keeps from it could not be trained with afterwards
    def _generate_batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        """Return completions of requests whose prompts have one length."""
        ids = torch.tensor([list(request.prompt_ids) for request in requests], device=self.network.device)
        bad_word_ids = self._bad_word_ids(sampling.bad_words) if sampling.bad_words else []
        law = law_of(sampling, ids.shape[1], bad_word_ids, self.network.device)
        noise = GumbelNoise([request.seed for request in requests], ids.shape[1], sampling, law)
        stop_strings = StopStrings(sampling, ids.tolist(), self.backend) if sampling.stop else None
        stopping = StoppingCriteriaList([] if stop_strings is None else [stop_strings])
        if sampling.steering is None:
            # Greedy: the argmax of noisy logits is the draw, and transformers' own sampling has one seed for all rows.
            greedy = GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=0,
            )
            output = self.network.generate(
                ids,
                generation_config=greedy,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([noise]),
                stopping_criteria=stopping,
            )
            tokens = output[:, ids.shape[1] :]
        else:
            tokens = steered_ids(self.network, ids, noise.noisy, sampling, sampling.steering, stopping)

        # Rows go on until the last one of the batch has ended: cut each after its first stop id or stop string.
        completions = []
        for n, (row, logp) in enumerate(zip(tokens.tolist(), torch.stack(noise.logp, dim=1), strict=True)):
            length, reason = len(row), "length"
            if stop_strings and (by_text := stop_strings.lengths[n]) is not None:
                length, reason = by_text, "stop_string"
            by_id = next((step for step, token in enumerate(row[:length], 1) if token in sampling.stop_token_ids), None)
            if by_id is not None:
                length, reason = by_id, "stop"
            completions.append(Completion(row[:length], float(logp[:length].sum()), reason))
        return completions

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder, **FROM_FOLDER)

    @cached_property
    def backend(self) -> Any:
        """Return the tokenizer of the library tokenizers; raise WinnowError if the model has another."""
        if not self.tokenizer.is_fast:
            raise WinnowError("stop: the engine transformers needs a tokenizer.json to find texts; set `engine: vllm`")
        return self.tokenizer.backend_tokenizer

    def _bad_word_ids(self, words: tuple[str, ...]) -> list[list[int]]:
        """Return the ids of each word at the start of a text, and after a space where those are others, as vLLM does.

        After a space they count if they are as many, with another first one (SamplingParams.update_from_tokenizer).
        Raises WinnowError for a word of no token.
        """
        sequences = []
        for word in words:
            first, spaced = (
                self.tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False) for prefix in ("", " ")
            )
            if not first:
                raise WinnowError(f"bad_words: {word!r} is no token of this tokenizer; remove it")
            sequences.append(first)
            if spaced and spaced[0] != first[0] and len(spaced) == len(first):
                sequences.append(spaced)
        return sequences


class TransformersEngine(NetworkEngine):
    """Engine that reads a policy's folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        disable_progress_bar()
        torch.set_num_threads(1)  # as all scoring: the same numbers whatever else runs on the machine
        network = read_network(folder, getattr(torch, dtype))
        move_to(network.eval(), default_device())
        super().__init__(network, folder)

    def close(self) -> None:
        """Free the weights."""
        free(self.network)

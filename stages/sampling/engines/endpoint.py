"""Engine on a server: vLLM's OpenAI-compatible one, which takes and returns token ids."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import BaseModel, StrictInt

from schemas import WinnowError
from stages.endpoint import Endpoint, EndpointClient
from stages.model_config import FROM_FOLDER, ModelConfig
from stages.sampling.engines import Completion, Engine, EngineProgress, Request, Sampling, ignore_progress

PATH = "/completions"
TRIALS = 4  # draws that are compared with the folder's own network
TRIAL_TOKENS = 16  # of each at most
ROUNDING = 1e-3  # nats that a log-prob may be above 0
CERTAIN = -0.5  # nats: of two different tokens, one has a lower log-prob than log 1/2


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[StrictInt] | None = None
    token_ids: list[StrictInt] | None = None
    logprobs: _Logprobs | None = None


class _Answer(BaseModel):
    choices: list[_Choice]
    system_fingerprint: str | None = None


class _Tokens(BaseModel):
    tokens: list[StrictInt]


class EndpointEngine(Engine):
    """Engine that asks for one draw per request, each with its own seed, as the one on vLLM does.

    What a server could do otherwise than it was asked to, and a response shows, ends the step: another prompt, fewer
    tokens than max_tokens, an end that nobody named, ids that the network has not, log-probs above 0.
    """

    def __init__(self, folder: Path, dtype: str, endpoint: Endpoint, verify: bool) -> None:
        self.folder, self.dtype, self.endpoint, self.verify = folder, dtype, endpoint, verify
        self.client = EndpointClient(endpoint)
        self.vocabulary = ModelConfig(folder).vocabulary
        self.lock = Lock()  # guards what follows
        self.interruptions = -1  # of the client at the last check; never checked
        self.fingerprints: set[str | None] = set()  # of servers that were checked

    def close(self) -> None:
        self.client.close()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        """Return completions in the order of the requests; raise WinnowError if another model is served meanwhile."""
        if not requests:
            return []
        longest = max(len(request.prompt_ids) for request in requests) + sampling.max_tokens
        limit = self.client.max_model_len
        if limit is not None and longest > limit:
            raise WinnowError(
                f"{self.endpoint}: a prompt and max_tokens take {longest:,} tokens, and the server has room for "
                f"{limit:,}; start it with `--max-model-len {longest}` or more, or set max_tokens lower"
            )
        self._check_server(requests, sampling, self.fingerprints)
        answers = self._ask(requests, sampling, progress)
        # A server that was lost may have come back as another: nothing of it counts until it is checked.
        self._check_server(requests, sampling, {fingerprint for _, fingerprint in answers})
        return [completion for completion, _ in answers]

    def _ask(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[tuple[Completion, str | None]]:
        """Return each request's completion, and the fingerprint of the server that drew it."""
        # Every parameter, so that no default of the server counts.
        fields = {
            "model": self.endpoint.model,
            "n": 1,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias},
            "bad_words": list(sampling.bad_words),
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "watermarking": False,
            "add_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

        def body(request: Request) -> dict[str, Any]:
            return fields | {"prompt": list(request.prompt_ids), "seed": request.seed}

        def read(n: int, answer: Any) -> tuple[Completion, str | None]:
            parsed = self.client.parse(_Answer, answer)
            return self._completion(parsed, requests[n], sampling), parsed.system_fingerprint

        return self.client.post_all(PATH, [partial(body, request) for request in requests], read, progress)

    def _completion(self, answer: _Answer, request: Request, sampling: Sampling) -> Completion:
        """Return the server's answer; raise WinnowError for one that the request did not ask for."""
        if len(answer.choices) != 1:
            raise WinnowError(f"{self.endpoint}: {len(answer.choices)} answers to a request of one")
        choice = answer.choices[0]
        ids, logprobs, reason = choice.token_ids, choice.logprobs, choice.finish_reason
        if ids is None or logprobs is None or choice.prompt_token_ids is None:
            raise WinnowError(
                f"{self.endpoint}: the server returns no token ids and log-probs of what it drew, and text can be "
                "those of other ids; serve the policy by vLLM (0.32 is tested), or set `engine: vllm`"
            )
        if choice.prompt_token_ids != list(request.prompt_ids):
            raise WinnowError(
                f"{self.endpoint}: the server read {len(choice.prompt_token_ids)} prompt ids that are not the "
                f"{len(request.prompt_ids)} ids sent; remove what adds or cuts ids there"
            )
        if len(logprobs.token_logprobs) != len(ids):
            raise WinnowError(f"{self.endpoint}: {len(ids)} ids, and log-probs of {len(logprobs.token_logprobs)}")
        if beyond := [token for token in ids if token < 0 or (self.vocabulary and token >= self.vocabulary)]:
            limit = "none below 0" if self.vocabulary is None else f"those from 0 to {self.vocabulary - 1}"
            raise WinnowError(
                f"{self.endpoint}: the server drew id {beyond[0]}, and the network in {self.folder} has {limit}: it "
                "serves another model; serve the policy's own folder"
            )
        if (largest := max(logprobs.token_logprobs, default=0.0)) > ROUNDING:
            raise WinnowError(
                f"{self.endpoint}: the server gives a token the log-prob {largest:.4g}, and none is above 0: these are "
                "no log-probs; start it with `--logprobs-mode raw_logprobs`"
            )
        if reason == "length" and len(ids) != sampling.max_tokens:
            raise WinnowError(
                f"{self.endpoint}: the server cut a response at {len(ids):,} tokens, and max_tokens is "
                f"{sampling.max_tokens:,}; start it with `--generation-config vllm`, and no max_new_tokens of its own"
            )
        if reason == "stop" and isinstance(choice.stop_reason, str):
            reason = "stop_string"
        elif reason == "stop" and (not ids or ids[-1] not in sampling.stop_token_ids):
            raise WinnowError(
                f"{self.endpoint}: the server ended a response with id {ids[-1] if ids else None}, which is no end of "
                f"this policy ({', '.join(map(str, sampling.stop_token_ids)) or 'it has none here'}): its folder, or "
                "its generation config, is another; serve the policy's own folder, or add the id to `stop_token_ids`"
            )
        elif reason not in ("stop", "length"):
            raise WinnowError(f"{self.endpoint}: the server ended a response for the reason {reason!r}; see its log")
        return Completion(ids, sum(logprobs.token_logprobs), reason)

    def _check_server(self, requests: Sequence[Request], sampling: Sampling, fingerprints: set[str | None]) -> None:
        """Check that the server draws from the policy, if it was not checked since it was reached or seen anew."""
        with self.lock:
            if self.interruptions == self.client.interruptions and fingerprints <= self.fingerprints:
                return
            # The shortest prompts, since a CPU reads them.
            unique = {tuple(request.prompt_ids): request for request in requests}
            trials = [unique[ids] for ids in sorted(unique, key=lambda ids: (len(ids), ids))[:TRIALS]]
            self._check_logprobs_mode(trials[0])
            interruptions = self.client.interruptions
            self._check_bad_words(sampling)
            size = min(TRIAL_TOKENS, sampling.max_tokens)
            short = replace(sampling, max_tokens=size, min_tokens=min(size, sampling.min_tokens))
            draws = self._ask(trials, short)
            if self.verify:
                self._check_weights(trials, [completion for completion, _ in draws])
                # To read the weights takes as long as a start of the server: one that draws the same is the same.
                again, _ = self._ask(trials[:1], short)[0]
                if again.token_ids == draws[0][0].token_ids:
                    interruptions = self.client.interruptions
            self.interruptions = interruptions
            self.fingerprints |= fingerprints | {fingerprint for _, fingerprint in draws}

    def _check_logprobs_mode(self, trial: Request) -> None:
        """Refuse log-probs of the processed logits: a bias makes two different tokens certain, one after the other."""
        neutral = Sampling(1.0, 0, 1, (), ignore_eos=True)
        logps = [self._ask([trial], replace(neutral, logit_bias=((token, 100.0),)))[0][0].logp for token in (0, 1)]
        if min(logps) > CERTAIN:
            raise WinnowError(
                f"{self.endpoint}: its log-probs are those after temperature, bias and cuts, and not the policy's; "
                "start the server with `--logprobs-mode raw_logprobs`"
            )

    def _check_bad_words(self, sampling: Sampling) -> None:
        """Refuse a server that reads bad words as other ids than the policy's tokenizer: of them the ids are banned."""
        if not sampling.bad_words:
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, **FROM_FOLDER)
        address = self.endpoint.url.removesuffix("/v1") + "/tokenize"
        for word in sampling.bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                body = {"model": self.endpoint.model, "prompt": text, "add_special_tokens": False}
                tokens = self.client.post(address, body, lambda _, answer: self.client.parse(_Tokens, answer)).tokens
                if tokens != tokenizer.encode(text, add_special_tokens=False):
                    raise WinnowError(
                        f"{self.endpoint}: bad_words: the server reads {text!r} as other ids than the policy's "
                        f"tokenizer does; serve {self.folder} with its own tokenizer"
                    )

    def _check_weights(self, trials: Sequence[Request], completions: Sequence[Completion]) -> None:
        """Compare log-probs with those of the folder's network; raise WinnowError if rounding does not explain them."""
        from stages.network.local import logp_on_cpu
        from stages.training.agreement import Draw, check_agreement

        rows = [(request.prompt_ids, item.token_ids) for request, item in zip(trials, completions, strict=True)]
        local = logp_on_cpu(self.folder, rows, self.dtype)
        compared = [
            (Draw(item.logp, self.endpoint.model, self.dtype), logp, len(item.token_ids))
            for item, logp in zip(completions, local, strict=True)
        ]
        try:
            check_agreement(compared, self.dtype, 1.0, self.endpoint.model, f"{self.endpoint}")
        except WinnowError as error:
            raise WinnowError(
                f"{self.endpoint}: what it serves as {self.endpoint.model} is not the network in {self.folder}, or it "
                f"computes in another dtype than {self.dtype}: start it with `vllm serve {self.folder} "
                f"--served-model-name {self.endpoint.model} --dtype {self.dtype}`, or set `dtype` to the server's",
                str(error),
            ) from None

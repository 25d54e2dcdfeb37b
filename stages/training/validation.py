"""Evaluation during training: the network in memory draws responses to validation prompts, and the ranker judges them.

Every draw has its own seed, the same at every evaluation, so that two of them differ by what the policy learned.
Nothing here changes the training: neither its random numbers nor its number of threads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipeline import StageContext
from schemas import Model, WinnowError, seed_for
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, imported_candidate, reject_not_finite, rows_by_prompt
from stages.data.tokenizer import Tokenizer
from stages.limits import check_ids, context_length
from stages.network.device import autocast
from stages.network.forward import forward_rows, logp_of
from stages.network.load import plain_layers
from stages.ranking.base import Ranker
from stages.ranking.judge import judge_prompts, win_of
from stages.sampling.draws import draw_texts, known_ids_of
from stages.sampling.engines import Request, Sampling
from stages.sampling.engines.transformers import NetworkEngine
from stages.training.config import VALIDATION


class Validation:
    """Validation prompts with their baseline, the ranker, and how responses are drawn, for all evaluations of a run.

    Raises WinnowError if no prompt of the split has a baseline response.
    """

    def __init__(
        self,
        ctx: StageContext,
        init: Model,
        prompts: pa.Table,
        baseline: pa.Table,
        open_ranker: Callable[[], Ranker],
        *,
        split: str,
        n: int,
        temperature: float,
        max_tokens: int,
        stop: Sequence[str],
        stop_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.ctx, self.init, self.open_ranker, self.n, self.seed = ctx, init, open_ranker, n, seed
        self.tokenizer = Tokenizer(init)
        self.known_ids = known_ids_of(self.tokenizer)
        ends = tuple(dict.fromkeys([*self.tokenizer.stop, *stop_token_ids]))
        self.sampling = Sampling(temperature, 0, max_tokens, ends, stop=tuple(stop))
        self.baseline = dict(rows_by_prompt(baseline))
        rows = sorted(prompts.to_pylist(), key=lambda row: row["prompt_id"])
        rows = [row for row in rows if row["split"] == split and row["prompt_id"] in self.baseline]
        if not rows:
            raise WinnowError(
                f"evaluate_every: no prompt of split {split} has a response in `baseline`; give it the step that "
                f"samples these prompts, with `split: {split}`"
            )
        check_ids(init, "prompts", [row["token_ids"] for row in rows])
        room = context_length(init.folder) - max_tokens
        self.prompts: list[Row] = []
        for row in rows:
            if len(row["token_ids"]) <= room:
                self.prompts.append(row)
            else:
                detail = f"{len(row['token_ids'])} tokens, room for {room}"
                ctx.reject("prompt too long", place="validation", prompt=row["prompt_id"], detail=detail)
        if not self.prompts:
            raise WinnowError(
                f"evaluate_max_tokens: {max_tokens} leaves no validation prompt room in the policy's context of "
                f"{context_length(init.folder)} tokens; set it lower"
            )

    def measure(
        self, network: PreTrainedModel, dtype: str, step: int, tokens_per_pass: int, base_is_reference: bool
    ) -> dict[str, float]:
        """Return the figures of the policy after so many steps, by metric.

        tokens_per_pass: of a batch of draws, whose keys and values take less memory than a training pass of as many
        tokens. base_is_reference: without its adapter, the network is the reference, so that there is a KL.
        """
        devices = [network.device] if network.device.type == "cuda" else []
        threads = torch.get_num_threads()
        with torch.random.fork_rng(devices):  # a ranker's network may draw weights before it reads them
            try:
                draws = self._draw(network, dtype, step, tokens_per_pass)
                figures = self._kl(network, dtype, draws, tokens_per_pass) if base_is_reference else {}
                return self._judge(draws, step) | figures
            except torch.OutOfMemoryError as error:
                raise WinnowError(
                    f"step {step}: out of memory in its evaluation, in which the ranker takes the place of gradients; "
                    "lower tokens_per_pass, give a smaller ranker or one behind an endpoint, or set evaluate_every to 0"
                ) from error
            finally:
                torch.set_num_threads(threads)  # scoring has one, on a CPU

    def _draw(
        self, network: PreTrainedModel, dtype: str, step: int, tokens_per_pass: int
    ) -> list[tuple[Row, list[Row]]]:
        """Return each prompt with its draws, as rows of `candidates`; the text of one that cannot be read is None."""
        keys = [(row, k) for row in self.prompts for k in range(self.n)]
        requests = [
            Request(row["token_ids"], seed_for(self.seed, "validation", row["prompt_id"], k)) for row, k in keys
        ]
        engine = NetworkEngine(network, self.init.folder, tokens_per_pass)
        with plain_layers(network), autocast(dtype, network.device):
            completions = engine.generate(requests, self.sampling)
        draws: list[tuple[Row, list[Row]]] = [(row, []) for row in self.prompts]
        for n, completion in enumerate(completions):
            prompt, samples = draws[n // self.n]
            if not math.isfinite(completion.logp):
                raise WinnowError(
                    f"step {step}: a draw of validation prompt {prompt['prompt_id']} has the log-prob "
                    f"{completion.logp}: the weights, or activations in {dtype}, are no longer finite; try a lower "
                    "learning_rate"
                )
            text, raw_text = None, None
            if self.known_ids.issuperset(completion.token_ids):
                with suppress(ValueError):  # no stop text where one ended it
                    texts = draw_texts(self.tokenizer, completion, self.sampling.stop, prompt)
                    text, raw_text, _ = texts
            row = imported_candidate(
                prompt["prompt_id"], completion.token_ids, text or "", {row["candidate_id"] for row in samples},
                k=n % self.n, finish_reason=completion.finish_reason,
            )  # fmt: skip
            samples.append(row | {"text": text, "raw_text": raw_text})
        return draws

    def _judge(self, draws: list[tuple[Row, list[Row]]], step: int) -> dict[str, float]:
        """Return win rate, length and what the ranker could not read: means over draws, then over prompts."""
        wins, verdicts, unread = [], [], []
        ranker = self.open_ranker()
        try:
            judged = judge_prompts(
                ranker,
                [
                    (prompt, [row for row in samples if row["text"] is not None], self.baseline[prompt["prompt_id"]])
                    for prompt, samples in draws
                ],
            )
            for (prompt, samples), (rows, calls, _) in zip(draws, judged, strict=True):
                opponents = self.baseline[prompt["prompt_id"]]
                self.ctx.count(ranker_calls=calls)
                rows += [
                    dict(prompt_id=prompt["prompt_id"], k=row["k"], candidate_id=row["candidate_id"],
                         baseline_id=opponent["candidate_id"], logit=None, unread="candidate")
                    for row in samples if row["text"] is None for opponent in opponents
                ]  # fmt: skip
                table = pa.Table.from_pylist(rows, schema=JUDGEMENTS)
                matches = reject_not_finite(table, "logit", self.ctx, place=f"validation, step {step}").to_pylist()
                by_draw = [[match for match in matches if match["k"] == row["k"]] for row in samples]
                wins.append(mean(mean(map(win_of, of_draw)) for of_draw in by_draw))
                verdicts.append(mean(match["logit"] is not None for match in matches))
                unread.append(mean(match["unread"] is not None for match in matches))
            ranker.finish_part(self.ctx)
        finally:
            if hasattr(ranker, "close"):
                ranker.close()
        if (proxy_win := mean(wins)) is None:
            raise WinnowError(
                f"step {step}: the ranker has no verdict on any response to {len(draws)} validation prompts; look at "
                "its `by`, or set evaluate_every to 0"
            )
        figures = {
            "proxy_win": proxy_win,
            "proxy_unread": mean(unread),
            "n_tokens": mean(mean(row["n_tokens"] for row in samples) for _, samples in draws),
        }
        if ranker.abstains:
            figures["proxy_verdicts"] = mean(verdicts)
        return {VALIDATION + name: value for name, value in figures.items() if value is not None}

    def _kl(
        self, network: PreTrainedModel, dtype: str, draws: list[tuple[Row, list[Row]]], tokens_per_pass: int
    ) -> dict[str, float]:
        """Return the mean of log p - log p_ref over the draws, if they are of the policy itself (temperature 1)."""
        from stages.network.lora import without_adapter

        if self.sampling.logp_kind != "exact":
            return {}
        rows = [(prompt["token_ids"], row["token_ids"]) for prompt, samples in draws for row in samples]
        logp = forward_rows(logp_of, network, rows, dtype, tokens_per_pass, may_halve=False)
        with without_adapter(network):
            reference = forward_rows(logp_of, network, rows, dtype, tokens_per_pass, may_halve=False)
        return {VALIDATION + "kl": float((logp - reference).mean(dtype="float64"))}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None

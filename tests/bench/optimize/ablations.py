"""Ours with one idea taken out: what each is worth. Nothing here is an option of the product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from tests.bench.optimize.model import a_row_a_pair

Ablation = tuple[Callable[[], AbstractContextManager[Any]], Callable[[pa.Table], pa.Table]]


@contextmanager
def no_sharing() -> Iterator[None]:
    """A prompt is read again for each of its responses: K (P + R) tokens a group."""
    import stages.training.terms
    from stages.network.forward import completion_logp
    from stages.network.packing import PromptGroup

    def apart(network: Any, groups: Sequence[PromptGroup], dtype: str) -> Any:
        return completion_logp(
            network, [PromptGroup(group.prompt, [ids]) for group in groups for ids in group.responses], dtype
        )

    with patch.object(stages.training.terms, "completion_logp", apart):
        yield


@contextmanager
def head_everywhere() -> Iterator[None]:
    """The head also runs on the positions that predict no response token, as if they were one more response."""
    import stages.network.forward

    hidden_states = stages.network.forward.hidden_states

    def everywhere(network: Any, groups: Any, dtype: str, last: bool = False) -> Any:
        states, tokens = hidden_states(network, groups, dtype, last)
        if last:
            return states, tokens  # for other things than log-probs
        rest = np.setdiff1d(np.arange(len(states)), tokens.predictors.numpy()).tolist()

        def and_rest(values: Any, more: list[int]) -> Any:
            return values.new_tensor(values.tolist() + more)

        return states, replace(
            tokens,
            predictors=and_rest(tokens.predictors, rest),
            targets=and_rest(tokens.targets, [0] * len(rest)),
            lengths=and_rest(tokens.lengths, [len(rest)]),
        )

    with patch.object(stages.network.forward, "hidden_states", everywhere):
        yield


def as_it_is(examples: pa.Table) -> pa.Table:
    return examples


ABLATIONS: dict[str, Ablation] = {
    "none": (nullcontext, as_it_is),
    "head on all positions": (head_everywhere, as_it_is),
    "no sharing": (no_sharing, as_it_is),
    "no de-duplication": (nullcontext, a_row_a_pair),
    "neither sharing nor de-duplication": (no_sharing, a_row_a_pair),
}

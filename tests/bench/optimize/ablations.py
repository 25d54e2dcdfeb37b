"""Our training without one of its optimisations. Nothing here is an option of the product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from tests.bench.optimize.model import one_pair_per_group

Ablation = tuple[Callable[[], AbstractContextManager[Any]], Callable[[pa.Table], pa.Table]]


@contextmanager
def no_sharing() -> Iterator[None]:
    """Compute a prompt again for each of its responses: K (P + R) tokens per group."""
    import stages.training.terms
    from stages.network.forward import completion_logp
    from stages.network.packing import PromptGroup

    def separately(network: Any, groups: Sequence[PromptGroup], dtype: str) -> Any:
        return completion_logp(
            network, [PromptGroup(group.prompt, [ids]) for group in groups for ids in group.responses], dtype
        )

    with patch.object(stages.training.terms, "completion_logp", separately):
        yield


@contextmanager
def head_everywhere() -> Iterator[None]:
    """Run the head also on positions that predict no response token, as if they were one more response."""
    import stages.network.forward

    hidden_states = stages.network.forward.hidden_states

    def everywhere(network: Any, groups: Any, dtype: str, last: bool = False) -> Any:
        states, tokens = hidden_states(network, groups, dtype, last)
        if last:
            return states, tokens  # not for log-probs
        rest = np.setdiff1d(np.arange(len(states)), tokens.predictors.numpy()).tolist()

        added = {"predictors": rest, "targets": [0] * len(rest), "lengths": [len(rest)]}
        fields = {name: getattr(tokens, name) for name in added}
        extended = {name: ids.new_tensor(ids.tolist() + added[name]) for name, ids in fields.items()}
        return states, replace(tokens, **extended)

    with patch.object(stages.network.forward, "hidden_states", everywhere):
        yield


ABLATIONS: dict[str, Ablation] = {
    "none": (nullcontext, lambda examples: examples),
    "head on all positions": (head_everywhere, lambda examples: examples),
    "no sharing": (no_sharing, lambda examples: examples),
    "no de-duplication": (nullcontext, one_pair_per_group),
    "neither sharing nor de-duplication": (no_sharing, one_pair_per_group),
}

"""What a network says of responses to prompts: log-probs, scores, hidden states.

A prompt is read once for all of its responses (`packing`, `shared_prefix`) by every network for which that is
exact; any other reads a padded row for each. `reference`, `reward`, `features` and `optimize` share this file, so
that a cached number is the trainer's own.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from schemas import WinnowError, WinnowWarning
from stages.network.lm_head import lm_head_of, token_logp
from stages.network.packing import Ids, PackedTokens, PromptGroup, PromptResponses, fill, pack, pad, split
from stages.network.prefix_attention import NAME

Row = tuple[Ids, Ids]
Measure = Callable[[PreTrainedModel, Sequence[PromptResponses], str], Tensor]
TRIAL = (PromptGroup([3, 1, 4, 1, 5], [[2, 6], [2, 7, 1, 8], [3]]), PromptGroup([1, 6], [[1, 8, 0], [3]]))
TOLD: WeakSet[PreTrainedModel] = WeakSet()  # networks whose window was said to be too short
KNOWN_HEADS: WeakSet[PreTrainedModel] = WeakSet()  # networks whose logits are `vocabulary.LMHead`'s
CLOSE = 1e-4  # of the largest number: fp32 added up in another order


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def completion_logp(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> tuple[Tensor, Tensor]:
    """Summed log-prob of each response given its prompt, and how many of its tokens are the likeliest.

    Returns two fp32 vectors [N], over the responses of one group after the other. The head runs on response
    positions only, if it is a linear layer; the softmax is in fp32 whatever the network runs in.
    """
    logp, hits, tokens = (_logp if network in KNOWN_HEADS else _own_logp)(network, groups, dtype)
    return _sums(logp, tokens)[tokens.rows], _sums(hits.float(), tokens)[tokens.rows]


def _logp(
    network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str
) -> tuple[Tensor, Tensor, PackedTokens]:
    """Of every token [M], and is it the likeliest."""
    states, tokens = read(network, groups, dtype)
    asked = states.index_select(0, tokens.predictors)  # whose gradients add up in a fixed order
    return *token_logp(asked.to(_precision(dtype)), lm_head_of(network), tokens.targets), tokens


def _own_logp(
    network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str
) -> tuple[Tensor, Tensor, PackedTokens]:
    """The same by the network's own way from states to logits, whatever it is; at all positions, padding too."""
    logits, tokens, predictors = _own_logits(network, groups, dtype)
    asked = logits[predictors].float()
    return -cross_entropy(asked, tokens.targets, reduction="none"), asked.argmax(-1) == tokens.targets, tokens


def _own_logits(
    network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str
) -> tuple[Tensor, PackedTokens, Tensor]:
    """Logits [places, V], what stands where, and the places that predict each response token."""
    tokens = pad(groups, network.device)
    given, predictors = {"input_ids": tokens.ids}, tokens.predictors
    if network.config.is_encoder_decoder:
        given, predictors = _encoded(network, groups)
    with autocast(dtype, network.device):
        logits = network(**given, use_cache=False).logits
    return logits.flatten(0, 1), tokens, predictors


def _precision(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _encoded(network: PreTrainedModel, groups: Sequence[PromptResponses]) -> tuple[dict[str, Tensor], Tensor]:
    """For an encoder-decoder: each response's prompt encoded, and the response, moved on by one, to decode."""
    start = network.config.decoder_start_token_id
    sides = (
        [group.prompt for group in groups for _ in group.responses],
        [[start, *response[:-1]] for group in groups for response in group.responses],
    )
    (prompts, mask), (inputs, real) = (_filled(side, network.device) for side in sides)
    return {"input_ids": prompts, "attention_mask": mask, "decoder_input_ids": inputs}, real.flatten().nonzero()[:, 0]


def _filled(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, [N, W], and 1 where a token is."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)


def completion_scores(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
    """The reward model's score of each response to its prompt, fp32 [N], with gradient.

    Read at each response's own last token, which transformers would guess from the pad token's id. The head is
    in fp32 whatever the network runs in: bfloat16 would round a score of 10 to 1/16.
    """
    states, tokens = read(network, groups, dtype, last=True)
    scores: Tensor = network.score(states[_last(tokens)].float())
    return scores.squeeze(-1)[tokens.rows]


def next_logits(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
    """Logits of what would follow each response, fp32 [N, V]."""
    if network in KNOWN_HEADS:
        states, tokens = read(network, groups, dtype, last=True)
        logits = lm_head_of(network).logits(states[_last(tokens)].to(_precision(dtype)))
    else:
        _refuse_encoder(network)
        own, tokens, _ = _own_logits(network, groups, dtype)
        logits = own[_last(tokens)].float()
    return logits[tokens.rows]


def response_means(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
    """Mean of the last hidden states over each response's tokens, fp32 [N, hidden]."""
    states, tokens = read(network, groups, dtype, last=True)
    return (_sums(states[tokens.places].float(), tokens) / tokens.lengths[:, None])[tokens.rows]


def read(
    network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str, last: bool = False
) -> tuple[Tensor, PackedTokens]:
    """Last hidden states [places, hidden], and what stands where."""
    _refuse_encoder(network)
    tokens = pack(groups, network.device, last=last) if shares(network, groups) else pad(groups, network.device)
    given = {} if tokens.layout is None else {"layout": tokens.layout, "attention_mask": _no_mask(network.device)}
    with autocast(dtype, network.device):
        states = network.base_model(
            input_ids=tokens.ids, position_ids=tokens.positions, use_cache=False, **given
        ).last_hidden_state
    return states.flatten(0, 1), tokens


def _refuse_encoder(network: PreTrainedModel) -> None:
    if network.config.is_encoder_decoder:
        raise WinnowError(f"{type(network).__name__} is an encoder-decoder: it gives log-probs, and nothing else")


def _no_mask(device: torch.device) -> Tensor:
    """Of four dimensions, so that transformers builds none of its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _sums(values: Tensor, tokens: PackedTokens) -> Tensor:
    """Of each response's tokens, [S, ...]."""
    return torch.segment_reduce(values, "sum", lengths=tokens.lengths)


def _last(tokens: PackedTokens) -> Tensor:
    return tokens.places[tokens.lengths.cumsum(0) - 1]


def shares(network: PreTrainedModel, groups: Sequence[PromptResponses] = ()) -> bool:
    """Is a prompt read once for all of its responses? Not by a network whose window is shorter than what it reads."""
    if network.config._attn_implementation != NAME:
        return False
    reach = max((len(group.prompt) + max(map(len, group.responses)) for group in groups), default=0)
    if reach > (window := _window(network)) and network not in TOLD:
        TOLD.add(network)
        _say(network, f"where they reach beyond its window of {window} tokens")
    return reach <= window


def _window(network: PreTrainedModel) -> int:
    """How far back every layer sees."""
    config = network.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([size for size in sizes if size], default=1 << 60)


@torch.no_grad()
def share_prefixes(network: PreTrainedModel) -> None:
    """From now on `network` reads a prompt once for all of its responses, if a trial shows the same numbers.

    A network whose attention has a state, a bias or a cap of its own fails it; it goes on with padded rows, and a
    warning says so. If its head is more than a linear layer, it makes its own logits, too.
    """
    before = network.config._attn_implementation
    try:
        if network.config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder")
        expected = _trial(network)
        if network.get_output_embeddings() is not None:
            KNOWN_HEADS.add(network)
            _agree(_trial(network), expected)
    except Exception as error:  # whatever a model's code makes of what it does not know
        KNOWN_HEADS.discard(network)
        return _say(network, f"({type(error).__name__}: {error})")
    try:
        network.set_attn_implementation(NAME)
        if network.config._attn_implementation != NAME:
            raise ValueError("its attention is not transformers' interface")
        _agree(_trial(network), expected)
    except Exception as error:
        network.set_attn_implementation(before)
        _say(network, f"({type(error).__name__}: {error})")


def _trial(network: PreTrainedModel) -> list[Tensor]:
    """Of each response, mean hidden states and, where there is a vocabulary, log-probs."""
    logp = [] if network.get_output_embeddings() is None else [completion_logp(network, TRIAL, "float32")[0]]
    return [response_means(network, TRIAL, "float32"), *logp]


def _agree(found: list[Tensor], expected: list[Tensor]) -> None:
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    if not off <= CLOSE:
        raise ValueError(f"a trial is off by {off:.1e} of the largest number")


def _say(network: PreTrainedModel, why: str) -> None:
    said = f"{type(network).__name__} reads a prompt again for each of its responses {why}"
    warnings.warn(said, WinnowWarning, stacklevel=3)


@torch.no_grad()
def read_rows(measure: Measure, network: PreTrainedModel, rows: Sequence[Row], dtype: str, budget: int) -> np.ndarray:
    """`measure` without gradients over any number of (prompt ids, response ids): fp32 [N, ...], in the order given."""
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    asked = list(_by_prompt(rows).items())
    groups = [PromptGroup(prompt, [rows[n][1] for n in which]) for prompt, which in asked]
    shared = shares(network, groups)
    parts = [
        (PromptGroup(group.prompt, [group.responses[n] for n in part]), [which[n] for n in part])
        for group, (_, which) in zip(groups, asked, strict=True)
        for part in split(group, budget, shared)
    ]
    for batch in fill([group for group, _ in parts], budget, shared):
        values = measure(network, [parts[n][0] for n in batch], dtype).cpu().numpy()
        for place, value in zip([place for n in batch for place in parts[n][1]], values, strict=True):
            found[place] = value
    return np.array(found, dtype=np.float32)


def _by_prompt(rows: Sequence[Row]) -> dict[tuple[int, ...], list[int]]:
    """Where the responses to each prompt stand."""
    places: dict[tuple[int, ...], list[int]] = {}
    for n, (prompt, _) in enumerate(rows):
        places.setdefault(tuple(prompt), []).append(n)
    return places


def logp_of(network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
    """`completion_logp` without the hits, for `read_rows`."""
    return completion_logp(network, groups, dtype)[0]

"""Forward passes over responses to prompts: log-probs, scores, hidden states.

A prompt is computed once for all of its responses (`packing`, `prefix_attention`) by every network for which that is
exact; for any other, each response is a padded row. `reference`, `reward`, `features` and `optimize` all use this file,
so that a cached number is the trainer's own.
"""

import warnings
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from schemas import WinnowError, WinnowWarning
from stages.network.device import CPU, TRIAL_TOLERANCE, autocast, is_out_of_memory, release
from stages.network.lm_head import lm_head_of, token_logp
from stages.network.packing import (
    Ids,
    Mask,
    PackedTokens,
    PromptGroup,
    batch_by_tokens,
    longest_row,
    pack,
    pad,
    split_responses,
)
from stages.network.prefix_attention import NAME
from stages.network.router import RouterLoss, has_router_loss

Row = tuple[Ids, Ids] | tuple[Ids, Ids, Mask]  # prompt, response, and which of its ids count
Measure = Callable[[PreTrainedModel, Sequence[PromptGroup], str], Tensor]
Run = Callable[[Callable[[], Tensor]], Tensor]  # calls a forward pass, with weights gathered that it uses
TRIAL = (PromptGroup([3, 1, 4, 1, 5], [[2, 6], [2, 7, 1, 8], [3]]), PromptGroup([1, 6], [[1, 8, 0], [3]]))
LINEAR_HEADS: WeakSet[PreTrainedModel] = WeakSet()  # networks whose logits are those of `lm_head.LMHead`
# Tokens per pass of networks for which those that were asked for had no memory.
FITTING: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
WARNED: WeakSet[PreTrainedModel] = WeakSet()  # networks whose window was reported as too short


def completion_logp(
    network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str, router: RouterLoss | None = None
) -> tuple[Tensor, Tensor]:
    """Return each response's summed log-prob given its prompt, and how many of its tokens greedy decoding would give.

    Both are fp32 [N], over the responses of one group after the other, and of their tokens that count. The head runs
    on response positions only, if it is a linear layer; the softmax is in fp32 whatever the network runs in. `router`
    takes in the router logits of all tokens.
    """
    if network in LINEAR_HEADS:
        states, tokens = hidden_states(network, groups, dtype, last=router is not None, router=router)
        predictors = states.index_select(0, tokens.predictors)  # whose gradients add up in a fixed order
        logp, is_correct = token_logp(predictors.to(getattr(torch, dtype)), lm_head_of(network), tokens.targets)
    else:
        logits, tokens, positions = _full_logits(network, groups, dtype, router)
        logits = logits[positions].float()
        logp = -cross_entropy(logits, tokens.targets, reduction="none")
        is_correct = logits.argmax(-1) == tokens.targets
    return _response_sums(logp, tokens)[tokens.rows], _response_sums(is_correct.float(), tokens)[tokens.rows]


def logp_of(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
    """Return the log-probs of `completion_logp` alone, for `forward_rows`."""
    return completion_logp(network, groups, dtype)[0]


def completion_scores(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
    """Return the reward model's score of each response to its prompt, fp32 [N], with gradient.

    Read at each response's own last token, which transformers would guess from the pad token's id. The head is
    in fp32 whatever the network runs in: bfloat16 would round a score of 10 to 1/16.
    """
    states, tokens = hidden_states(network, groups, dtype, last=True)
    return network.score(states[_last_positions(tokens)].float()).squeeze(-1)[tokens.rows]


def next_logits(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
    """Return logits of the token after each response, fp32 [N, V]."""
    if network in LINEAR_HEADS:
        states, tokens = hidden_states(network, groups, dtype, last=True)
        logits = lm_head_of(network).logits(states[_last_positions(tokens)].to(getattr(torch, dtype)))
    else:
        _check_no_encoder(network)
        all_logits, tokens, _ = _full_logits(network, groups, dtype)
        logits = all_logits[_last_positions(tokens)].float()
    return logits[tokens.rows]


def response_means(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
    """Return the mean of the last hidden states over each response's tokens that count, fp32 [N, hidden]."""
    states, tokens = hidden_states(network, groups, dtype, last=True)
    lengths = tokens.lengths
    if tokens.counted is not None:
        lengths = _response_sums(torch.ones_like(tokens.counted, dtype=torch.float32), tokens)
    return (_response_sums(states[tokens.positions].float(), tokens) / lengths[:, None])[tokens.rows]


def hidden_states(
    network: PreTrainedModel,
    groups: Sequence[PromptGroup],
    dtype: str,
    last: bool = False,
    router: RouterLoss | None = None,
) -> tuple[Tensor, PackedTokens]:
    """Return last hidden states [positions, hidden], and which token each belongs to.

    last: include those of each response's last token (see `pack`).
    """
    _check_no_encoder(network)
    shared_prefix = uses_shared_prefix(network, groups)
    tokens = pack(groups, network.device, last=last) if shared_prefix else pad(groups, network.device)
    options = {}
    if tokens.layout is not None:
        # A mask of four dimensions, so that transformers builds none of its own.
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=network.device)
        options = {"layout": tokens.layout, "attention_mask": no_mask}
    with autocast(dtype, network.device):
        outputs = network.base_model(input_ids=tokens.ids, position_ids=tokens.position_ids, use_cache=False, **options)
    if router is not None:
        router.add(outputs.router_logits, tokens.weights.float())
    return outputs.last_hidden_state.flatten(0, 1), tokens


def _full_logits(
    network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str, router: RouterLoss | None = None
) -> tuple[Tensor, PackedTokens, Tensor]:
    """Return the network's own logits at all positions [positions, V], tokens, and positions that predict responses.

    Whatever it does between states and logits; padding included.
    """
    tokens, device = pad(groups, network.device), network.device
    inputs, predictors = {"input_ids": tokens.ids}, tokens.predictors
    if network.config.is_encoder_decoder:
        # Each response's prompt is encoded, and the response, shifted by one, is decoded.
        start = network.config.decoder_start_token_id
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        prompts = [torch.tensor(prompt, device=device) for prompt, _ in rows]
        shifted = [torch.tensor([start, *response[:-1]], device=device) for _, response in rows]
        inputs = {
            "input_ids": pad_sequence(prompts, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True),
            "decoder_input_ids": pad_sequence(shifted, batch_first=True),
        }
        in_response = pad_sequence([torch.ones_like(ids) for ids in shifted], batch_first=True)
        predictors = in_response.flatten().nonzero()[:, 0]
    with autocast(dtype, device):
        outputs = network(**inputs, use_cache=False)
    if router is not None:
        router.add(outputs.router_logits, tokens.weights.float())
    return outputs.logits.flatten(0, 1), tokens, predictors


def _check_no_encoder(network: PreTrainedModel) -> None:
    if network.config.is_encoder_decoder:
        raise WinnowError(f"{type(network).__name__} is an encoder-decoder: it gives log-probs, and nothing else")


def _response_sums(values: Tensor, tokens: PackedTokens) -> Tensor:
    """Return [S, ...], the sum over those tokens of each different response that count."""
    if tokens.counted is not None:
        values = values.masked_fill(~tokens.counted.view(-1, *[1] * (values.dim() - 1)), 0.0)
    return torch.segment_reduce(values, "sum", lengths=tokens.lengths)


def _last_positions(tokens: PackedTokens) -> Tensor:
    return tokens.positions[tokens.lengths.cumsum(0) - 1]


def uses_shared_prefix(network: PreTrainedModel, groups: Sequence[PromptGroup] = ()) -> bool:
    """Return whether `network` computes a prompt once for all of its responses.

    It does not where a row is longer than its attention window.
    """
    if network.config._attn_implementation != NAME:
        return False
    config = network.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min([size for size in windows if size], default=1 << 60)  # how far back every layer attends
    longest = max(map(longest_row, groups), default=0)
    if longest > window and network not in WARNED:
        WARNED.add(network)
        _warn_of_padded_rows(network, f" where they are longer than its window of {window} tokens")
    return longest <= window


def run_alone(forward: Callable[[], Tensor]) -> Tensor:
    """Call a forward pass of a network that one process has."""
    return forward()


@torch.no_grad()
def share_prefixes(network: PreTrainedModel, dtype: str = "float32", run: Run = run_alone) -> None:
    """Let `network` compute a prompt once for all of its responses from now on, if a trial gives the same numbers.

    The trial is in fp32, whose tolerance is the smallest; on a GPU another one is in `dtype`, since each precision has
    its own kernels there.

    A trial, for a list of architectures would be outdated with every release of transformers. A network whose attention
    has a state, a bias or a cap of its own fails it; it goes on with padded rows, and a warning says so. If its head is
    more than a linear layer, its own logits are taken, too.
    """
    before = network.config._attn_implementation
    try:
        if network.config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder")
        expected = trial(network, run=run)
        if network.get_output_embeddings() is not None:
            LINEAR_HEADS.add(network)
            _check_close(trial(network, run=run), expected)
    except Exception as error:  # a model's code may raise anything on what it does not know
        LINEAR_HEADS.discard(network)
        return _warn_of_padded_rows(network, f", for {_reason(error)}")
    try:
        network.set_attn_implementation(NAME)
        if network.config._attn_implementation != NAME:
            raise ValueError("its attention is not transformers' interface")
        _check_close(trial(network, run=run), expected)
        if dtype != "float32" and network.device != CPU:
            _check_close(trial(network, dtype, run), expected, dtype)
    except Exception as error:
        network.set_attn_implementation(before)
        _warn_of_padded_rows(network, f", for {_reason(error)}")


@torch.no_grad()
def check_router_loss(network: PreTrainedModel) -> None:
    """Raise WinnowError for a network whose config asks for a router's loss, unless ours is transformers' own.

    Compared on a trial: other kinds of networks have other losses, and attributes of other names.
    """
    if not has_router_loss(network):
        return
    rows = [[*group.prompt, *response] for group in TRIAL for response in group.responses]
    ids = pad_sequence([torch.tensor(row, device=network.device) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long, device=network.device) for row in rows], True)
    try:
        expected = float(network(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss)
        router = RouterLoss(network)
        for router.counting in (True, False):
            completion_logp(network, TRIAL, "float32", router)
        value = float(router.take())
        if not abs(value - expected) <= TRIAL_TOLERANCE["float32"] * abs(expected):
            raise ValueError(f"it is {expected:.6f} on a trial, and computed here {value:.6f}")
    except Exception as error:  # a model's code may raise anything on what it does not know
        raise WinnowError(
            f"{type(network).__name__}: its config sets output_router_logits, and the loss of its routers cannot be "
            f"computed ({type(error).__name__}: {error}); set `output_router_logits: false` in config.json to train "
            "without it"
        ) from None


def trial(network: PreTrainedModel, dtype: str = "float32", run: Run = run_alone) -> list[Tensor]:
    """Return mean hidden states of some responses and, where there is a vocabulary, their log-probs."""
    means = run(lambda: response_means(network, TRIAL, dtype))
    return [means] if network.get_output_embeddings() is None else [means, run(lambda: logp_of(network, TRIAL, dtype))]


def _check_close(values: list[Tensor], expected: list[Tensor], dtype: str = "float32") -> None:
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, expected, strict=True))
    if not off <= TRIAL_TOLERANCE[dtype]:
        raise ValueError(f"a trial in {dtype} is off by {off:.1e} of the largest number")


def _reason(error: Exception) -> str:
    """Return a reason in words: our own are ValueErrors; what a model's code raises has its name before it."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _warn_of_padded_rows(network: PreTrainedModel, why: str) -> None:
    message = (
        f"{type(network).__name__} computes a prompt again for each of its responses{why}: the results are the same, "
        "and take longer"
    )
    warnings.warn(message, WinnowWarning, stacklevel=3)


@torch.no_grad()
def forward_rows(
    measure: Measure,
    network: PreTrainedModel,
    rows: Sequence[Row],
    dtype: str,
    budget: int,
    *,
    may_halve: bool = True,
) -> np.ndarray:
    """Return `measure` of any number of (prompt ids, response ids) without gradients, fp32 [N, ...], in their order.

    A row may have a mask as its third item: which of the response's ids count. budget: tokens of a pass; without memory
    for them, it is halved, and stays so for this network, unless `may_halve` is False: a training has its own way.
    """
    # Responses by prompt.
    rows_of_prompt: dict[tuple[int, ...], list[int]] = {}
    for n, (prompt, *_) in enumerate(rows):
        rows_of_prompt.setdefault(tuple(prompt), []).append(n)
    masks: list[Mask] = [row[2] if len(row) == 3 else None for row in rows]
    groups = [
        PromptGroup(prompt, [rows[n][1] for n in indices], masks=[masks[n] for n in indices])
        for prompt, indices in rows_of_prompt.items()
    ]
    indices_of_group = list(rows_of_prompt.values())
    shared_prefix = uses_shared_prefix(network, groups)

    if may_halve:
        budget = min(budget, FITTING.get(network, budget))
    while True:
        try:
            return _measure_batches(measure, network, groups, indices_of_group, dtype, budget, shared_prefix)
        except RuntimeError as error:
            if not may_halve or not is_out_of_memory(error):
                raise
        # Here the error is gone, and with its frames what the pass held.
        longest = max(map(longest_row, groups))
        if budget < longest:
            raise WinnowError(
                f"out of memory on {network.device} in a pass of one response, of {longest:,} tokens with its prompt; "
                "set `dtype: bfloat16` for this step if it is float32, lower `max_tokens`, or use a larger device"
            )
        FITTING[network] = budget = budget // 2
        release(network.device)
        message = f"out of memory with {2 * budget:,} tokens in a forward pass; it goes on with {budget:,}"
        warnings.warn(message, WinnowWarning, stacklevel=2)


def _measure_batches(
    measure: Measure,
    network: PreTrainedModel,
    groups: Sequence[PromptGroup],
    indices_of_group: Sequence[list[int]],
    dtype: str,
    budget: int,
    shared_prefix: bool,
) -> np.ndarray:
    """Return `measure` of the groups' rows, fp32, in the order of the rows' indices."""
    parts = [
        (group.part(part), [indices[m] for m in part])
        for group, indices in zip(groups, indices_of_group, strict=True)
        for part in split_responses(group, budget, shared_prefix)
    ]
    values: list[np.ndarray] = [np.empty(0)] * sum(map(len, indices_of_group))

    def store(batch: list[int], measured: Tensor) -> None:
        for row, value in zip([row for n in batch for row in parts[n][1]], measured.cpu().numpy(), strict=True):
            values[row] = value

    # Batches of parts of similar length. A GPU's numbers are fetched one batch later: it computes while the next one
    # is packed.
    waiting: tuple[list[int], Tensor] | None = None
    for batch in batch_by_tokens([group for group, _ in parts], budget, shared_prefix):
        measured = measure(network, [parts[n][0] for n in batch], dtype)
        if waiting:
            store(*waiting)
        waiting = batch, measured
    if waiting:
        store(*waiting)
    return np.array(values, dtype=np.float32)

"""Types of options that several stages share, with their bounds, which are checked when a recipe is planned."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator

from pipeline import ADDED, InputStep, Range


def _by_token_id(bias: dict[str, float]) -> dict[str, float]:
    if wrong := [token for token in bias if not token.isdecimal()]:
        raise ValueError(f"must map token ids to what is added to their logits; {wrong[0]!r} is no token id")
    return {str(int(token)): value for token, value in bias.items()}


def _above_zero(temperature: Any) -> Any:
    if isinstance(temperature, int | float) and temperature == 0:
        raise ValueError("must be greater than 0; to draw the likeliest token at every step, set `top_k: 1`")
    return temperature


Seed = Annotated[int, Range(ge=0, lt=2**32)]  # numpy, torch, scikit-learn and vLLM all take such
Count = Annotated[int, Range(gt=0, le=10**9)]  # products of two are int64
SmallCount = Annotated[int, Range(gt=0, le=10**6)]  # where memory or time grow with it
Positive = Annotated[float, Range(gt=0, lt=float("inf"))]
NotNegative = Annotated[float, Range(ge=0, lt=float("inf"))]
Share = Annotated[float, Range(ge=0, le=1)]
HeldoutShare = Annotated[float, Range(ge=0, lt=1)]  # of prompts, by hash of what users say
HeldoutShareOrAll = Annotated[float, Range(ge=0, le=1)]  # 1: all prompts of the file are for evaluations alone
ValidationShare = Annotated[HeldoutShare, ADDED]
Split = Literal["train", "heldout", "validation"]
Temperature = Annotated[float, Range(gt=0, le=2), BeforeValidator(_above_zero)]
TopP = Annotated[float, Range(gt=0, le=1)]
Penalty = Annotated[float, Range(ge=-2, le=2)]
LogitBias = Annotated[dict[str, Annotated[float, Range(ge=-100, le=100)]], AfterValidator(_by_token_id)]
Texts = list[Annotated[str, MinLen(1)]]
TokenIds = list[Annotated[int, Range(ge=0)]]
TooLong = Literal["reject", "cut"]  # what becomes of a response that is longer than max_tokens
Prefill = Literal["reject", "continue"]  # what becomes of a prompt that ends with an assistant turn
PrefillOrOmit = Literal["reject", "continue", "omit"]  # the same, where that turn may be left out
Precision = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "stochastic"]


def split_problems(
    options: Mapping[str, Any], prompts: InputStep | None, option: str = "split", cure: str = ""
) -> list[str]:
    """Return the problem of a stage that reads held-out or validation prompts of a step that holds out none.

    option: the one that names the split. cure: another one than to hold out some.

    Without it, the error would come after sampling and training.
    """
    split = options.get(option)
    if split == "train" and prompts is not None and prompts.options.get("heldout") == 1:
        return [f"{option}: train, and the step behind `prompts` holds out all (`heldout: 1.0`); set it lower"]
    if split not in ("heldout", "validation") or prompts is None or prompts.options.get(split) != 0:
        return []
    cure = f", or {cure}" if cure and split == "heldout" else ""
    return [
        f"{option}: {split}, and the step behind `prompts` holds out none (`{split}: 0.0`); set its `{split}`, such as "
        f"0.1{cure}"
    ]


def share_problems(options: Mapping[str, Any]) -> list[str]:
    """Return the problem of a data step that leaves no prompt to train on, unless that is what it is for."""
    heldout, validation = options["heldout"], options["validation"]
    if heldout + validation < 1 or (heldout, validation) == (1, 0):
        return []
    return [f"validation: {validation} beside `heldout: {heldout}` leaves no prompt to train on; set it lower"]

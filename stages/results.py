"""Checks of what registered functions return, by the stage that uses it: a wrong number would be computed with."""

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import Bound

NUMBERS = "fiu"  # kinds of numpy types whose values are real numbers


def number(
    function: Bound, value: Any, *, low: float = -np.inf, high: float = np.inf, finite: bool = True, of: str = ""
) -> float:
    """Return a number that the function returned (for `of`) as a float, True as 1.

    Raise WinnowError if it is none, lies outside of low to high, or, unless `finite` is False, is not finite.
    """
    if isinstance(value, Real | np.bool_):
        try:
            result = float(value)
        except OverflowError:  # an int beyond a float
            result = np.inf
        if not finite or (np.isfinite(result) and low <= result <= high):
            return result
    bounds = f" from {low:g} to {high:g}" if np.isfinite([low, high]).all() else ""
    raise function.wrong_result(value, f"a {'finite ' if finite and not bounds else ''}number{bounds}", of)


def floats(
    function: Bound, value: Any, shape: tuple[int, ...], meaning: str, *, finite: bool = True
) -> NDArray[np.float64]:
    """Return numbers that the function returned as float64 of this shape, which has this meaning.

    Raise WinnowError for another shape or type, and, unless `finite` is False, for a number that is not finite.
    """
    expected = f"{'finite ' if finite else ''}numbers of shape {list(shape)}, {meaning}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of several lengths, a tensor on another device
        raise function.wrong_result(value, expected) from None
    if array.dtype.kind not in NUMBERS or array.shape != shape:
        raise function.wrong_result(array if array.ndim else value, expected)
    array = array.astype(np.float64, copy=False)
    if finite and not np.isfinite(array).all():
        raise function.wrong_result(array[~np.isfinite(array)][0], expected)
    return array

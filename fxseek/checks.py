"""Checks of the values that `SeekConfig` is given: what is wrong with each, and the remedy.

Each returns one line for each problem, and none for a good value.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import sys
from fractions import Fraction

__all__ = [
    "UNITS",
    "bounds",
    "bytes_of",
    "choice",
    "integer",
    "is_zero",
    "listing",
    "share",
    "shown",
    "weight",
]


def choice(
    name: str, value: object, accepted: tuple[str, ...], *, callable_too: bool = False
) -> list[str]:
    """A name among those accepted, the closest suggested."""
    if (callable_too and callable(value)) or (isinstance(value, str) and value in accepted):
        return []
    close = difflib.get_close_matches(value, accepted, n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    also = " or a callable" if callable_too else ""
    choices = ", ".join(repr(choice) for choice in accepted)
    return [f"{name}={shown(value)} is not accepted; {hint}use one of {choices}{also}"]


UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
}


def bytes_of(value: object) -> int | None:
    """The number of bytes that a text such as ``"20GiB"`` names; None for all else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(value), re.IGNORECASE)
    if not isinstance(value, str) or found is None:
        return None
    units = {name.lower(): size for name, size in UNITS.items()}
    size = units.get(found[2].lower())
    return None if size is None else int(Fraction(found[1]) * size)


def bounds(name: str, value: object) -> list[str]:
    """Two shares, the lower first."""
    accepted = "pass two floats (low, high) with 0 < low <= high <= 1, such as (0.01, 0.5)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return [f"{name}={shown(value)} is not a pair; {accepted}"]
    if any(not isinstance(x, numbers.Real) or isinstance(x, bool) for x in value):
        return [f"{name}={shown(value)} are not two numbers; {accepted}"]
    if not 0 < float(value[0]) <= float(value[1]) <= 1:
        return [f"{name}={shown(value)} are out of range or order; {accepted}"]
    return []


def share(name: str, value: object, examples: str) -> list[str]:
    """A number in (0, 1]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return [f"{name}={shown(value)} is not a number; pass a float in (0, 1]: {examples}"]
    if not 0 < value <= 1:  # type: ignore[operator]
        return [f"{name}={shown(value)} is outside (0, 1]; pass a share of the whole: {examples}"]
    return []


def weight(name: str, value: object) -> list[str]:
    """A finite number of 0 or more."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return [f"{name}={shown(value)} is not a number; pass a finite float that is 0 or more"]
    if not 0 <= value < math.inf or value > sys.float_info.max:  # type: ignore[operator]
        return [
            f"{name}={shown(value)} is negative or not finite; pass a finite float "
            f"that is 0 or more"
        ]
    return []


def integer(name: str, value: object, low: int, high: int | None) -> list[str]:
    """An integer from `low` to `high`."""
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return [f"{name}={shown(value)} is not an integer; pass an integer {span}"]
    number = int(value)
    if number < low or (high is not None and number > high):
        return [f"{name}={shown(value)} is out of range; pass an integer {span}"]
    return []


def is_zero(value: object) -> bool:
    """Whether a value is the number 0."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0


def shown(value: object) -> str:
    """``value`` for an error message, at most about eighty characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listing(problems: list[str], what: str = "invalid fxseek configuration") -> str:
    """The text of an error for all problems together."""
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    return f"{what}, {len(problems)} problems:\n" + "\n".join(f"  - {line}" for line in problems)

"""What ``ratio=`` may be: how many tokens of a row are kept, in each form that it takes."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fxseek.checks import share as check_share
from fxseek.checks import shown
from fxseek.errors import ConfigError

__all__ = ["Called", "Fixed", "Labelled", "Linear", "Mass", "Ratio", "problems_of", "ratio_of"]

_MASS, _LABELLED, _ARROW = "mass:", "labelled", "->"
_FORMS = (
    "0.1 trains on a tenth of the tokens, 1.0 on all of them, 'mass:0.9' on the best that hold "
    "90 % of a row's score mass, 'labelled' on those that have a label; '0.1->0.5' and a function "
    "of the step follow training"
)


class Ratio(ABC):
    """How many tokens of a row are kept. `follows_training`: not the same in all steps."""

    follows_training: ClassVar[bool] = False

    @abstractmethod
    def plain(self) -> float | str | Callable[[int], Any]:
        """As ``SeekConfig.ratio`` has it."""

    def at(self, step: int, progress: float | None) -> float | None:
        """The share of each row that a step keeps; None where the rows decide.

        `step`: how many came before; `progress`: the share of training that is done.

        Raises:
            ConfigError: there is none.
        """
        return None


@dataclass(frozen=True)
class Fixed(Ratio):
    """A share of each row's tokens, in (0, 1]."""

    share: float

    def plain(self) -> float:  # noqa: D102
        return self.share

    def at(self, step: int, progress: float | None) -> float:  # noqa: D102
        return self.share


@dataclass(frozen=True)
class Mass(Ratio):
    """As few of each row's tokens as hold a share of its score mass."""

    share: float

    def plain(self) -> str:  # noqa: D102
        return f"{_MASS}{self.share}"


@dataclass(frozen=True)
class Labelled(Ratio):
    """The positions that have a label, and no others."""

    def plain(self) -> str:  # noqa: D102
        return _LABELLED


@dataclass(frozen=True)
class Linear(Ratio):
    """A share that goes from one to another, by the same amount each step."""

    follows_training = True

    first: float
    last: float

    def plain(self) -> str:  # noqa: D102
        return f"{self.first}{_ARROW}{self.last}"

    def at(self, step: int, progress: float | None) -> float:  # noqa: D102
        if progress is None:
            raise ConfigError(
                f"ratio={self.plain()!r} needs to know over how many steps: pass ratio_steps= "
                "(calls of the model in training). For a model of fxseek.compile in a Trainer, a "
                "SeekCallback tells it"
            )
        return self.first * (1 - progress) + self.last * progress


@dataclass(frozen=True)
class Called(Ratio):
    """A share that a function of the step returns."""

    follows_training = True

    function: Callable[[int], Any]

    def plain(self) -> Callable[[int], Any]:  # noqa: D102
        return self.function

    def at(self, step: int, progress: float | None) -> float:  # noqa: D102
        try:
            share = self.function(step)
        except Exception as error:
            raise ConfigError(
                f"ratio= is a function that raised {type(error).__name__} for step {step}: {error}"
            ) from error
        if check_share("ratio", share, ""):
            raise ConfigError(
                f"ratio= is a function that returned {shown(share)} for step {step}; it must "
                "return a float in (0, 1], such as 0.1"
            )
        return float(share)


def ratio_of(value: object) -> Ratio | None:
    """What a ratio says; None where it is none."""
    if isinstance(value, str):
        return _named(value)
    if callable(value) and not isinstance(value, (type, nn.Module)):
        return Called(value)
    share = _share(value)
    return None if share is None else Fixed(share)


def _named(text: str) -> Ratio | None:
    if text == _LABELLED:
        return Labelled()
    if text.startswith(_MASS):
        share = _share(text.removeprefix(_MASS))
        return None if share is None else Mass(share)
    first, arrow, last = (part.strip() for part in text.partition(_ARROW))
    ends = _share(first), _share(last)
    if not arrow or ends[0] is None or ends[1] is None:
        return None
    return Linear(ends[0], ends[1])


def _share(value: object) -> float | None:
    """A number in (0, 1], or the text of one."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        return None
    if "_" in str(value):  # which Python takes in numbers
        return None
    try:
        share = float(value)
    except (ValueError, OverflowError):
        return None
    return share if math.isfinite(share) and 0 < share <= 1 else None


def problems_of(value: object) -> list[str]:
    """One line where ``ratio=`` is no ratio, with what was meant; else none."""
    if ratio_of(value) is not None:
        return []
    if not isinstance(value, str):
        return check_share("ratio", value, _FORMS)
    text = value.strip().lower()
    number = text.rpartition(":")[2].strip()
    meant = f"{_MASS}{number}" if text.startswith("mass") else text
    hint = ""
    if text.startswith("label"):
        hint = f"did you mean {_LABELLED!r}? "
    elif isinstance(_named(meant), (Mass, Linear)):
        hint = f"did you mean {meant!r}? "
    elif _share(number) is not None:
        hint = f"did you mean the number {number}? "
    return [
        f"ratio={shown(value)} is not accepted; {hint}pass a float in (0, 1], or one of the other "
        f"forms: {_FORMS}"
    ]

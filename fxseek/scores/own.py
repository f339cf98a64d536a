"""The caller's own score, a function of `ScoreInputs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.errors import ScoreError
from fxseek.scores.base import ScoreInputs, Scorer
from fxseek.scores.measures import wide
from fxseek.scores.tokenseek import mass

if TYPE_CHECKING:
    from fxseek.config import SeekConfig

__all__ = ["Own", "check_scores"]


class Own(Scorer):
    """What a callable returns. Whether it draws is not known, so it may."""

    reads_hidden = True
    draws = True

    def __init__(self, config: SeekConfig, function: Callable[[ScoreInputs], Any]) -> None:
        super().__init__(config)
        self.function = function

    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """The function's, checked."""
        with torch.no_grad():
            scores = self.function(given)
        return check_scores(scores, given.valid)

    def mass(self, scores: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """The scores themselves."""
        return mass(None, None, scores, valid)


@torch.no_grad()
def check_scores(scores: object, valid: Tensor) -> Tensor:
    """A score function's result as [batch, tokens] float32 or float64, or what is wrong with it.

    Integers and booleans are converted, to float64 where the device has it. ``-inf`` ranks a token
    below all others; NaN and ``+inf`` are refused. Only valid positions are judged, the others
    become ``-inf``. The result is on the device of `valid`.

    Waits for the device once.

    Raises:
        ScoreError: not a tensor, not real numbers, another shape, NaN or ``+inf``.
    """
    batch, tokens = valid.shape
    if not isinstance(scores, Tensor):
        raise ScoreError(
            f"the score function returned {type(scores).__name__}; expected a float tensor of "
            f"shape [batch, tokens] = [{batch}, {tokens}]. Return one score per token as a "
            f"torch.Tensor."
        )
    if scores.is_complex():
        raise ScoreError(
            f"the score function returned {scores.dtype}; complex scores have no order. Return "
            f"real ones, such as scores.abs()."
        )
    if tuple(scores.shape) != (batch, tokens):
        raise ScoreError(
            f"the score function returned shape {list(scores.shape)}; expected [batch, tokens] = "
            f"[{batch}, {tokens}]. {_shape_remedy(tuple(scores.shape), batch, tokens)}"
        )
    dtype = wide(scores) if scores.is_floating_point() else _torch.widest(valid.device)
    scores = scores.detach().to(valid.device, dtype).masked_fill(~valid, -math.inf)
    wrong = scores.isnan() | (scores == math.inf)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ScoreError(
            f"{int(scores.isnan().sum())} of {batch * tokens} scores are NaN and "
            f"{int((scores == math.inf).sum())} are +inf, the first at row {row}, token {token}. "
            f"Scores must be finite, or -inf for tokens to rank last. Look for overflow in half "
            f"precision, log or division of zero, and NaN in the model's weights."
        )
    return scores


def _shape_remedy(shape: tuple[int, ...], batch: int, tokens: int) -> str:
    if shape[:2] == (batch, tokens):
        return "Reduce the trailing dimensions, for example with .sum(-1)."
    if shape == (tokens, batch):
        return "Transpose it with .mT."
    if shape == (tokens,):
        return "Give every row its scores, for example with .expand(batch, -1)."
    if shape == (batch, tokens - 1):
        return (
            "The targets in ScoreInputs are shifted already and as long as the input: don't shift "
            "again."
        )
    return "Return one score per token of the input, padding included."

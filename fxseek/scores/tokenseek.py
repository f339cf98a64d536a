"""The paper's scores: context, gradient, and the two combined.

Source: TokenSeek (arXiv 2601.19739), section 3: ``I = alpha log I1 + beta minmax I2``, where
``I1`` is the attention that a token receives in the last layer and ``I2`` the magnitude of the
gradient of the loss at the input of the last block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxseek.errors import ScoreError
from fxseek.scores.base import ScoreInputs, Scorer, scorer
from fxseek.scores.measures import wide

__all__ = ["NORMALISATIONS", "combine", "mass"]


@scorer("tokenseek")
class TokenSeek(Scorer):
    """``alpha · log(context) + beta · minmax(gradient)``, or both on another scale."""

    parts = ("context", "gradient")

    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """The combined score, or that of the one part that there is."""
        valid, config = given.valid, self.config
        context, gradient = parts.get("context"), parts.get("gradient")
        scores = combine(context, gradient, valid, config.alpha, config.beta, config.normalise)
        bad = torch.zeros_like(valid)
        for found in (scores, *parts.values()):  # ranks are finite where the parts are not
            bad |= ~torch.isfinite(found.masked_fill(~valid, 0.0))
        if bool(bad.any()):
            raise ScoreError(_not_finite(bad, parts, valid))
        return scores

    def mass(self, scores: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """See `mass`."""
        return mass(parts.get("context"), parts.get("gradient"), scores, valid)


@scorer("context")
class Context(TokenSeek):
    """The attention that a token receives in the last layer. No backward pass."""

    parts = ("context",)


@scorer("gradient")
class Gradient(TokenSeek):
    """The magnitude of the gradient of the loss at the input of the last block."""

    parts = ("gradient",)


_MEASURED = {"context": "attention (context)", "gradient": "loss gradient"}


def _not_finite(bad: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> str:
    wrong = [
        _MEASURED[name]
        for name, part in parts.items()
        if not bool(torch.isfinite(part.masked_fill(~valid, 0.0)).all())
    ]
    row, position = (int(x) for x in bad.nonzero()[0])
    return (
        f"token scores are not finite: {int(bad.sum())} of {bad.numel()} positions, first at row "
        f"{row}, position {position}; the {' and the '.join(wrong) or 'combination'} holds NaN or "
        "infinity. The model's activations or loss overflowed: look at the loss, lower the "
        "learning rate, or compute in bfloat16 or float32 instead of float16."
    )


@torch.no_grad()
def combine(
    context: Tensor | None,
    gradient: Tensor | None,
    valid: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalise: str = "minmax",
) -> Tensor:
    """``I = alpha · log(I1) + beta · minmax(I2)``, row by row over the valid tokens.

    With `normalise` ``"rank"`` or ``"zscore"`` both ``log(I1)`` and ``I2`` are put on that scale:
    ranks from 0 to 1 (equal values have the lowest of their ranks), or mean 0 and deviation 1.
    ``minmax`` maps a row's valid values onto [0, 1]. A row whose values are all equal becomes 0 on
    each of these scales. Either part may be None; the other then counts by itself, and its factor,
    which can't change the order, is left out. An ``I1`` of zero counts as the smallest normal
    number of its dtype. Invalid positions score ``-inf``, whatever they hold.

    Shapes: context, gradient, valid [batch, tokens] -> [batch, tokens], float32 or float64.
    """
    if context is not None and gradient is not None:
        of_context, of_gradient = NORMALISATIONS[normalise]
        total = alpha * of_context(_log(context), valid) + beta * of_gradient(gradient, valid)
    elif context is not None:
        total = _log(context)
    else:
        assert gradient is not None
        total = _minmax(gradient, valid)
    return total.masked_fill(~valid, -math.inf)


def _log(values: Tensor) -> Tensor:
    dtype = wide(values)
    return values.to(dtype).clamp_min(torch.finfo(dtype).tiny).log()


def _minmax(values: Tensor, valid: Tensor) -> Tensor:
    values = values.to(wide(values))
    lowest = values.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
    highest = values.masked_fill(~valid, -math.inf).amax(-1, keepdim=True)
    span = highest - lowest
    return ((values - lowest) / span).masked_fill(span <= 0, 0.0)


def _rank(values: Tensor, valid: Tensor) -> Tensor:
    values = values.to(wide(values)).masked_fill(~valid, math.inf)
    lower = torch.searchsorted(values.sort(-1).values, values)
    return lower.to(values.dtype) / (valid.sum(-1, keepdim=True) - 1).clamp_min(1)


def _zscore(values: Tensor, valid: Tensor) -> Tensor:
    values = values.to(wide(values)).masked_fill(~valid, 0.0)
    values = values / values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    centred = values - values.sum(-1, keepdim=True) / count
    deviation = (centred.masked_fill(~valid, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    # a row of equal values deviates from its mean by rounding alone
    return (centred / deviation).masked_fill(deviation <= 1e-6, 0.0)


def _as_it_is(values: Tensor, valid: Tensor) -> Tensor:
    return values


_Scale = Callable[[Tensor, Tensor], Tensor]

NORMALISATIONS: dict[str, tuple[_Scale, _Scale]] = {
    "minmax": (_as_it_is, _minmax),
    "rank": (_rank, _rank),
    "zscore": (_zscore, _zscore),
}
"""What the logarithm of the context and the gradient are put through before they are added up."""


@torch.no_grad()
def mass(context: Tensor | None, gradient: Tensor | None, scores: Tensor, valid: Tensor) -> Tensor:
    """What ``select="sample"`` draws by, and what a ratio such as ``"mass:0.9"`` adds up.

    Nonnegative, and never less where the score is better.

    With context and gradient it is ``exp(I - max I)`` of the combined ``scores``; with one of
    them it is that one itself (negative values of the signed gradient sum count as 0); with
    neither, the caller's own ``scores``, where ``-inf`` counts as 0. Invalid positions have mass
    0.

    Only the last case waits for the device, to refuse negative scores.

    Shapes: all [batch, tokens] -> [batch, tokens], float32 or float64.

    Raises:
        ScoreError: the caller's own scores are negative. Return nonnegative ones (``exp`` keeps
            their order), or use ``select="topk"`` and a number as ratio.
    """
    if context is not None and gradient is not None:
        scores = scores.to(wide(scores)).masked_fill(~valid, -math.inf)
        highest = scores.amax(-1, keepdim=True)
        drawn_by = (scores - highest.clamp_min(torch.finfo(scores.dtype).min)).exp()
    elif (part := gradient if context is None else context) is not None:
        drawn_by = part.to(wide(part)).clamp_min(0.0)
    else:
        drawn_by = scores.to(wide(scores))
        drawn_by = drawn_by.masked_fill(drawn_by == -math.inf, 0.0)
        negative = (drawn_by < 0) & valid
        if bool(negative.any()):
            row, token = negative.nonzero()[0].tolist()
            raise ScoreError(
                f"select='sample' and ratio='mass:...' weigh tokens by their scores, so they can't "
                f"be negative: {int(negative.sum())} of {int(valid.sum())} are, the first "
                f"{float(drawn_by[row, token]):.6g} at row {row}, token {token}. Return "
                f"nonnegative scores (scores.exp() keeps their order), or use select='topk' "
                f"and a number as ratio, such as 0.1."
            )
    return drawn_by.masked_fill(~valid, 0.0)

"""The loss of a selection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Scratch",
    "cross_entropy_parts",
    "cross_entropy_slope",
    "mean_of_parts",
    "selected_cross_entropy",
]


def cross_entropy_parts(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy over kept positions that have a label, and their number.

    Shapes: logits and target of the kept positions, as `F.cross_entropy` takes them; weights
    [batch, kept], 0 where padding fills a row up (its label does not count) → two scalars. Sums
    of several chunks of positions add up.
    """
    target = target.masked_fill(weights.reshape(target.shape) == 0, ignore_index)
    losses = F.cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    weighted = losses * weights.reshape(losses.shape).to(losses.dtype)
    return weighted.sum(), (target != ignore_index).sum()


class Scratch:
    """Memory that chunks use one after the other: the host would map new pages for each."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape, of any values, in the place of the one before."""
        memory, count = self.memory, x.numel()
        if memory is None or memory.numel() < count or memory.dtype != dtype:
            self.memory = memory = x.new_empty(count, dtype=dtype)
        return memory[:count].view(x.shape)


def cross_entropy_slope(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """∂ sum of the cross-entropies / ∂ logits, and that sum, for weights of 0 and 1.

    In two tensors of the logits' size, these among them, and two passes less than autograd takes.
    The slope may lie in `scratch`, until that is asked again.

    Shapes: as `cross_entropy_parts` has them → the logits' shape, scalar.
    """
    classes = 1 if logits.dim() > 1 else 0
    without = (target == ignore_index) | (weights.reshape(target.shape) == 0)
    index = target.masked_fill(without, 0).long().unsqueeze(classes)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = None if scratch is None else scratch.like(logits, dtype)
    slope = torch.log_softmax(logits, classes, dtype=dtype, out=out)
    losses = slope.gather(classes, index).squeeze(classes).neg_()
    if label_smoothing:
        spread = slope.mean(classes).mul_(label_smoothing)
        losses = losses.mul_(1 - label_smoothing).sub_(spread)
    total = losses.masked_fill_(without, 0.0).sum()
    slope.exp_()
    if label_smoothing:
        slope.sub_(label_smoothing / logits.shape[classes])
    one = torch.full_like(index, label_smoothing - 1, dtype=dtype)
    slope.scatter_add_(classes, index, one).masked_fill_(without.unsqueeze(classes), 0.0)
    return slope.to(logits.dtype), total


def mean_of_parts(
    total: Tensor,
    labelled: Tensor,
    full_target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The loss of a selection from what `cross_entropy_parts` gives, in nats.

    With ``reduction="sum"`` the mean is multiplied by the number of labels in `full_target`,
    so that a caller who divides by a count of labels over several batches gets the gradient
    of the selected mean. No labelled position gives 0 with gradients of 0, never NaN.
    """
    mean = total / labelled.clamp(min=1)
    if reduction == "sum":
        return mean * (full_target != ignore_index).sum()
    return mean


def selected_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    full_target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted mean of the cross-entropy over kept positions that have a label, in nats.

    Shapes: as `cross_entropy_parts` has them; full_target the targets of all positions → scalar.
    `reduction`: see `mean_of_parts`.
    """
    total, labelled = cross_entropy_parts(
        logits, target, weights, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return mean_of_parts(
        total, labelled, full_target, reduction=reduction, ignore_index=ignore_index
    )

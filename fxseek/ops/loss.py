"""The loss of a selection.

A token loss is ``Σ scale_i · ce_i``, divided by its *mass* where it is a mean. The mass of a
position is what it counts for in the mean: the class weight of its label (1 without class weights,
0 without a label; 1 where targets are probabilities) times the magnitude of its scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxseek import _torch

__all__ = [
    "Scratch",
    "cross_entropy_parts",
    "cross_entropy_slope",
    "divisor",
    "mass_of",
    "mean_of_parts",
    "scaled_cross_entropy",
    "selected_cross_entropy",
]


def scaled_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "sum",
    label_smoothing: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    """``(scale * F.cross_entropy(..., reduction="none")).sum()``; no term where the scale is 0.

    Shapes: as `F.cross_entropy` has them; scale as its result without a reduction → scalar.
    """
    losses = F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return _scaled(losses, scale).sum()


def _scaled(losses: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return losses
    scale = scale.reshape(losses.shape)
    return (losses * scale).masked_fill(scale == 0, 0.0)


def mass_of(
    target: Tensor | int,
    class_weights: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> Tensor | int:
    """The mass of all positions, a scalar.

    Shapes: target and scale of one shape; for probabilities, `target` is the number of positions.
    """
    if not isinstance(target, Tensor):
        return target if scale is None else scale.abs().sum()
    return _masses(target != ignore_index, target, class_weights, scale).sum()


def _masses(
    counts: Tensor, target: Tensor | None, class_weights: Tensor | None, scale: Tensor | None
) -> Tensor:
    """What each position counts for: Bool, or of the dtype of class weights or scale."""
    masses = counts
    if class_weights is not None and target is not None:
        own = class_weights[target.masked_fill(~counts, 0).long()]
        masses = own.masked_fill(~counts, 0.0)
    return masses if scale is None else masses * scale.reshape(masses.shape).abs()


def cross_entropy_parts(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    class_weights: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy over kept positions that have a label, and their mass.

    Without class weights and scale, the mass is the number of these positions: a sample's weights
    are made for it. With them it is the weighted sum of what the positions count for, as an
    estimate of what all count for.

    Shapes: logits and target of the kept positions, as `F.cross_entropy` takes them; weights
    [batch, kept], 0 where padding fills a row up (its label does not count); class_weights
    [classes]; scale one for each kept position → two scalars. Sums of several chunks of positions
    add up.
    """
    total, mass, _ = _parts(
        logits, target, weights, class_weights, scale, ignore_index, label_smoothing
    )
    return total, mass


def _parts(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    class_weights: Tensor | None,
    scale: Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, torch.dtype]:
    """`cross_entropy_parts`, and the dtype of the loss; sums of float16 are in float32."""
    indices = not target.is_floating_point()
    if indices:
        target = target.masked_fill(weights.reshape(target.shape) == 0, ignore_index)
    losses = F.cross_entropy(
        logits,
        target,
        class_weights,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    share = weights.reshape(losses.shape)
    counts = target != ignore_index if indices else share != 0
    if not indices:
        losses = losses.masked_fill(~counts, 0.0)
    masses = _masses(counts, target if indices else None, class_weights, scale)
    share = share.to(torch.float32 if losses.dtype == torch.float16 else losses.dtype)
    if masses is not counts:
        masses = masses * share
    return (_scaled(losses, scale) * share).sum(), masses.sum(), losses.dtype


class Scratch:
    """Memory that chunks use one after the other: the host would map new pages for each."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def empty(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any values, in the place of the one before, on the device of `x`."""
        memory, count = self.memory, math.prod(shape)
        if memory is None or memory.numel() < count or memory.dtype != dtype:
            self.memory = memory = x.new_empty(count, dtype=dtype)
        return memory[:count].view(shape)

    def leave_to(self, tensors: Iterable[Tensor]) -> None:
        """Use other memory from now on, where one of these lies in it."""
        if self.memory is not None:
            own = _torch.storage_key(self.memory)
            if any(_torch.storage_key(x) == own for x in tensors):
                self.memory = None


def cross_entropy_slope(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scratch: Scratch | None = None,
    weighted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂ weighted sum of the cross-entropies / ∂ logits, that sum, and the number of labels.

    Uses two tensors of the logits' size in float32 or better, the logits among them, and, where no
    weight is other than 0 and 1 (not `weighted`), two passes fewer than autograd. The result may
    lie in `scratch`, until that is asked again.

    Shapes: as `cross_entropy_parts` has them → the logits' shape, two scalars.
    """
    classes = 1 if logits.dim() > 1 else 0
    share = weights.reshape(target.shape)
    without = (target == ignore_index) | (share == 0)
    index = target.masked_fill(without, 0).long().unsqueeze(classes)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = None if scratch is None else scratch.empty(logits, logits.shape, dtype)
    slope = torch.log_softmax(logits, classes, dtype=dtype, out=out)
    losses = slope.gather(classes, index).squeeze(classes).neg_()
    if label_smoothing:
        spread = slope.mean(classes).mul_(label_smoothing)
        losses = losses.mul_(1 - label_smoothing).sub_(spread)
    share = share.to(dtype)
    total = losses.masked_fill_(without, 0.0).mul_(share).sum()
    slope.exp_()
    if label_smoothing:
        slope.sub_(label_smoothing / logits.shape[classes])
    one = torch.full_like(index, label_smoothing - 1, dtype=dtype)
    slope.scatter_add_(classes, index, one)
    if weighted:
        slope.mul_(share.unsqueeze(classes))
    slope.masked_fill_(without.unsqueeze(classes), 0.0)
    return slope.to(logits.dtype), total, (~without).sum()


def mean_of_parts(total: Tensor, mass: Tensor, full_mass: Tensor | int | None = None) -> Tensor:
    """The loss of a selection from what `cross_entropy_parts` gives, in nats.

    A loss that is a sum over tokens gets the `full_mass` of all of them, by which the mean is
    multiplied: a caller who divides by a count of labels (over several batches, say) gets the
    gradient of the selected mean. No labelled position gives 0 with gradients of 0, never NaN.
    """
    mean = total / divisor(mass)
    return mean if full_mass is None else mean * full_mass


def divisor(mass: Tensor) -> Tensor:
    """A mass to divide by: 1 in the place of 0."""
    return mass.masked_fill(mass == 0, 1)


def selected_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    class_weights: Tensor | None,
    scale: Tensor | None,
    full_target: Tensor | int,
    full_scale: Tensor | None,
    *,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """Weighted mean of the cross-entropy over kept positions that have a label, in nats.

    Shapes: as `cross_entropy_parts` has them, and its options; full_target and full_scale those of
    all positions, as `mass_of` takes them → scalar. `reduction`: ``"sum"`` multiplies the mean by
    the mass of all positions.
    """
    total, mass, dtype = _parts(logits, target, weights, class_weights, scale, **options)
    if reduction != "sum":
        return mean_of_parts(total, mass).to(dtype)
    ignored = options.get("ignore_index", -100)
    full_mass = mass_of(full_target, class_weights, full_scale, ignore_index=ignored)
    return mean_of_parts(total, mass, full_mass).to(dtype)

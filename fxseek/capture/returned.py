"""The loss of a caller's `loss=`: what it may be, and its place in the model's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxseek.errors import InputError

__all__ = ["scalar_of", "with_loss"]


def scalar_of(loss: Any) -> Tensor:
    """What `loss=` returned, without dimensions, if it can be trained on.

    Raises:
        InputError: it can't.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(()) if loss.dim() else loss
    found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise InputError(
        f"loss= must return a tensor with one element, the loss to train on; it returned {found}"
    )


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """The model's output with the loss in it: as ``["loss"]`` of a mapping, else first."""
    if isinstance(outputs, dict):
        outputs["loss"] = loss
        return outputs
    if isinstance(outputs, tuple):
        return (loss, *outputs)
    return loss, outputs

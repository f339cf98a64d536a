"""What a forward changes of a model, put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["state_of"]


def state_of(model: nn.Module) -> Callable[[], None]:
    """Keeps what a forward may change: the model's buffers, and the numbers in its attributes.

    The result puts back those that have changed, or that the forward has bound to another value.
    """
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    bound = [
        (module, dict(module._buffers), {k: v for k, v in vars(module).items() if _is_number(v)})
        for module in model.modules()
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, buffers, attributes in bound:
            module._buffers.update(buffers)
            vars(module).update(attributes)
        for buffer, before in values:
            if not torch.equal(buffer, before):
                buffer.copy_(before)

    return restore


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float)

"""Masked full backprop of any eager code: a mode that marks the result of every operation.

Gradient passes the result of an operation at selected tokens alone. A hook does that, so that the
result stays the tensor it was: views stay views, and writes in place are seen by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from graphs import node_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

IGNORED = -100


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Marked(TorchFunctionMode):
    """In it, results of the selected tokens `kept` ([batch, kept]) alone pass gradient.

    `tokens` and the batch must differ from all other sizes.
    """

    def __init__(self, kept: Tensor, tokens: int) -> None:
        super().__init__()
        self.mask = node_mask(kept, tokens)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._mark(args[0] if func is Tensor.__setitem__ else result)
        return result

    def _mark(self, value: Any) -> None:
        for tensor in _tensors(value):
            passes = self.mask(tensor) if tensor.grad_fn is not None else None
            if passes is not None:
                tensor.register_hook(lambda slope, passes=passes: slope * passes)


def masked_gradients(
    module: nn.Module,
    logits_of: Callable[[], Tensor],
    targets: Tensor,
    kept: Tensor,
    weights: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the weighted mean over selected positions that have a label."""
    batch, tokens = targets.shape
    weight = torch.zeros(batch, tokens, dtype=torch.float64)
    weight.scatter_(1, kept, weights.to(torch.float64))
    chosen = torch.zeros(batch, tokens).bool().scatter_(1, kept, True)
    with Marked(kept, tokens):
        logits = logits_of()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weight
    loss = losses.sum() / (chosen & (targets != IGNORED)).sum().clamp(min=1)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(
        loss, [p for _, p in named], allow_unused=True, materialize_grads=True
    )
    return loss.detach(), {name: g for (name, _), g in zip(named, found, strict=True)}


__all__ = ["IGNORED", "Marked", "masked_gradients"]

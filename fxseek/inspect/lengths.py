"""How many rows and tokens a batch has, and what of it belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxseek.errors import InputError

__all__ = ["IGNORED", "Lengths", "field_of", "labels_of", "lengths_of", "logits_of", "selected_of"]


IGNORED = -100
"""The label of a position that has none."""


class Lengths(NamedTuple):
    """Rows of a batch, and tokens of a row."""

    batch: int
    tokens: int


def lengths_of(batch: Mapping[str, Any], kept: Tensor) -> Lengths:
    """How many rows and tokens ``batch`` has, from its ids, embeddings, labels or first tensor."""
    if not isinstance(kept, Tensor) or kept.ndim != 2 or kept.is_floating_point():
        shown = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
        raise InputError(f"kept must be a LongTensor [batch, kept] of positions, got {shown}")
    first = ("input_ids", "inputs_embeds", "labels")
    for name in [*first, *(name for name in batch if name not in first)]:
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim >= 2:
            sizes = Lengths(*value.shape[:2])
            if kept.shape[0] != sizes.batch:
                raise InputError(
                    f"kept has {kept.shape[0]} rows and {name} has {sizes.batch}; pass one row of "
                    f"positions for each row of the batch"
                )
            return sizes
    raise InputError(
        f"no tensor [batch, tokens, ...] among the inputs ({', '.join(batch) or 'none given'}); "
        f"pass input_ids or inputs_embeds"
    )


def selected_of(kept: Tensor, sizes: Lengths) -> Tensor:
    """``kept`` as a mask, bool ``[batch, tokens]``."""
    used = kept >= 0
    if kept.numel() and (kept.min() < -1 or kept.max() >= sizes.tokens):
        raise InputError(
            f"kept holds positions from {kept.min().item()} to {kept.max().item()}; rows have "
            f"{sizes.tokens} tokens, so pass 0 to {sizes.tokens - 1}, or -1 for an unused slot"
        )
    selected = torch.zeros(sizes, dtype=torch.long, device=kept.device)
    selected.scatter_add_(1, kept.long().clamp(min=0), used.long())
    if (selected > 1).any():
        row, position = (selected > 1).nonzero()[0].tolist()
        raise InputError(
            f"kept holds position {position} of row {row} more than once; "
            f"pass each position once, and -1 for an unused slot"
        )
    return selected.bool()


def labels_of(batch: Mapping[str, Any], sizes: Lengths, virtual: int = 0) -> Tensor:
    """Labels [batch, tokens] of a batch, with none for virtual tokens in front."""
    labels = batch.get("labels")
    wanted = (sizes.batch, sizes.tokens - virtual)
    if not isinstance(labels, Tensor) or tuple(labels.shape) != wanted:
        shown = tuple(labels.shape) if isinstance(labels, Tensor) else labels
        raise InputError(
            f"labels={shown!r}, but masked full backprop needs one label for each token, "
            f"{wanted} of them; pass labels, or loss=loss(outputs, batch)"
        )
    return nn.functional.pad(labels, (virtual, 0), value=IGNORED)


def logits_of(outputs: Any, sizes: Lengths) -> Tensor:
    """The logits [batch, tokens, classes] of a model's output."""
    logits = field_of(outputs, "logits")
    if not isinstance(logits, Tensor) or logits.ndim != 3 or tuple(logits.shape[:2]) != sizes:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else logits
        raise InputError(
            f"the model's output ({type(outputs).__name__}) has logits {shown!r}, not "
            f"[{sizes.batch}, {sizes.tokens}, vocabulary]; pass loss=loss(outputs, batch)"
        )
    return logits


def field_of(outputs: Any, name: str) -> Any:
    """A named part of a model's output, or None."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)

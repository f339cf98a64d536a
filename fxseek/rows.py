"""Gather and scatter of token rows: what the stages call at run time.

Shapes: `kept` is LongTensor[batch, kept]. `row` is the token dimension of a value, `batch` its
batch dimension (None: the batch is 1), which repeats each row of the batch `heads` times; a
`packed` value has batch × tokens in one dimension.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxseek import _torch

__all__ = ["attend_all", "attend_rows", "gather_rows", "is_causal_mask", "scatter_rows"]


def _packed_index(kept: Tensor, length: int) -> Tensor:
    batch = kept.shape[0]
    start = torch.arange(batch, device=kept.device).unsqueeze(1) * (length // batch)
    return (kept + start).reshape(-1)


def gather_rows(
    x: Tensor,
    kept: Tensor,
    row: int,
    batch: int | None = None,
    packed: bool = False,
    heads: int = 1,
) -> Tensor:
    """The selected rows of a full value: [..., tokens, ...] → [..., kept, ...].

    A batch dimension of size 1 (a value that all rows of a batch share) is expanded first.
    """
    if packed:
        return x.index_select(row, _packed_index(kept, x.shape[row]))
    if batch is None:
        return x.index_select(row, kept[0])
    kept = _repeated(kept, heads)
    rows = kept.shape[0]
    if x.shape[batch] == 1 and rows > 1:
        x = x.expand(*(rows if i == batch else -1 for i in range(x.dim())))
    moved = x.movedim((batch, row), (0, 1))
    which = torch.arange(rows, device=kept.device).unsqueeze(1)
    return moved[which, kept].movedim((0, 1), (batch, row))


def scatter_rows(
    base: Tensor,
    rows: Tensor,
    kept: Tensor,
    row: int,
    batch: int | None = None,
    packed: bool = False,
    heads: int = 1,
    filled: Tensor | None = None,
) -> Tensor:
    """A full value with its selected rows replaced; the others are constants from `base`.

    Rows that are `filled` up with positions that are not selected pass no gradient.

    Shapes: base [..., tokens, ...], rows [..., kept, ...], filled Bool [batch, kept] →
    [..., tokens, ...].
    """
    kept = _repeated(kept, heads)
    if filled is not None:
        filled = _repeated(filled, heads)
        rows = torch.where(_placed(filled, rows, row, batch, packed), rows.detach(), rows)
    if packed:
        return base.index_copy(row, _packed_index(kept, base.shape[row]), rows)
    if batch is None:
        return base.index_copy(row, kept[0], rows)
    which = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
    moved = base.movedim((batch, row), (0, 1))
    placed = moved.index_put((which, kept), rows.movedim((batch, row), (0, 1)))
    return placed.movedim((0, 1), (batch, row))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 else x.repeat_interleave(heads, 0)


def _placed(filled: Tensor, rows: Tensor, row: int, batch: int | None, packed: bool) -> Tensor:
    """[batch, kept] with its dimensions where `rows` has them."""
    shape = [1] * rows.dim()
    if packed:
        shape[row] = filled.numel()
        return filled.reshape(shape)
    shape[row] = filled.shape[1]
    if batch is None:
        return filled[0].reshape(shape)
    shape[batch] = filled.shape[0]
    return (filled if batch < row else filled.T).reshape(shape)


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    batch_dim: int | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` of selected queries over all keys.

    Shapes: query [..., kept, width]; key, value [..., keys, width]; mask broadcastable to
    [..., kept, keys]. The causal flag becomes the kept rows of the causal mask (aligned at the
    top left, as torch's own flag is).
    """
    if is_causal:
        causal = kept.unsqueeze(-1) >= torch.arange(key.shape[-2], device=key.device)
        if batch_dim is None:
            mask = causal[0]
        else:
            shape = [1] * query.dim()
            shape[batch_dim] = causal.shape[0]
            mask = causal.view(*shape[:-2], *causal.shape[-2:])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
    )


FAKE_MASKS_ARE_CAUSAL: ContextVar[bool] = ContextVar("fake_masks_are_causal", default=False)
"""Whether masks without values count as causal, as those of rows without padding are."""


def is_causal_mask(mask: Tensor) -> bool:
    """Whether a boolean mask [..., tokens, tokens] is the causal one in every entry.

    Waits for the device. A fake tensor has no values to look at: the answer is
    `FAKE_MASKS_ARE_CAUSAL`.
    """
    tokens = mask.shape[-1]
    if mask.shape[-2] != tokens:
        return False
    if _torch.is_fake(mask):
        return FAKE_MASKS_ARE_CAUSAL.get()
    if bool(mask[..., 0, 1:].any()) or not bool(mask[..., -1, :].all()):
        return False
    columns = torch.arange(tokens, device=mask.device)
    same = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, tokens, _MASK_ROWS):
        rows = mask[..., start : start + _MASK_ROWS, :]
        causal = columns <= columns[start : start + _MASK_ROWS, None]
        same &= (rows == causal).all()
    return bool(same)


_MASK_ROWS = 256
"""Rows of a mask that are compared at a time."""


def attend_all(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *, causal: bool, **options: Any
) -> Tensor:
    """`scaled_dot_product_attention` of all tokens, by the causal flag where the mask is causal."""
    if causal:
        options["is_causal"] = True
        return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

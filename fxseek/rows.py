"""Gather and scatter of token rows: what the stages call at run time.

Shapes: `kept` is LongTensor[batch, kept]. `row` is the token dimension of a value, `batch` its
batch dimension (None: the batch is 1), which repeats each row of the batch `heads` times; a
`packed` value has batch × tokens in one dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxseek.masks import MaskRows, attend, attend_in_chunks

__all__ = [
    "attend_folded",
    "attend_rows",
    "gather_rows",
    "owned",
    "put_rows_",
    "scatter_rows",
    "shared_mask",
]


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


def owned(value: Any) -> Any:
    """A value that keeps nothing but itself alive: views of larger memory are copied."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def put_rows_(
    base: Tensor,
    rows: Tensor,
    kept: Tensor,
    row: int,
    batch: int | None = None,
    packed: bool = False,
    heads: int = 1,
) -> None:
    """Write rows into a full value in place; shapes as `scatter_rows` has them. No gradient."""
    kept = _repeated(kept, heads)
    if packed:
        base.index_copy_(row, _packed_index(kept, base.shape[row]), rows)
    elif batch is None:
        base.index_copy_(row, kept[0], rows)
    else:
        which = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
        base.movedim((batch, row), (0, 1))[which, kept] = rows.movedim((batch, row), (0, 1))


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
    mask: Tensor | MaskRows | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    batch_dim: int | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` of selected queries over all keys.

    Shapes: query [..., kept, width]; key, value [..., keys, width]; mask broadcastable to
    [..., kept, keys], or made by rows, on chunks of queries. The causal flag becomes the kept rows
    of the causal mask (aligned at the top left, as torch's own flag is).
    """
    if is_causal:
        causal = kept.unsqueeze(-1) >= torch.arange(key.shape[-2], device=key.device)
        if batch_dim is None:
            mask = causal[0]
        else:
            shape = [1] * query.dim()
            shape[batch_dim] = causal.shape[0]
            mask = causal.view(*shape[:-2], *causal.shape[-2:])
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    attention: Callable[..., Tensor] = attend
    if mask is not None and _folds(query, enable_gqa):
        attention = attend_folded
    else:
        options["enable_gqa"] = enable_gqa
    if isinstance(mask, MaskRows):
        return attend_in_chunks(attention, query, key, value, kept, mask, **options)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)  # shared by layers of other precision
    return attention(query, key, value, attn_mask=mask, **options)


GROUPED_KERNELS: tuple[str, ...] = ("cpu",)
"""Devices with a fused kernel for a mask together with grouped heads."""


def _folds(query: Tensor, enable_gqa: bool) -> bool:
    """Whether grouped heads become further queries.

    Of the fused kernels only the CPU's takes a mask and grouped heads; elsewhere keys and values
    would be repeated, and a map of kept × keys made for each head.
    """
    return enable_gqa and query.dim() == 4 and query.device.type not in GROUPED_KERNELS


def shared_mask(
    mask: Tensor | MaskRows, query: Tensor, key: Tensor, *, enable_gqa: bool = False
) -> Tensor | MaskRows:
    """A boolean mask as the kernels of all layers want it.

    They make an additive one of their own in each call, and autograd keeps every one of them. Each
    makes its own of one by rows.
    """
    if isinstance(mask, MaskRows):
        return mask
    mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return _folded(mask, query, key.shape[1]) if _folds(query, enable_gqa) else mask


def _folded(mask: Tensor, query: Tensor, kv_heads: int) -> Tensor:
    """A mask for queries of which each key head has its whole group."""
    groups = (kv_heads, query.shape[1] // kv_heads)
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(-1, -1, query.shape[2], -1)
    if mask.shape[1] == 1:
        return mask.unsqueeze(2).expand(-1, -1, groups[1], -1, -1).flatten(2, 3)
    return mask.unflatten(1, groups).flatten(2, 3)


def attend_folded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
) -> Tensor:
    """Grouped-query attention whose groups are further queries of their key head.

    Shapes: query [batch, heads, kept, width]; key, value [batch, kv_heads, keys, width]; attn_mask
    broadcastable to [batch, heads, kept, keys], or folded already → [batch, heads, kept, width].
    """
    heads, kept = query.shape[1:3]
    kv_heads = key.shape[1]
    groups = (kv_heads, heads // kv_heads)
    if attn_mask.dim() < 4 or attn_mask.shape[2] != groups[1] * kept:
        attn_mask = _folded(attn_mask, query, kv_heads)
    found = F.scaled_dot_product_attention(
        query.unflatten(1, groups).flatten(2, 3),
        key,
        value,
        attn_mask=attn_mask,
        **options,
    )
    return found.unflatten(2, (groups[1], kept)).flatten(1, 2)

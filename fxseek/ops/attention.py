"""Attention of some tokens or all, and masks that are made row by row.

Shapes: `kept` is LongTensor[batch or 1, rows], query positions; rows of a mask are
Bool[batch or 1, heads or 1, rows, keys].
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxseek import _torch
from fxseek.errors import InputError
from fxseek.ops.rows import Rows, gather_rows, placed
from fxseek.ops.sweep import Cat, slices_of, sweep

__all__ = [
    "HIDDEN",
    "Mask",
    "MaskMaker",
    "MaskRows",
    "attend",
    "attend_all",
    "attend_folded",
    "attend_in_chunks",
    "attend_rows",
    "kernel",
    "looks_ahead",
    "queries_of",
    "read_tokens",
    "shared_mask",
]

_COMPARED_ROWS = 256
"""Rows of a mask that are compared with the causal mask's at a time."""

_CHUNK_BYTES = 64 << 20
"""The largest part of a mask, as float32 entries of one head, given to an attention at once."""


def read_tokens(mask: Tensor) -> Tensor:
    """Which tokens a mask lets the model read, the others being padding: Bool[batch or 1, tokens].

    Shapes: [batch, tokens], or [batch or 1, heads or 1, tokens, tokens], where a token is read if
    any query reads it. An entry that is 0 is not read; in an additive mask, which has negative
    entries, it is the only one that is.
    """
    read = mask != 0
    if mask.is_floating_point():
        read = read ^ (mask < 0).any()
    return read if mask.dim() == 2 else read.flatten(1, 2).any(1)


def queries_of(x: Tensor, kept: Tensor) -> Tensor:
    """A mask's ingredient [..., tokens, any] at some queries: [batch or 1, any, rows, any]."""
    x = x[(None,) * (4 - x.dim())]
    batch = max(x.shape[0], kept.shape[0])
    kept = kept[:, None, :, None].expand(batch, x.shape[1], -1, x.shape[3])
    return torch.take_along_dim(x.expand(batch, -1, -1, -1), kept, 2)


class MaskRows:
    """A boolean mask [batch or 1, heads or 1, tokens, keys] that is never whole."""

    def __init__(self, make: Callable[..., Tensor], leaves: tuple[Any, ...], square: bool) -> None:
        self._make = make
        self._leaves = leaves
        self._square = square
        self._versions = _torch.versions(leaves)
        self._causal: bool | None = None

    @classmethod
    def of(cls, mask: Tensor) -> MaskRows:
        """By rows, a mask [..., tokens, keys] that is whole already."""
        return cls(
            lambda kept, whole: queries_of(whole, kept), (mask,), mask.shape[-1] == mask.shape[-2]
        )

    def large(self, kept: Tensor) -> bool:
        """Whether the rows of these queries are more than an attention is given at once."""
        batch, _, _, keys = self.rows(kept[:, :1]).shape
        return 4 * batch * kept.shape[1] * keys > _CHUNK_BYTES

    def part(self, queries: slice, device: torch.device) -> Tensor:
        """The rows of consecutive queries."""
        return self.rows(torch.arange(queries.start, queries.stop, device=device)[None])

    def rows(self, kept: Tensor) -> Tensor:
        """The rows of these query positions.

        Raises:
            InputError: what they are made of was written to since, between forward and backward.
        """
        if _torch.versions(self._leaves) != self._versions:
            raise InputError(
                "what the attention mask is made of was written to in place between forward and "
                "backward, which makes its rows again. Write to a copy of the attention mask."
            )
        return self._make(kept, *self._leaves)

    def causal(self, tokens: int, device: torch.device) -> bool:
        """Whether the mask is the causal one in every entry. Waits for the device, once.

        A fake tensor has no values to look at: it stands for rows without padding.
        """
        if self._causal is None:
            self._causal = self._square and self._is_causal(tokens, device)
        return self._causal

    def _is_causal(self, tokens: int, device: torch.device) -> bool:
        columns = torch.arange(tokens, device=device)
        if _torch.is_fake(columns):
            return True
        corners = self.rows(columns[None, [0, -1]])
        if bool(corners[..., 0, 1:].any()) or not bool(corners[..., 1, :].all()):
            return False
        same = torch.ones((), dtype=torch.bool, device=device)
        for start in range(0, tokens, _COMPARED_ROWS):
            chunk = columns[start : start + _COMPARED_ROWS]
            same &= (self.rows(chunk[None]) == (columns <= chunk[:, None])).all()
        return bool(same)


class MaskMaker(nn.Module):
    """Binds what a mask is made of in a step."""

    def __init__(self, make: Callable[..., Tensor], square: bool) -> None:
        super().__init__()
        self.make = make
        self.square = square

    def forward(self, *leaves: Any) -> MaskRows:
        """The mask, by rows."""
        return MaskRows(self.make, leaves, self.square)


HIDDEN = -1000.0
"""The largest value of an additive mask that hides a key: e to that power is 0 everywhere."""


class Mask(NamedTuple):
    """A mask that hides where it is False, or far below 0; `inverted`: where it is True.

    `fused`: that of a fused attention, where a query whose keys are all hidden by a boolean mask
    reads none. Elsewhere it reads all of them alike.

    Shapes: [..., tokens, keys], with the tokens at `at`, or by rows; the last keys are those of the
    tokens.
    """

    value: Tensor | MaskRows
    at: Rows
    inverted: bool = False
    fused: bool = False

    @property
    def shuts(self) -> bool:
        """Whether a query may read nothing."""
        boolean = isinstance(self.value, MaskRows) or self.value.dtype == torch.bool
        return self.fused and boolean

    def reads(self, queries: Tensor) -> Tensor:
        """Which keys the queries at these positions may read: Bool[..., rows, keys]."""
        if isinstance(self.value, MaskRows):
            rows = self.value.rows(queries)
        else:
            rows = gather_rows(self.value, queries, self.at)
        read = rows if rows.dtype == torch.bool else rows > HIDDEN
        return ~read if self.inverted else read


def looks_ahead(masks: Sequence[Mask], kept: Tensor, filled: Tensor | None, tokens: int) -> bool:
    """Whether masks let some of the queries at `kept` read tokens behind them.

    All of `masks` are those of one attention. Queries that are `filled` don't count. Waits for the
    device. Of fake tensors none does.

    Shapes: kept, filled [batch, kept].
    """
    if _torch.is_fake(kept):
        return False
    found = torch.zeros((), dtype=torch.bool, device=kept.device)
    for chunk in slices_of(kept.shape[1], _COMPARED_ROWS):
        queries = kept[:, chunk]
        parts = [(mask.reads(queries), mask.at) for mask in masks]
        parts = [(x, at) for x, at in parts if x.shape[-1] >= tokens]
        if not parts:
            return True
        read = functools.reduce(torch.logical_and, (x for x, _ in parts))
        first, at = parts[0]
        at = at.shift(read.dim() - first.dim())
        keys = torch.arange(read.shape[-1], device=kept.device) - (read.shape[-1] - tokens)
        if not all(mask.shuts for mask in masks):
            read = read | ~read.any(-1, keepdim=True)
        read = read & (keys > placed(queries, read, at))
        if filled is not None:
            read = read & ~placed(filled[:, chunk], read, at)
        found |= read.any()
    return bool(found)


_attend: Callable[..., Tensor] | None = None
_grouped: tuple[str, ...] = ("cpu",)


@contextlib.contextmanager
def kernel(attend: Callable[..., Tensor], grouped: tuple[str, ...]) -> Iterator[None]:
    """Attention by another function meanwhile, for tensors that stand for those of a device.

    `grouped`: devices with a fused kernel for a mask together with grouped heads.
    """
    global _attend, _grouped
    before = _attend, _grouped
    _attend, _grouped = attend, grouped
    try:
        yield
    finally:
        _attend, _grouped = before


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` as it is at each call, or the `kernel` in its place."""
    return (_attend or F.scaled_dot_product_attention)(query, key, value, **options)


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | MaskRows,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention` of all tokens under a mask.

    A mask that is causal becomes the flag; any other is made and used on chunks of queries, in
    backward anew.
    """
    if isinstance(attn_mask, Tensor):
        attn_mask = MaskRows.of(attn_mask)
    tokens = query.shape[-2]
    if attn_mask.causal(tokens, query.device):
        return attend(query, key, value, **{**options, "is_causal": True})
    at = torch.arange(tokens, device=query.device)[None]
    return attend_in_chunks(attend, query, key, value, at, attn_mask, **options)


def attend_in_chunks(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    mask: MaskRows,
    **options: Any,
) -> Tensor:
    """`attention` with queries at positions `kept` and its `attn_mask` on chunks of them.

    The mask of a chunk is made for it, and in backward anew, with the attention.
    """
    count = kept.shape[1]
    most = max(1, _CHUNK_BYTES // (4 * key.shape[-2] * max(1, query.shape[0])))

    def part(query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        rows = _cut_to(mask.rows(kept), key)
        return attention(query, key, value, attn_mask=rows, **options)

    if count <= most:
        return part(query, key, value, kept)

    def run(chunk: slice) -> tuple[Tensor]:
        given = (query[..., chunk, :], key, value, kept[:, chunk])
        if torch.is_grad_enabled():
            return (checkpoint(part, *given, use_reentrant=False),)
        return (part(*given),)

    (found,) = sweep(slices_of(count, most), run, (Cat(-2),), query)
    return found


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
    if mask is not None:
        mask = _cut_to(mask, key)
        if mask.dtype not in (torch.bool, query.dtype):
            mask = mask.to(query.dtype)  # shared by layers of other precision
    return attention(query, key, value, attn_mask=mask, **options)


def _cut_to(mask: Tensor, key: Tensor) -> Tensor:
    """A mask [..., keys or more] for as many keys as there are."""
    keys = key.shape[-2]
    return mask[..., :keys] if mask.shape[-1] > keys else mask


def _folds(query: Tensor, enable_gqa: bool) -> bool:
    """Whether grouped heads become further queries.

    Of the fused kernels only the CPU's takes a mask and grouped heads; elsewhere keys and values
    would be repeated, and a map of kept × keys made for each head.
    """
    return enable_gqa and query.dim() == 4 and query.device.type not in _grouped


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
    found = attend(
        query.unflatten(1, groups).flatten(2, 3),
        key,
        value,
        attn_mask=attn_mask,
        **options,
    )
    return found.unflatten(2, (groups[1], kept)).flatten(1, 2)

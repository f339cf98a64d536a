"""Masks of attentions: made row by row, or looked at for whether they hide later tokens.

Shapes: `kept` is LongTensor[batch or 1, rows], query positions; rows of a mask are
Bool[batch or 1, heads or 1, rows, keys].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.errors import InputError
from fxseek.ops.rows import Rows, gather_rows, placed
from fxseek.ops.sweep import slices_of

__all__ = ["HIDDEN", "Mask", "MaskMaker", "MaskRows", "looks_ahead", "queries_of", "read_tokens"]

_COMPARED_ROWS = 256
"""Rows of a mask that are compared with the causal mask's at a time."""

CHUNK_BYTES = 64 << 20
"""The largest part of a mask, as float32 entries of one head, given to an attention at once."""


def read_tokens(mask: Tensor) -> Tensor:
    """Which tokens a mask lets the model read, the others being padding: Bool[batch or 1, tokens].

    Shapes: [batch, tokens], or [batch or 1, heads or 1, tokens, tokens], where a token is read if
    any query reads it. An entry that is 0 is not read; in an additive mask it is the only one that
    is. A floating one is additive if it has negative entries, or hides nothing: no positive ones.
    """
    read = mask != 0
    if mask.is_floating_point():
        read = read ^ ((mask < 0).any() | ~(mask > 0).any())
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
        self.known_causal: bool | None = None
        """What `causal` has found."""

    @classmethod
    def of(cls, mask: Tensor) -> MaskRows:
        """By rows, a mask [..., tokens, keys] that is whole already."""
        return cls(
            lambda kept, whole: queries_of(whole, kept), (mask,), mask.shape[-1] == mask.shape[-2]
        )

    def large(self, kept: Tensor) -> bool:
        """Whether the rows of these queries are more than an attention is given at once."""
        batch, _, _, keys = self.rows(kept[:, :1]).shape
        return 4 * batch * kept.shape[1] * keys > CHUNK_BYTES

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

    def causal(self, device: torch.device) -> bool:
        """Whether the mask is the causal one in every entry. Waits for the device, once.

        A fake tensor has no values to look at: it stands for rows without padding.
        """
        if self.known_causal is None:
            self.known_causal = self._square and self._is_causal(device)
        return self.known_causal

    def _is_causal(self, device: torch.device) -> bool:
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if not _torch.has_values(first):
            return True
        tokens = self.rows(first).shape[-1]
        columns = torch.arange(tokens, device=device)
        corners = self.rows(columns[None, [0, -1]])
        if bool(corners[..., 0, 1:].any()) or not bool(corners[..., 1, :].all()):
            return False
        same = torch.ones((), dtype=torch.bool, device=device)
        for chunk in columns.split(_COMPARED_ROWS):
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

    @property
    def known_causal(self) -> bool:
        """Whether every entry is known to be the causal mask's."""
        causal = isinstance(self.value, MaskRows) and self.value.known_causal
        return bool(causal) and not self.inverted

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
    device, unless a mask is known to be causal. Of tensors without values none does.

    Shapes: kept, filled [batch, kept].
    """
    hide = len(masks) == 1 or all(mask.shuts for mask in masks)
    if not _torch.has_values(kept) or (hide and any(mask.known_causal for mask in masks)):
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

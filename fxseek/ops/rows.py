"""Token rows: where a value has them, and how the stages gather and scatter them.

Shapes: `kept` is LongTensor[batch, kept].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Rows",
    "every_token",
    "gather_entries",
    "gather_rows",
    "inverse",
    "only_rows",
    "owned",
    "pass_kept",
    "placed",
    "put_rows_",
    "rows_at",
    "scatter_entries",
    "scatter_rows",
]


class Rows(NamedTuple):
    """Where the tokens of a value are.

    `row`: the dimension whose index is the token that the value belongs to.
    `batch`: the dimension of the batch; None when the batch is 1 or merged into `row`.
    `packed`: `row` is batch × tokens, batch-major, as ``view(-1, width)`` makes it.
    `heads`: how often `batch` repeats each row of the batch; above 1 where heads are merged into
    it (batch-major), as ``view(batch * heads, tokens, width)`` does.
    """

    row: int
    batch: int | None = None
    packed: bool = False
    heads: int = 1

    def shift(self, by: int) -> Rows:
        """The same dimensions when `by` leading ones are added (or, negative, removed)."""
        return self.moved(lambda dim: dim + by)

    def moved(self, place: Callable[[int], int]) -> Rows:
        """The same tokens where each dimension ``dim`` has become ``place(dim)``."""
        batch = None if self.batch is None else place(self.batch)
        return self._replace(row=place(self.row), batch=batch)

    def without(self, dims: Iterable[int]) -> Rows:
        """The same tokens when `dims` are gone, none of which is one of these."""
        gone = set(dims)
        return self.moved(lambda dim: dim - sum(other < dim for other in gone))

    @property
    def dims(self) -> tuple[int, ...]:
        """Every dimension that an operation must leave alone to be per-token."""
        return (self.row,) if self.batch is None else (self.row, self.batch)


def _index(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
    """Where the selected rows are in a value without a dimension of the batch."""
    if not at.packed:
        return kept[0]
    batch = kept.shape[0]
    start = torch.arange(batch, device=kept.device).unsqueeze(1) * (x.shape[at.row] // batch)
    return (kept + start).reshape(-1)


def gather_rows(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
    """The selected rows of a full value: [..., tokens, ...] → [..., kept, ...].

    A batch dimension of size 1 (a value that all rows of a batch share) is expanded first.
    """
    row, batch, _, heads = at
    if batch is None:
        return x.index_select(row, _index(x, kept, at))
    kept = _repeated(kept, heads)
    rows = kept.shape[0]
    if x.shape[batch] == 1 and rows > 1:
        x = x.expand(*(rows if i == batch else -1 for i in range(x.dim())))
    moved = x.movedim((batch, row), (0, 1))
    which = torch.arange(rows, device=kept.device).unsqueeze(1)
    return moved[which, kept].movedim((0, 1), (batch, row))


@torch.compiler.allow_in_graph
def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """The rows of `x` at the positions of tokens: [batch, n, ...] → [batch, tokens, ...].

    Shapes: positions LongTensor[batch, tokens], below n. The result is as long as they are, also
    where that is a symbol and n a number.
    """
    return gather_rows(x, positions, Rows(1, 0))


def scatter_rows(
    base: Tensor, rows: Tensor, kept: Tensor, at: Rows, filled: Tensor | None = None
) -> Tensor:
    """A full value with its selected rows replaced; the others are constants from `base`.

    Rows that are `filled` up with positions that are not selected are among the others.

    Shapes: base [..., tokens, ...], rows [..., kept, ...], filled Bool [batch, kept] →
    [..., tokens, ...].
    """
    row, batch, _, heads = at
    if filled is not None:
        own = gather_rows(base, kept, at)
        rows = torch.where(placed(filled, rows, at), own.detach(), rows)
    if batch is None:
        return base.index_copy(row, _index(base, kept, at), rows)
    kept = _repeated(kept, heads)
    which = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
    moved = base.movedim((batch, row), (0, 1))
    whole = moved.index_put((which, kept), rows.movedim((batch, row), (0, 1)))
    return whole.movedim((0, 1), (batch, row))


class _PassKept(torch.autograd.Function):
    """A value whose gradient is that of its selected rows, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, at: Rows, filled: Tensor | None) -> Tensor:
        ctx.kept, ctx.at, ctx.filled = kept, at, filled
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return only_rows(slope, ctx.kept, ctx.at, ctx.filled), None, None, None


def pass_kept(x: Tensor, kept: Tensor, at: Rows, filled: Tensor | None = None) -> Tensor:
    """A full value through which gradient passes at its selected rows alone.

    Shapes as `scatter_rows` has them.
    """
    return _PassKept.apply(x, kept, at, filled)  # type: ignore[return-value]


def only_rows(x: Tensor, kept: Tensor, at: Rows, filled: Tensor | None = None) -> Tensor:
    """A full value [..., tokens, ...] with zeros but for its selected rows."""
    rows = gather_rows(x, kept, at)
    if filled is not None:
        rows = rows.masked_fill(placed(filled, rows, at), 0.0)
    return scatter_rows(torch.zeros_like(x), rows, kept, at)


def every_token(x: Tensor, at: Rows) -> Tensor:
    """The positions of all tokens of a value that is not packed, LongTensor[batch, tokens]."""
    batch = 1 if at.batch is None else x.shape[at.batch] // at.heads
    return torch.arange(x.shape[at.row], device=x.device).expand(batch, -1)


def inverse(order: Tensor) -> Tensor:
    """The place of each entry in an order: ``inverse(order)[order[i]] == i``, LongTensor[n]."""
    places = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(places).index_copy(0, order.long(), places)


def gather_entries(
    x: Tensor,
    kept: Tensor,
    at: Rows,
    inner: int,
    outer: int,
    order: Tensor | None = None,
    kept_order: Tensor | None = None,
) -> Tensor:
    """The entries of selected tokens; `at.row` is outer × tokens × inner.

    `order`: which entry each place of that dimension holds, LongTensor[entries]; `kept_order`: the
    same of the selected tokens.
    """
    if order is not None:
        x = x.index_select(at.row, inverse(order))
    x = x.unflatten(at.row, (outer, x.shape[at.row] // (outer * inner), inner))
    found = gather_rows(x, kept, _between(at)).flatten(at.row, at.row + 2)
    return found if kept_order is None else found.index_select(at.row, kept_order)


def scatter_entries(
    base: Tensor,
    rows: Tensor,
    kept: Tensor,
    at: Rows,
    filled: Tensor | None,
    inner: int,
    outer: int,
    order: Tensor | None = None,
    kept_order: Tensor | None = None,
) -> Tensor:
    """A full value with the entries of its selected tokens replaced; see `gather_entries`."""
    if order is not None and kept_order is not None:
        base = base.index_select(at.row, inverse(order))
        rows = rows.index_select(at.row, inverse(kept_order))
    base, rows = (
        x.unflatten(at.row, (outer, x.shape[at.row] // (outer * inner), inner))
        for x in (base, rows)
    )
    whole = scatter_rows(base, rows, kept, _between(at), filled).flatten(at.row, at.row + 2)
    return whole if order is None else whole.index_select(at.row, order)


def _between(at: Rows) -> Rows:
    """The same tokens where their dimension has been taken apart, with theirs in the middle."""
    return at.moved(lambda dim: dim + (dim >= at.row) + (dim > at.row))


def owned(value: Any) -> Any:
    """A value that keeps nothing but itself alive: views of larger memory are copied."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def put_rows_(base: Tensor, rows: Tensor, kept: Tensor, at: Rows) -> None:
    """Write rows into a full value in place; shapes as `scatter_rows` has them. No gradient."""
    row, batch, _, heads = at
    if batch is None:
        base.index_copy_(row, _index(base, kept, at), rows)
    else:
        kept = _repeated(kept, heads)
        which = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
        base.movedim((batch, row), (0, 1))[which, kept] = rows.movedim((batch, row), (0, 1))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 else x.repeat_interleave(heads, 0)


def placed(filled: Tensor, rows: Tensor, at: Rows) -> Tensor:
    """A Bool [batch, kept] with its dimensions where `rows` has them."""
    row, batch, packed, heads = at
    filled = _repeated(filled, heads)
    shape = [1] * rows.dim()
    if packed:
        shape[row] = filled.numel()
        return filled.reshape(shape)
    shape[row] = filled.shape[1]
    if batch is None:
        return filled[0].reshape(shape)
    shape[batch] = filled.shape[0]
    return (filled if batch < row else filled.T).reshape(shape)

"""Entries: several places for each token in one dimension, and places in an order of their own.

A mixture of experts makes `choices` rows of each token, sorts them by expert, and brings them
back::

    weights.reshape(-1)           # Entries(Rows(0, packed=True), inner=2): [batch × tokens × 2]
    ids, perm = expert.sort()     # in the order `perm`: place i holds entry perm[i]
    x[perm // 2]                  # Entries(..., inner=2, order=sort)

Which entry has which place depends on which tokens are there. So the order is no fact of a token,
but of a set of tokens: the selected ones are sorted anew, and what is in an order then is in
theirs. Values that number places (`Order`, `Groups`) are not made of rows, and no other rule than
those in `passes/rules/experts.py` reads them as anything but the constants of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy
from torch import fx

from fxseek.ops.rows import Rows

if TYPE_CHECKING:
    from fxseek.passes.facts import Sizes

__all__ = ["Entries", "Groups", "Order", "entries_of", "moved_rows", "plainly"]


@dataclass(frozen=True)
class Entries:
    """Where the entries of tokens are.

    `rows`: where the tokens would be; its dimension ``rows.row`` is outer × tokens × inner (with
    the batch in front of the tokens where they are packed). `order`: the sort whose permutation
    says which entry each place of that dimension holds, or None where they are in this order.
    """

    rows: Rows
    inner: int = 1
    outer: int = 1
    order: fx.Node | None = None

    @property
    def row(self) -> int:
        """The dimension of the entries."""
        return self.rows.row

    @property
    def batch(self) -> int | None:
        """The dimension of the batch, as `Rows` has it."""
        return self.rows.batch

    @property
    def packed(self) -> bool:
        """Whether the batch is merged into the dimension of the entries."""
        return self.rows.packed

    @property
    def dims(self) -> tuple[int, ...]:
        """Every dimension that an operation must leave alone to be per-token."""
        return self.rows.dims

    @property
    def times(self) -> int:
        """How many entries a token has."""
        return self.inner * self.outer

    def shift(self, by: int) -> Entries:
        """The same entries when `by` leading dimensions are added (or, negative, removed)."""
        return replace(self, rows=self.rows.shift(by))

    def moved(self, place: Callable[[int], int]) -> Entries:
        """The same entries where each dimension ``dim`` has become ``place(dim)``."""
        return replace(self, rows=self.rows.moved(place))

    def without(self, dims: Iterable[int]) -> Entries:
        """The same entries when `dims` are gone, none of which is one of these."""
        return replace(self, rows=self.rows.without(dims))


@dataclass(frozen=True)
class Order:
    """A value that numbers entries, in one dimension.

    `sort` orders the entries that `of` describes by its keys. Place i of the value holds the number
    of the entry that comes i-th, divided by `over` and rounded down; or, where it is `inverse`, the
    place of the entry i.
    """

    sort: fx.Node
    of: Entries
    over: int = 1
    inverse: bool = False


@dataclass(frozen=True)
class Groups:
    """How many entries have each of the keys 0 … `count` - 1 of `keys`.

    `ends`: added up, so that each number is the place behind the last entry of its key, in an
    order by them.
    """

    keys: fx.Node
    count: int
    ends: bool


def entries_of(rows: Rows | Entries) -> Entries:
    """Rows as entries, one for each token."""
    return rows if isinstance(rows, Entries) else Entries(rows)


def plainly(entries: Entries) -> Rows | Entries:
    """Entries as rows, where there is one for each token and no order."""
    return entries.rows if entries == Entries(entries.rows) else entries


_FEATURE, _BATCH, _TOKENS = range(3)
_Parts = list[tuple[int, sympy.Expr]]
"""What a dimension consists of, from its slowest part to its fastest: kinds and sizes."""


def moved_rows(
    sizes: Sizes, rows: Rows | Entries, before: Sequence[sympy.Expr], after: Sequence[sympy.Expr]
) -> Rows | Entries | None:
    """Where a reshape takes the rows, or None where it merges them with anything but entries."""
    found = entries_of(rows)
    if any(before[dim] == 1 for dim in found.dims):
        return None
    parts = [part for dim, size in enumerate(before) for part in _parts(sizes, found, dim, size)]
    regrouped = _regroup(parts, after)
    if regrouped is None:
        return None
    row = next(dim for dim, group in enumerate(regrouped) if _has(group, _TOKENS))
    if found.order is not None:
        if regrouped[row] != _parts(sizes, found, found.row, before[found.row]):
            return None  # the order counts whole entries
        return replace(found, rows=Rows(row, packed=found.packed))
    where = _read(regrouped, row, sizes.batch is not None)
    return None if where is None else plainly(where)


def _parts(sizes: Sizes, rows: Entries, dim: int, size: sympy.Expr) -> _Parts:
    """What a dimension of a value with these entries consists of."""
    if dim == rows.batch:
        assert sizes.batch is not None
        return _above_one([(_BATCH, sizes.batch), (_FEATURE, sympy.Integer(rows.rows.heads))])
    if dim != rows.row:
        return _above_one([(_FEATURE, size)])
    inside: _Parts = [(_TOKENS, sizes.tokens), (_FEATURE, sympy.Integer(rows.inner))]
    if rows.packed:
        assert sizes.batch is not None
        inside = [(_BATCH, sizes.batch), *inside]
    return _above_one([(_FEATURE, sympy.Integer(rows.outer)), *inside])


def _above_one(parts: _Parts) -> _Parts:
    return [(kind, size) for kind, size in parts if size != 1]


def _has(group: _Parts, kind: int) -> bool:
    return any(kind == other for other, _ in group)


def _regroup(parts: _Parts, after: Sequence[sympy.Expr]) -> list[_Parts] | None:
    """The parts in the dimensions of another shape; features may be split."""
    left = list(reversed(parts))
    groups: list[_Parts] = []
    for size in after:
        group: _Parts = []
        rest = size
        while rest != 1:
            if not left:
                return None
            kind, part = left.pop()
            quotient = _quotient(rest, part)
            if quotient is not None:
                group.append((kind, part))
                rest = quotient
                continue
            quotient = _quotient(part, rest)
            if quotient is None or kind != _FEATURE:
                return None
            group.append((kind, rest))
            left.append((kind, quotient))
            rest = sympy.Integer(1)
        groups.append(group)
    return None if left else groups


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """``a / b`` where it is a product of lengths, or None."""
    if a == b:
        return sympy.Integer(1)
    if a.is_Integer and b.is_Integer:
        return a / b if a % b == 0 else None
    quotient = sympy.cancel(a / b)
    return sympy.expand(quotient) if sympy.fraction(quotient)[1] == 1 else None


def _read(groups: list[_Parts], row: int, batched: bool) -> Entries | None:
    """The entries of a value whose dimensions consist of these parts."""
    at = next(i for i, (kind, _) in enumerate(groups[row]) if kind == _TOKENS)
    front, inner = groups[row][:at], _number(groups[row][at + 1 :])
    batch, packed = None, False
    heads: int | None = 1
    if _has(front, _BATCH):
        packed = front[-1][0] == _BATCH
        front = front[:-1]
        if not packed:
            return None
    elif batched:
        batch = next((dim for dim, group in enumerate(groups) if _has(group, _BATCH)), None)
        if batch is None or groups[batch][0][0] != _BATCH:
            return None
        heads = _number(groups[batch][1:])
    outer = _number(front)
    if inner is None or outer is None or heads is None:
        return None
    return Entries(Rows(row, batch, packed, heads), inner, outer)


def _number(parts: _Parts) -> int | None:
    """The product of sizes that are numbers."""
    product = 1
    for kind, size in parts:
        if kind != _FEATURE or not size.is_Integer:
            return None
        product *= int(size)
    return product

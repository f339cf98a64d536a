"""Running something on chunks of tokens, one after the other, and collecting what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.ops.rows import Rows, put_rows_

__all__ = [
    "Cat",
    "CatRows",
    "Collector",
    "Put",
    "Sum",
    "Whole",
    "chunks_of",
    "few",
    "rows_of_chunk",
    "slices_of",
    "sweep",
]

_T = TypeVar("_T")


def chunks_of(total: int, most: int) -> list[slice]:
    """`total` positions in as few slices as possible of at most `most`, of about one length."""
    count = -(-total // max(1, most))
    return slices_of(total, -(-total // max(1, count)))


def slices_of(total: int, size: int) -> list[slice]:
    """`total` positions in slices of `size`, the last of what is left."""
    size = max(1, size)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class Collector(Protocol):
    """Makes one result of the parts that chunks give, in order."""

    def add(self, part: Any, chunk: slice, times: int) -> None:
        """Take the part of a chunk, which stands for `times` that are alike."""

    def result(self) -> Any:
        """What the parts make."""


def few(chunks: Sequence[_T], like: Tensor) -> Iterable[tuple[_T, int]]:
    """The chunks to run, and how many each stands for: one, where `like` has values.

    Without them the second stands for all but the first and the last: the others do the same
    over again, and a step of a million tokens has millions.
    """
    if _torch.has_values(like) or len(chunks) <= 3:
        return [(chunk, 1) for chunk in chunks]
    return [(chunks[0], 1), (chunks[1], len(chunks) - 2), (chunks[-1], 1)]


def sweep(
    chunks: Sequence[slice],
    run: Callable[[slice], Sequence[Any]],
    collectors: Sequence[Collector],
    like: Tensor,
) -> tuple[Any, ...]:
    """Run each chunk and give its results to the collectors; answers what they have collected.

    Where `like` is a fake tensor, only a `few` of them are run.
    """
    for index, times in few(range(len(chunks)), like):
        parts = run(chunks[index])
        for collector, part in zip(collectors, parts, strict=True):
            collector.add(part, chunks[index], times)
        del parts
    return tuple(collector.result() for collector in collectors)


class Sum:
    """Adds up the parts, beginning with `start` if there is one (which is written to)."""

    def __init__(self, start: Tensor | None = None) -> None:
        self.total = start
        self.owned = start is not None

    def add(self, part: Tensor | None, chunk: slice, times: int) -> None:
        """Take a part; None is zero."""
        if part is None:
            return
        if self.owned:
            assert self.total is not None
            self.total += part
        else:
            self.total = part if self.total is None else self.total + part

    def result(self) -> Tensor:
        """The sum."""
        assert self.total is not None
        return self.total


class Cat:
    """Concatenates the parts in one dimension."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.parts: list[Tensor] = []

    def add(self, part: Tensor, chunk: slice, times: int) -> None:
        """Take a part."""
        self.parts += [part] * times

    def result(self) -> Tensor:
        """All parts."""
        return torch.cat(self.parts, dim=self.dim)


class CatRows:
    """Concatenates rows of the positions of consecutive chunks, of `batch` rows each."""

    def __init__(self, rows: Rows, batch: int) -> None:
        self.rows = rows
        self.batch = batch
        self.cat = Cat(rows.row + rows.packed)

    def add(self, part: Tensor, chunk: slice, times: int) -> None:
        """Take a part."""
        if self.rows.packed:
            part = part.unflatten(self.rows.row, (self.batch, -1))
        self.cat.add(part, chunk, times)

    def result(self) -> Tensor:
        """All parts."""
        found, row = self.cat.result(), self.rows.row
        return found.flatten(row, row + 1) if self.rows.packed else found


class Whole:
    """Writes the parts of consecutive tokens to one tensor of all `tokens`, without gradient."""

    def __init__(self, rows: Rows, tokens: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self.whole: Tensor | None = None

    def add(self, part: Tensor, chunk: slice, times: int) -> None:
        """Write a part."""
        length = chunk.stop - chunk.start
        if length == self.tokens:
            self.whole = part
            return
        if self.whole is None:
            sizes = list(part.shape)
            sizes[self.rows.row] = self.tokens
            self.whole = part.new_empty(sizes)
        self.whole.narrow(self.rows.row, chunk.start, length).copy_(part)

    def result(self) -> Tensor:
        """The whole tensor."""
        assert self.whole is not None
        return self.whole


class Put:
    """Writes rows of the positions of each chunk to `base`, without gradient.

    Shapes: base [..., tokens, ...]; positions [batch, any].
    """

    def __init__(self, base: Tensor, positions: Tensor, rows: Rows) -> None:
        self.base = base
        self.positions = positions
        self.rows = rows

    def add(self, part: Tensor | None, chunk: slice, times: int) -> None:
        """Write rows; None leaves those of `base`."""
        if part is not None:
            put_rows_(self.base, part, self.positions[:, chunk], self.rows)

    def result(self) -> Tensor:
        """The base."""
        return self.base


def rows_of_chunk(x: Tensor, rows: Rows, batch: int, chunk: slice) -> Tensor:
    """A chunk of each row's positions."""
    if rows.packed:
        apart = x.unflatten(rows.row, (batch, -1))
        return apart.narrow(rows.row + 1, *_span(chunk)).flatten(rows.row, rows.row + 1)
    return x.narrow(rows.row, *_span(chunk))


def _span(chunk: slice) -> tuple[int, int]:
    return chunk.start, chunk.stop - chunk.start

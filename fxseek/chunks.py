"""Regions of the prefill, and of the score stage, that run on chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxseek import _torch
from fxseek.boxed import Boxed
from fxseek.passes.ditch import StageGraph
from fxseek.passes.facts import Rows, RowsLike

__all__ = ["ChunkedRegion", "RowsRegion"]


class ChunkedRegion(nn.Module):
    """Per-token operations on `size` tokens of each row at a time.

    The arguments are the stage's inputs but for the positions; the results have all tokens.
    """

    def __init__(
        self,
        stage: StageGraph,
        rows: Mapping[fx.Node, RowsLike],
        results: Sequence[Rows],
        size: int,
    ) -> None:
        super().__init__()
        self.run = Boxed(stage.module("Tokens"))
        self.size = size
        self.results = results
        self.kept_at = [i for i, item in enumerate(stage.inputs) if item.kind == "kept"]
        self.rows_at: dict[int, Rows] = {}
        places = [item for item in stage.inputs if item.kind != "kept"]
        for index, item in enumerate(places):
            found = None if item.node is None else rows.get(item.node)
            if item.kind == "rows" and isinstance(found, Rows):
                self.rows_at[index] = found

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The results for all tokens."""
        index, rows = next(iter(self.rows_at.items()))
        given = arguments[index]
        tokens = given.shape[rows.row]
        batch = 1 if rows.batch is None else given.shape[rows.batch] // rows.heads
        found: list[Tensor] = []
        for start in _torch.few(range(0, tokens, self.size), given):
            length = min(self.size, tokens - start)
            values = list(arguments)
            for at, where in self.rows_at.items():
                values[at] = values[at].narrow(where.row, start, length)
            kept = torch.arange(start, start + length, device=given.device)
            for at in self.kept_at:
                values.insert(at, kept.expand(batch, -1))
            parts = self.run(values)
            if length == tokens:
                return tuple(parts)
            if not found:
                found = [_whole(x, r, tokens) for x, r in zip(parts, self.results, strict=True)]
            for whole, part, where in zip(found, parts, self.results, strict=True):
                whole.narrow(where.row, start, length).copy_(part)
        return tuple(found)


def _whole(part: Tensor, rows: Rows, tokens: int) -> Tensor:
    sizes = [tokens if dim == rows.row else size for dim, size in enumerate(part.shape)]
    return part.new_empty(sizes)


class RowsRegion:
    """Per-token operations of the score stage: rows of `entries` → rows of `results`.

    `rows`: where the tokens of either are; `size`: tokens of each row at a time.
    """

    def __init__(
        self,
        stage: StageGraph,
        entries: Sequence[fx.Node],
        rows: Mapping[fx.Node, Rows],
        size: int,
    ) -> None:
        self.stage = stage
        self.boxed = Boxed(stage.module("Rows"))
        self.entries = tuple(entries)
        self.results = tuple(stage.outputs)
        self.rows = rows
        self.size = size

    def run(
        self, read: Callable[[fx.Node], Any], kept: Tensor, *entries: Tensor
    ) -> tuple[Tensor, ...]:
        """The rows at positions `kept`, from those of the entries."""
        given = dict(zip(self.entries, entries, strict=True))
        values: list[Any] = []
        for item in self.stage.inputs:
            if item.kind == "rows":
                values.append(given[item.node])  # type: ignore[index]
            else:
                values.append(kept if item.node is None else read(item.node))
        return tuple(self.boxed(values))

    def forward(
        self, read: Callable[[fx.Node], Any], entry: Tensor, batch: int
    ) -> dict[fx.Node, Tensor]:
        """The results for all tokens; what they are made of is made again in backward."""
        where = self.rows[self.entries[0]].row
        positions = torch.arange(entry.shape[where], device=entry.device).expand(batch, -1)
        split = entry.split(self.size, where), positions.split(self.size, 1)
        chunks = list(zip(*split, strict=True))
        found = [
            checkpoint(self.run, read, kept, rows, use_reentrant=False)
            for rows, kept in _torch.few(chunks, entry)
        ]
        parts = zip(*_torch.all_of(found, len(chunks)), strict=True)
        return {
            node: torch.cat(part, dim=self.rows[node].row)
            for node, part in zip(self.results, parts, strict=True)
        }

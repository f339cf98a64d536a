"""Regions of the prefill that run on chunks of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxseek import _torch
from fxseek.lowering import run_boxed
from fxseek.passes.ditch import StageGraph
from fxseek.passes.facts import Rows, RowsLike

__all__ = ["ChunkedRegion"]


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
        self.graph_module = stage.module("Tokens")
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
            parts = run_boxed(self.graph_module, values)
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

"""Pieces of the captured graph as functions of the values of a step."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxseek.ops.rows import Rows
from fxseek.ops.sweep import Cat, Whole, rows_of_chunk, slices_of, sweep
from fxseek.passes.ir import Given, Piece, Selected, Swept
from fxseek.run.boxed import Boxed
from fxseek.run.env import Env
from fxseek.selecting import Selection

__all__ = [
    "ChunkedRegion",
    "Runner",
    "SweptRegion",
    "at_positions",
    "every_position",
    "module_of",
    "root_of",
]


def module_of(piece: Piece, name: str) -> fx.GraphModule:
    """A piece as a module; it owns no parameters, all values are inputs."""
    return fx.GraphModule(root_of(piece), piece.graph, class_name=name)


def root_of(piece: Piece, **modules: nn.Module) -> dict[str, Any]:
    """What the graph of a piece has by name, as `fx.GraphModule` takes it.

    `modules` are those of its parts that are no modules of themselves. Bodies of autograd functions
    are those of the captured module.
    """
    graph = piece.graph
    bodies = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    root = {body: operator.attrgetter(body)(graph.owning_module) for body in bodies}
    for key, part in piece.parts.items():
        swept = isinstance(part, Swept)
        root[key] = modules[key] if key in modules else ChunkedRegion(part) if swept else part
    return root


class Runner:
    """A piece that runs on constants, and on values that the caller gives."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.run = Boxed(root_of(piece), piece.graph)

    def __call__(
        self, env: Env, given: Mapping[fx.Node, Any], selection: Selection | None = None
    ) -> tuple[Any, ...]:
        """The piece's results, as its graph's output has them."""
        return tuple(self.run(env.constants(self.piece.inputs, given, selection)))


def at_positions(kept: Tensor) -> Selection:
    """A selection of which only the positions are read."""
    return Selection(kept, kept)


def every_position(batch: int, tokens: int, device: torch.device) -> Tensor:
    """All positions of each row: LongTensor[batch, tokens]."""
    return torch.arange(tokens, device=device).expand(batch, -1)


class SweptRegion:
    """Per-token operations of the score stage: rows of `entries` → rows of the results."""

    def __init__(self, swept: Swept) -> None:
        self.swept = swept
        self.runner = Runner(swept.piece)
        self.entries = swept.piece.given()

    def rows(self, env: Env, kept: Tensor, entries: Mapping[fx.Node, Tensor]) -> tuple[Tensor, ...]:
        """The rows of the results at positions `kept`, from those of the entries."""
        return self.runner(env, entries, at_positions(kept))

    def all(self, env: Env, entry: Tensor, batch: int) -> dict[fx.Node, Tensor]:
        """The results of all tokens of the one entry; backward runs each chunk again."""
        (node,) = self.entries
        rows, results = self.swept.rows, self.swept.piece.outputs
        tokens = entry.shape[rows[node].row]
        positions = every_position(batch, tokens, entry.device)
        chunks = slices_of(tokens, self.swept.size)
        # One split: in backward each slice would make a gradient of all tokens.
        split = entry.split([chunk.stop - chunk.start for chunk in chunks], rows[node].row)
        given = {chunk.start: x for chunk, x in zip(chunks, split, strict=True)}

        def run(chunk: slice) -> tuple[Tensor, ...]:
            own = {node: given[chunk.start]}
            return checkpoint(self.rows, env, positions[:, chunk], own, use_reentrant=False)  # type: ignore[return-value]

        found = sweep(chunks, run, [Cat(rows[result].row) for result in results], entry)
        return dict(zip(results, found, strict=True))


class ChunkedRegion(nn.Module):
    """Per-token operations of the prefill, a chunk of each row's tokens at a time.

    The arguments are the piece's inputs but for the positions; the results have all tokens.
    """

    def __init__(self, swept: Swept) -> None:
        super().__init__()
        self.run = Boxed(root_of(swept.piece), swept.piece.graph)
        self.size = swept.size
        self.results = [swept.rows[node] for node in swept.piece.outputs]
        inputs = swept.piece.inputs
        self.kept_at = [i for i, item in enumerate(inputs) if isinstance(item, Selected)]
        nodes = [item for item in inputs if not isinstance(item, Selected)]
        self.rows_at: dict[int, Rows] = {
            i: swept.rows[item.node] for i, item in enumerate(nodes) if isinstance(item, Given)
        }

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The results for all tokens."""
        index, rows = next(iter(self.rows_at.items()))
        given = arguments[index]
        tokens = given.shape[rows.row]
        batch = 1 if rows.batch is None else given.shape[rows.batch] // rows.heads

        def run(chunk: slice) -> tuple[Tensor, ...]:
            values = list(arguments)
            for at, where in self.rows_at.items():
                values[at] = rows_of_chunk(values[at], where, batch, chunk)
            kept = torch.arange(chunk.start, chunk.stop, device=given.device)
            for at in self.kept_at:
                values.insert(at, kept.expand(batch, -1))
            return self.run(values)

        collect = [Whole(rows, tokens) for rows in self.results]
        return sweep(slices_of(tokens, self.size), run, collect, given)

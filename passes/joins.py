"""Joins: a new tensor that is written slice by slice is the concatenation of what is written.

Before::

    k = x.new_empty(b, h, t, 14)
    k = set_item(k, (..., slice(None, 8)), copied(k[..., :8], nope))
    k = set_item(k, (..., slice(8, None)), copied(k[..., 8:], rotary))

After::

    k = cat((nope, rotary), -1)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxseek._torch import size_expression
from fxseek.passes.facts import example, is_tensor, made_call, written_out
from fxseek.passes.writes import copied, set_item

__all__ = ["join_writes"]

_EMPTY = ("new_empty", "empty", "empty_like", "new_zeros", "zeros", "zeros_like")


def join_writes(graph: fx.Graph) -> fx.Graph:
    """The graph in which no new tensor is written slice by slice."""
    for node in list(graph.nodes):
        found = _pieces(node)
        if found is not None:
            with graph.inserting_before(node):
                made = made_call(graph, node, torch.cat, *found, example_value=example(node))
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    return graph


def _pieces(node: fx.Node) -> tuple[tuple[fx.Node, ...], int] | None:
    """What the slices of a new tensor hold, in order, and their dimension, if these are all."""
    written: dict[int, tuple[int, fx.Node]] = {}
    dims: set[int] = set()
    base: Any = node
    while isinstance(base, fx.Node) and base.target is set_item:
        found = _slice(base)
        if found is None:
            return None
        dim, start, stop, value = found
        dims.add(dim)
        if start in written:
            return None
        written[start] = (stop, value)
        base = base.args[0]
    if not is_tensor(base) or len(dims) != 1 or len(written) < 2:
        return None
    if getattr(base.target, "__name__", base.target) not in _EMPTY:
        return None
    dim, at, pieces = dims.pop(), 0, []
    for start in sorted(written):
        stop, value = written[start]
        if start != at:
            return None
        at = stop
        pieces.append(value)
    return (tuple(pieces), dim) if at == example(base).shape[dim] else None


def _slice(write: fx.Node) -> tuple[int, int, int, fx.Node] | None:
    """Dimension, start, end and value of a write to a slice of one dimension."""
    base, index, value = write.args[:3]
    if not is_tensor(base) or not is_tensor(value) or not isinstance(index, tuple):
        return None
    whole = example(base)  # type: ignore[arg-type]
    items = written_out(index, whole.dim())
    if items is None or not all(isinstance(item, slice) for item in items):
        return None
    cut = [dim for dim, item in enumerate(items) if item != slice(None)]
    if len(cut) != 1:
        return None
    (dim,) = cut
    own = items[dim]
    bounds = (own.start or 0, whole.shape[dim] if own.stop is None else own.stop)
    if own.step not in (None, 1) or not all(type(bound) is int and bound >= 0 for bound in bounds):
        return None
    source: Any = value.args[1] if value.target is copied else value  # type: ignore[union-attr]
    sizes = [*whole.shape[:dim], bounds[1] - bounds[0], *whole.shape[dim + 1 :]]
    given = example(source)
    same = [*map(size_expression, given.shape)] == [*map(size_expression, sizes)]
    return (dim, *bounds, source) if same and given.dtype == whole.dtype else None

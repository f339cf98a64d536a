"""Groups: linear layers on consecutive rows of a value, as one product in groups.

Before::

    counts = zeros([n, 3]).scatter(1, chosen, 1).long().sum(0)   # chosen, _ = topk(...)
    a, b, c = x.split([counts[0].item(), counts[1].item(), counts[2].item()])
    y = cat([linear(a, w[0]), linear(b, w[1]), linear(c, w[2])])

After::

    counts = count_keys(chosen, 3)
    y = grouped_linear(x, w, counts)

Only a run tells how many rows a group has: such a size can be followed through no graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxseek.ops.experts import count_keys
from fxseek.passes.facts import example, is_tensor, made_call, tensors_of, value_of
from fxseek.passes.rules import argument, operation

__all__ = ["join_groups"]


def join_groups(graph: fx.Graph) -> fx.Graph:
    """The graph with products in groups."""
    changed: set[fx.Node] = set()
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            found = _product(node.all_input_nodes) if _joins(node) else None
            if found is not None:
                made = made_call(graph, node, torch.ops.fxseek.grouped_linear, *found)
                node.replace_all_uses_with(made)
                changed.add(made)
        if found is None and not changed.isdisjoint(node.all_input_nodes) and _unknown(node):
            node.meta["example_value"] = value_of(node)
            changed.add(node)
    return graph


def _joins(node: fx.Node) -> bool:
    return operation(node) == "cat" and argument(node, 1, "dim", 0) == 0


def _product(parts: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Rows, weights and counts, where parts are linear layers on the pieces of a split."""
    splits: list[Any] = []
    stacks: list[Any] = []
    for index, part in enumerate(parts):
        if operation(part) != "linear" or argument(part, 2, "bias") is not None:
            return None
        piece, weight = argument(part, 0, "input"), argument(part, 1, "weight")
        if not (_is_element(piece, index) and _is_element(weight, index)):
            return None
        splits.append(piece.args[0])
        stacks.append(weight.args[0])
    if len(set(splits)) != 1 or len(set(stacks)) != 1:
        return None
    split, stack = splits[0], stacks[0]
    if operation(split) != "split" or argument(split, 2, "dim", 0) != 0 or not is_tensor(stack):
        return None
    x, counts = split.args[0], _counts(argument(split, 1, "split_size_or_sections"))
    if counts is None or example(stack).dim() != 3 or example(x).dim() != 2:
        return None
    if not len(splits) == example(stack).shape[0] == example(counts).shape[0]:
        return None
    return x, stack, _of_choices(counts) or counts


def _is_element(node: Any, index: int) -> bool:
    return operation(node) == "getitem" and node.args[1] == index


def _counts(sizes: Any) -> fx.Node | None:
    """A tensor whose elements are these sizes, in order."""
    if not isinstance(sizes, Sequence):
        return None
    sources: list[Any] = []
    for index, size in enumerate(sizes):
        if not isinstance(size, fx.Node) or size.target != "item":
            return None
        element: Any = size.args[0]
        if not _is_element(element, index):
            return None
        sources.append(element.args[0])
    single = len(set(sources)) == 1 and is_tensor(sources[0]) and example(sources[0]).dim() == 1
    return sources[0] if single else None


def _of_choices(counts: fx.Node) -> fx.Node | None:
    """Counts by a table of what each row has chosen, counted in the choices."""
    if operation(counts) != "sum" or argument(counts, 1, "dim") not in (0, [0], (0,)):
        return None
    table: Any = counts.args[0]
    while operation(table) == "to":
        table = table.args[0]
    if operation(table) != "scatter":
        return None
    zeros, dim, chosen, value = (argument(table, i, n) for i, n in enumerate(_SCATTER))
    element = operation(chosen) == "getitem" and chosen.args[1] == 1
    if not element or operation(chosen.args[0]) != "topk" or value != 1 or dim not in (1, -1):
        return None
    if argument(chosen.args[0], 2, "dim", -1) not in (1, -1) or example(chosen).dim() != 2:
        return None
    if getattr(zeros.target, "__name__", zeros.target) not in ("zeros", "new_zeros", "zeros_like"):
        return None
    return made_call(counts.graph, counts, count_keys, chosen, example(counts).shape[0])


_SCATTER = ("input", "dim", "index", "value")


def _unknown(node: fx.Node) -> bool:
    """Whether a size of the value is one that only a run tells."""
    return any(free_unbacked_symbols(x.shape) for x in tensors_of(example(node)))

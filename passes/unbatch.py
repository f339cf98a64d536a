"""Unbatch: functions of numbers under `torch.vmap` become operations on whole tensors.

Before::

    i = _add_batch_dim(queries, 0, 1)        # a number in the user's function
    j = _add_batch_dim(keys, 0, 2)
    allowed = j <= i
    row = _remove_batch_dim(allowed, 2, tokens, 0)
    mask = _remove_batch_dim(row, 1, tokens, 0)

After::

    allowed = keys[None, :] <= queries[:, None]
    mask = allowed.expand(tokens, tokens)

Attention masks are written so, as functions of one query and one key. What is a number to
the function becomes a tensor with a dimension for each level of vmap, of 1 element where the number
does not depend on that level. Elementwise operations broadcast over these, and so do tables that
are looked up by numbers. So does a function of several tensors of one rank, such as the one that a
scan combines states by. Whatever else a function does under vmap is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxseek.errors import GraphError
from fxseek.passes.facts import example, is_tensor, made_call, where
from fxseek.passes.rules import find_rule
from fxseek.passes.rules.pointwise import binary, convert, unary
from fxseek.passes.rules.registry import tensor_nodes

__all__ = ["unbatch"]

_ENTER, _LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_ADD, _REMOVE = "_add_batch_dim", "_remove_batch_dim"
_OTHER = ("_grad_increment_nesting", "_jvp_increment_nesting")
_NUMBERS = ("new_ones", "new_zeros", "new_full")
_BOOKKEEPING = "lazy_load_decompositions"


def unbatch(graph: fx.Graph) -> fx.Graph:
    """Write vmapped elementwise functions on whole tensors (in place); answers the graph.

    Raises:
        GraphError: another transform of torch.func, or another operation under vmap; a value in it
            hides a dimension.
    """
    nodes = iter(list(graph.nodes))
    for node in nodes:
        if _name(node) in _OTHER:
            raise _refusal(node)
        if _name(node) != _ENTER:
            continue
        region, depth = [node], 1
        while depth:
            region.append(found := next(nodes))
            depth += {_ENTER: 1, _LEAVE: -1}.get(_name(found), 0)
        _Region(graph, region).rewrite()
    return graph


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _refusal(node: fx.Node) -> GraphError:
    return GraphError(
        "a transform of torch.func (vmap, grad, jvp) hides a dimension of the values at "
        f"{where(node)} ({node.format_node()}): only elementwise functions are understood under "
        "vmap, of numbers or of tensors of one rank. Write the function on whole tensors, or "
        "compute that part before the call."
    )


class _Region:
    """What lies between entering the outermost vmap and leaving it."""

    def __init__(self, graph: fx.Graph, nodes: list[fx.Node]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.levels: list[int] = []
        self.rank = next((example(x).dim() for x in nodes if _name(x) == _ADD), 0)
        """How many dimensions the values have to the function."""
        self.new_of: dict[fx.Node, fx.Node] = {}
        """Values with the levels in front of their own dimensions."""
        self.removed: dict[fx.Node, tuple[fx.Node, list[Any]]] = {}
        """Results on their way out: the value with all levels, and the sizes of those removed."""

    def rewrite(self) -> None:
        """Put operations on whole tensors in the place of the region."""
        self.levels = self._levels()
        for node in self.nodes:
            with self.graph.inserting_before(node):
                self._node(node)
        for node in reversed(self.nodes):
            if not node.users and (node in self.new_of or node in self.removed or _own(node)):
                self.graph.erase_node(node)

    def _levels(self) -> list[int]:
        """The numbers by which the nodes name the levels, the outermost first."""
        levels = {int(node.args[2]) for node in self.nodes if _name(node) == _ADD}  # type: ignore[arg-type]
        entered = [_name(node) for node in self.nodes if _name(node) in (_ENTER, _LEAVE)]
        count = len(entered) // 2
        if entered != [_ENTER] * count + [_LEAVE] * count or len(levels) != count:
            raise _refusal(self.nodes[0])
        return sorted(levels)

    def _node(self, node: fx.Node) -> None:
        name = _name(node)
        if name == _ADD:
            self.new_of[node] = self._added(node)
        elif name == _REMOVE:
            self._remove(node)
        elif name in _OTHER or any(x in self.removed for x in node.all_input_nodes):
            raise _refusal(node)
        elif any(x in self.new_of for x in node.all_input_nodes):
            self.new_of[node] = self._operation(node)

    def _added(self, node: fx.Node) -> fx.Node:
        source, dim, level = node.args
        assert isinstance(source, fx.Node)
        nested = source in self.new_of or source in self.removed
        if nested or dim != 0 or example(node).dim() != self.rank:
            raise _refusal(node)
        index = tuple(slice(None) if at == level else None for at in self.levels)
        return made_call(self.graph, node, operator.getitem, source, index)

    def _remove(self, node: fx.Node) -> None:
        """Levels leave from the innermost out; with the last one, the value is of full size."""
        value, level, size, dim = node.args
        assert isinstance(value, fx.Node)
        whole, sizes = self.removed.get(value, (self.new_of.get(value), []))
        expected = self.levels[-1 - len(sizes)]
        if whole is None or level != expected or dim != 0 or len(value.users) != 1:
            raise _refusal(node)
        sizes = [size, *sizes]
        self.removed[node] = (whole, sizes)
        if len(sizes) == len(self.levels):
            own = [-1] * self.rank
            expanded = made_call(self.graph, node, "expand", whole, *sizes, *own)
            node.replace_all_uses_with(expanded)

    def _operation(self, node: fx.Node) -> fx.Node:
        if not is_tensor(node) or example(node).dim() != self.rank:
            raise _refusal(node)
        if node.op == "call_method" and node.target in _NUMBERS and self.rank == 0:
            pass  # it only takes its device and dtype from the value
        elif node.target is torch.ops.aten.index:
            table, indices = node.args
            assert isinstance(table, fx.Node)
            assert isinstance(indices, (list, tuple))
            numbers = all(is_tensor(x) and example(x).dim() == 0 for x in indices)  # type: ignore[arg-type]
            if table in self.new_of or not numbers or len(indices) != example(table).dim():
                raise _refusal(node)
            given = tuple(self.new_of.get(x, x) for x in indices)  # type: ignore[arg-type]
            return made_call(self.graph, node, operator.getitem, table, given)
        else:
            rule = find_rule(node)
            if rule is None or rule.function not in (unary, binary, convert):
                raise _refusal(node)
            if not all(self._broadcasts(x) for x in tensor_nodes((node.args, node.kwargs))):
                raise _refusal(node)
        args = map_arg(node.args, lambda x: self.new_of.get(x, x))
        kwargs = map_arg(node.kwargs, lambda x: self.new_of.get(x, x))
        return made_call(self.graph, node, node.target, *args, **kwargs)  # type: ignore[misc]

    def _broadcasts(self, operand: fx.Node) -> bool:
        """Whether an operand's own dimensions stay behind those of the levels."""
        rank = example(operand).dim()
        return rank == self.rank if operand in self.new_of else rank <= self.rank


def _own(node: fx.Node) -> bool:
    return _name(node) in (_ENTER, _LEAVE, _BOOKKEEPING)

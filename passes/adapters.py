"""Adapters: where nothing is trained, a low-rank adapter becomes part of its weight.

Before (LoRA on all tokens: four products, of which three are thin and bound by memory)::

    y = linear(x, w)                             # [batch, tokens, out]
    h = linear(linear(x, down), up)              # down [rank, in], up [out, rank]
    z = y + h * 2.0

After::

    z = linear_merged(x, w, None, ((down, up, 2.0),))      # linear(x, w + 2.0 * up @ down)

For a stage without gradient, the prefill: in the last block of scoring autograd would keep the
merged weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fxseek import _torch
from fxseek.ops.adapters import linear_merged
from fxseek.passes.facts import example
from fxseek.passes.ir import Piece, Swept, origin
from fxseek.passes.modes import regions, without_grad
from fxseek.passes.rules import argument, operation

_EXACT = (torch.float32, torch.float64)
"""Half precision would round what an adapter adds off the weight that it is added to."""


def merge_adapters(stage: Piece) -> Piece:
    """Let linear layers of a stage, and of what it runs in chunks, have their adapters merged in.

    Adapters of several names on one layer are merged one after the other.
    """
    _merge(stage.graph)
    for part in stage.parts.values():
        if isinstance(part, Swept):
            _merge(part.piece.graph)
    return stage


def _merge(graph: fx.Graph) -> None:
    autocast, unrecorded = regions(graph), without_grad(graph)
    for node in list(graph.nodes):
        found = _adapter(node)
        if found is None:
            continue
        modes = {
            (autocast.get(x), x in unrecorded)
            for x in (node, *node.all_input_nodes, *found.products)
        }
        if len(modes) > 1:
            continue
        x, weight, bias, adapters = _layer(found.products[0])
        with graph.inserting_before(node):
            args = (x, weight, bias, (*adapters, (found.down, found.up, found.scale)))
            made = graph.call_function(linear_merged, args)
        made.meta = dict(node.meta)
        if node in autocast:
            autocast[made] = autocast[node]
        if node in unrecorded:
            unrecorded.add(made)
        node.replace_all_uses_with(made)
        unused = [node]
        while unused:  # the products that the merged one stands for
            gone = unused.pop()
            operands = gone.all_input_nodes
            graph.erase_node(gone)
            unused += [x for x in operands if x.op == "call_function" and not x.users]


class _Adapter(NamedTuple):
    """``products[0] + scale * products[2]``, which is ``linear(products[1], up)``."""

    products: tuple[fx.Node, fx.Node, fx.Node]
    down: fx.Node
    up: fx.Node
    scale: float


def _adapter(node: fx.Node) -> _Adapter | None:
    """The adapter that a node adds to a linear layer, or None."""
    if operation(node) != "add" or len(node.args) != 2 or node.kwargs or not _is_tensor(node):
        return None
    for base, added in (node.args, node.args[::-1]):
        if not (_only_here(base) and _only_here(added)):
            continue
        assert isinstance(base, fx.Node) and isinstance(added, fx.Node)
        scale = 1.0
        if operation(added) == "mul" and len(added.args) == 2:
            factors = sorted(added.args, key=lambda x: not isinstance(x, fx.Node))
            if not isinstance(factors[1], (int, float)) or not _only_here(factors[0]):
                continue
            added, scale = factors[0], factors[1]
            assert isinstance(added, fx.Node)
        if not _is_layer(base) or not _is_plain(added) or not _only_here(added.args[0]):
            continue
        inner = added.args[0]
        assert isinstance(inner, fx.Node)
        if not _is_plain(inner) or inner.args[0] is not base.args[0]:
            continue
        down, up = argument(inner, 1, "weight"), argument(added, 1, "weight")
        weight = _layer(base)[1]
        if _add_up(weight, up, down) and _alike(node, base.args[0], weight, up, down):
            return _Adapter((base, inner, added), down, up, float(scale))
    return None


def _example(node: fx.Node) -> Any:
    """The example of a node, or of the captured one that it was made for."""
    return example(origin(node) or node)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(_example(node), torch.Tensor)


def _add_up(weight: fx.Node, up: fx.Node, down: fx.Node) -> bool:
    """Whether ``weight + up @ down`` is defined, without broadcasting."""
    shapes = [_example(x).shape for x in (weight, up, down)]
    if any(len(shape) != 2 for shape in shapes):
        return False
    (rows, columns), (up_rows, _), (_, down_columns) = shapes
    return (rows, columns) == (up_rows, down_columns)


def _alike(*nodes: Any) -> bool:
    """Whether values are plain tensors of one type, a wide one.

    Under autocast results are of another type than weights, and a weight that stands for a
    quantised one is of another class.
    """
    if not all(_torch.is_fake(_example(x)) for x in nodes):
        return False
    kinds = {(_example(x).dtype, _example(x).device) for x in nodes}
    return len(kinds) == 1 and _example(nodes[0]).dtype in _EXACT


def _only_here(node: Any) -> bool:
    return _is_tensor(node) and len(node.users) == 1


def _is_layer(node: fx.Node) -> bool:
    if node.target is linear_merged:
        return True
    return operation(node) == "linear" and _is_tensor(argument(node, 1, "weight"))


def _is_plain(node: fx.Node) -> bool:
    """A linear layer without a bias, and without adapters."""
    linear = operation(node) == "linear" and _is_layer(node)
    return linear and argument(node, 2, "bias") is None


def _layer(node: fx.Node) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Operand, weight, bias and adapters of a linear layer."""
    adapters = node.args[3] if node.target is linear_merged else ()
    assert isinstance(adapters, tuple)
    return node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias"), adapters


__all__ = ["merge_adapters"]

"""Scale: terms of a cross-entropy that are scaled and added up become one operation.

Before::

    l = cross_entropy(x, y, reduction="none")
    total = (l.view(b, t) * mask).sum()

After::

    a = ones_like(y, dtype=l.dtype)
    a = (a.view(b, t) * mask).reshape_as(y)     # what becomes of a term of 1: a constant
    total = scaled_cross_entropy(x, y, scale=a)

The value is the same, as long as what lies between the terms and their sum multiplies each by a
constant. Now the sum is a loss that can be taken over selected tokens. A mean over all terms is
their sum with the scale divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.ops.loss import scaled_cross_entropy
from fxseek.passes.facts import Sizes, example, is_tensor, needs_grad
from fxseek.passes.rules import argument, operation
from fxseek.passes.rules.loss import TokenLoss

_MOVES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone")
"""Operations that keep the elements and their order."""


def scale_terms(graph: fx.Graph, sizes: Sizes) -> fx.Graph:
    """A copy of `graph` whose sums and means of scaled cross-entropies are one operation each."""
    copy = fx.Graph(owning_module=graph.owning_module)
    new_of: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made = copy.node_copy(node, new_of.__getitem__)
        if operation(node) in ("sum", "mean"):
            made = _scaled_sum(copy, made, sizes) or made
        new_of[node] = made
    return copy


def _scaled_sum(graph: fx.Graph, total: fx.Node, sizes: Sizes) -> fx.Node | None:
    """The loss that stands for a sum (or a mean), or None where it is none of a cross-entropy."""
    terms = argument(total, 0, "input")
    if not is_tensor(total) or example(total).dim() != 0 or not is_tensor(terms):
        return None
    if argument(total, 3, "dtype") is not None or "dtype" in total.kwargs or not needs_grad(total):
        return None
    chain: list[tuple[fx.Node, fx.Node]] = []
    at: fx.Node = terms
    while operation(at) != "cross_entropy":
        before = _scaled_by_constants(at, sizes)
        if before is None:
            return None
        chain.append((before, at))
        at = before
    loss = TokenLoss.of(at)
    if loss is None or loss.reduction != "none":
        return None

    def make(function: Callable[..., Any], like: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(function, args, kwargs)
        node.meta = {**total.meta, "example_value": example(like)}
        return _constant(node)

    rest = {
        "weight": loss.class_weights,
        "ignore_index": loss.ignore_index,
        "label_smoothing": loss.label_smoothing,
    }
    with graph.inserting_before(total):
        if not chain and operation(total) == "sum":
            rest["reduction"] = "sum"
            made = graph.call_function(F.cross_entropy, (loss.logits, loss.target), rest)
        else:
            like: Any = loss.target
            if loss.probabilities:  # those of one class
                like = make(torch.select, at, like, 0 if example(like).dim() == 1 else 1, 0)
            ones = make(torch.ones_like, at, like, dtype=example(at).dtype)
            scale = ones
            for before, node in reversed(chain):
                scale = _again(graph, node, before, scale)
            if operation(total) == "mean":
                scale = make(_divided_by_its_size, scale, scale)
            if sizes.shape(example(scale)) != sizes.shape(example(ones)):
                scale = make(torch.Tensor.reshape_as, ones, scale, ones)
            rest["scale"] = scale
            made = graph.call_function(scaled_cross_entropy, (loss.logits, loss.target), rest)
    made.meta = dict(total.meta)
    total.replace_all_uses_with(made)
    graph.erase_node(total)
    return made


def _divided_by_its_size(scale: torch.Tensor) -> torch.Tensor:
    return scale / scale.numel()


def _again(graph: fx.Graph, node: fx.Node, before: fx.Node, operand: fx.Node) -> fx.Node:
    """A copy of `node` that reads `operand` in the place of `before`."""
    made = graph.node_copy(node, lambda x: operand if x is before else x)
    return _constant(made)


def _constant(node: fx.Node) -> fx.Node:
    """The node, whose example value was that of another of its kind, without gradient."""
    node.meta = {**node.meta, "example_value": example(node).detach()}
    return node


def _scaled_by_constants(node: fx.Node, sizes: Sizes) -> fx.Node | None:
    """The operand each of whose elements is multiplied by a constant, and keeps its place.

    None where the node does anything else.
    """
    name, args = operation(node), node.args
    if not is_tensor(node) or node.op != "call_function" or not args:
        return None
    if name in ("mul", "where"):
        scaled = [x for x in args if isinstance(x, fx.Node) and needs_grad(x)]
        operand = scaled[0] if len(scaled) == 1 else None
    else:
        operand = args[0]
    if not is_tensor(operand) or not isinstance(operand, fx.Node):
        return None
    others = [x for x in node.all_input_nodes if x is not operand]
    if any(needs_grad(x) for x in others) or not needs_grad(operand):
        return None
    if not example(node).is_floating_point():
        return None
    if name in ("to", "neg") or (name in _MOVES and example(node).dtype == example(operand).dtype):
        return operand
    if _elements(sizes, operand) != _elements(sizes, node):
        return None  # it multiplies each by several
    if name in ("mul", "div") and len(args) == 2 and not node.kwargs:
        return operand
    if name == "masked_fill" and argument(node, 2, "value") == 0:
        return operand
    if name == "where" and len(args) == 3 and args[0] is not operand:
        return operand if _is_zero(args[2] if args[1] is operand else args[1]) else None
    return None


def _is_zero(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return value.target in (torch.zeros_like, torch.zeros)
    return value == 0


def _elements(sizes: Sizes, node: fx.Node) -> list[Any]:
    """The sizes that elements are counted by."""
    return [size for size in sizes.shape(example(node)) if size != 1]


__all__ = ["scale_terms"]

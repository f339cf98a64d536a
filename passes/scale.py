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

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.ops.loss import scaled_cross_entropy
from fxseek.passes.facts import Sizes, example, is_tensor, made_call, needs_grad
from fxseek.passes.rules import argument, operation
from fxseek.passes.rules.loss import TokenLoss

_MOVES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to")
"""Operations that, where they keep the dtype, keep the elements and their order."""


def scale_terms(graph: fx.Graph, sizes: Sizes) -> fx.Graph:
    """The graph, whose sums and means of scaled cross-entropies are one operation each."""
    for node in list(graph.nodes):
        if operation(node) in ("sum", "mean"):
            _scale_sum(graph, node, sizes)
    return graph


def _scale_sum(graph: fx.Graph, total: fx.Node, sizes: Sizes) -> None:
    """Put a loss in the place of a sum (or a mean), where it is one of a cross-entropy."""
    terms = argument(total, 0, "input")
    if not is_tensor(total) or example(total).dim() != 0 or not is_tensor(terms):
        return
    if argument(total, 3, "dtype") is not None or "dtype" in total.kwargs or not needs_grad(total):
        return
    chain: list[tuple[fx.Node, fx.Node]] = []
    at: fx.Node = terms
    while operation(at) != "cross_entropy":
        before = _scaled_by_constants(at, sizes)
        if before is None:
            return
        chain.append((before, at))
        at = before
    loss = TokenLoss.of(at)
    if loss is None or loss.reduction != "none":
        return
    make = partial(made_call, graph, total)
    constants = example(at).detach()
    rest = {
        "weight": loss.class_weights,
        "ignore_index": loss.ignore_index,
        "label_smoothing": loss.label_smoothing,
    }
    with graph.inserting_before(total):
        like: Any = loss.target
        if loss.probabilities:  # those of one class
            dim = 0 if example(like).dim() == 1 else 1
            like = make(torch.select, like, dim, 0, example_value=constants)
        if all(_only_moves(before, node) for before, node in chain):  # each counts as 1
            rest["reduction"] = "sum"
            made = make(
                F.cross_entropy, loss.logits, loss.target, example_value=example(total), **rest
            )
            if operation(total) == "mean":
                made = graph.call_function(_divided_by_size_of, (made, like))
        else:
            ones = make(torch.ones_like, like, dtype=constants.dtype, example_value=constants)
            scale = ones
            for before, node in reversed(chain):
                scale = _again(graph, node, before, scale)
            if operation(total) == "mean":
                scale = make(_divided_by_size_of, scale, scale, example_value=example(scale))
            if sizes.shape(example(scale)) != sizes.shape(example(ones)):
                scale = make(torch.Tensor.reshape_as, scale, ones, example_value=constants)
            rest["scale"] = scale
            made = graph.call_function(scaled_cross_entropy, (loss.logits, loss.target), rest)
    made.meta = dict(total.meta)
    total.replace_all_uses_with(made)
    graph.erase_node(total)


def _divided_by_size_of(x: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    return x / terms.numel()


def _again(graph: fx.Graph, node: fx.Node, before: fx.Node, operand: fx.Node) -> fx.Node:
    """A copy of `node` that reads a constant, `operand`, in the place of `before`."""
    made = graph.node_copy(node, lambda x: operand if x is before else x)
    made.meta["example_value"] = example(node).detach()
    return made


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
    if name in ("to", "neg") or _only_moves(operand, node):
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


def _only_moves(before: fx.Node, node: fx.Node) -> bool:
    return operation(node) in _MOVES and example(node).dtype == example(before).dtype


def _is_zero(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return value.target in (torch.zeros_like, torch.zeros)
    return value == 0


def _elements(sizes: Sizes, node: fx.Node) -> list[Any]:
    """The sizes that elements are counted by."""
    return [size for size in sizes.shape(example(node)) if size != 1]


__all__ = ["scale_terms"]

"""Factors: products with adapted stacks of weights, without the adapted stacks.

Before::

    w = baddbmm(weight, up, down, alpha=2.0)         # of all experts, as large as their weights
    y = grouped_mm(x, transpose(w, -2, -1), offs=ends)

After::

    y = grouped_mm(x, transpose(weight, -2, -1), offs=ends)
    low = grouped_mm(x, down.mT, offs=ends)
    y = add(y, grouped_mm(low, up.mT, offs=ends), alpha=2.0)

Backward would keep the adapted weights of each layer, however few tokens are selected.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from fxseek.passes.facts import example, is_tensor, made_call
from fxseek.passes.rules import argument, operation

__all__ = ["split_factors"]

_GROUPED = ("grouped_mm", "transformers::grouped_mm_fallback")


def split_factors(graph: fx.Graph) -> fx.Graph:
    """The graph where weights and what adapters add to them are multiplied apart."""
    for node in list(graph.nodes):
        if operation(node) == "baddbmm" and _adapts(node):
            products = _products(node)
            if products is not None and all(map(_fits, products)):
                for product in products:
                    _split(product, node)
    return graph


def _adapts(node: fx.Node) -> bool:
    """Whether a node adds a product of two factors, of few columns, to a stack of matrices."""
    operands = node.args
    if len(operands) != 3 or set(node.kwargs) - {"alpha"} or not all(map(is_tensor, operands)):
        return False
    weight, up, down = map(example, operands)  # type: ignore[arg-type]
    return weight.dim() == up.dim() == down.dim() == 3 and up.shape[2] < min(weight.shape[1:])


def _products(adapted: fx.Node) -> list[fx.Node] | None:
    """The products whose right operand is the adapted stack; None where anything else reads it."""
    found: list[fx.Node] = []
    for user in adapted.users:
        if _is_transpose(user):
            products = [*user.users]
            if not all(_multiplies(product, user) for product in products):
                return None
            found += products
        elif _multiplies(user, adapted):
            found.append(user)
        else:
            return None
    return found


def _is_transpose(node: fx.Node) -> bool:
    return operation(node) == "transpose" and set(node.args[1:]) in ({-2, -1}, {1, 2})


def _multiplies(node: fx.Node, weight: fx.Node) -> bool:
    if operation(node) in _GROUPED:
        options = {key: value for key, value in node.kwargs.items() if key != "offs"}
        return node.args[1] is weight and not any(options.values()) and "offs" in node.kwargs
    return operation(node) == "bmm" and node.args[1] is weight and len(node.args) == 2


def _fits(product: fx.Node) -> bool:
    """Whether the kernel takes products with as few columns as the factors have."""
    right: Any = product.args[1]
    adapted: Any = right.args[0] if _is_transpose(right) else right
    columns = example(argument(adapted, 1, "batch1")).shape[2]
    aligned = columns * example(adapted).element_size() % 16 == 0
    return operation(product) != "grouped_mm" or aligned


def _split(product: fx.Node, adapted: fx.Node) -> None:
    """Put the sum of the products with a weight and with the factors in the place of one."""
    graph = product.graph
    right: Any = product.args[1]
    weight, up, down = adapted.args
    kind: Any = product.target
    call = partial(made_call, graph, product)
    with graph.inserting_before(product):
        first, second = up, down
        if right is not adapted:
            weight = call(torch.transpose, weight, -2, -1)
            first, second = (call(torch.transpose, x, -2, -1) for x in (down, up))
        first, second = (call(torch.Tensor.contiguous, x) for x in (first, second))
        whole = call(kind, product.args[0], weight, **product.kwargs)
        low = call(kind, product.args[0], first, **product.kwargs)
        added = call(kind, low, second, **product.kwargs)
        made = call(torch.add, whole, added, alpha=adapted.kwargs.get("alpha", 1))
    product.replace_all_uses_with(made)
    graph.erase_node(product)

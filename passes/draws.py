"""What can't be made again piece by piece: draws, and functions that act on gradients.

A stage that is run on parts of the tokens, or beside the prefill, draws other values, and a
backward that isn't linear gives another sum for each way of adding up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from fxseek.ops.attention import attend_rows
from fxseek.passes.facts import (
    Facts,
    descendants,
    example,
    hooks_gradient,
    needs_grad,
    tensors_of,
    value_of,
)
from fxseek.passes.ir import origin
from fxseek.passes.rules import argument, called, find_rule, operation

__all__ = ["acts_on_gradient", "draws_values", "of_other_values"]


def draws_values(node: fx.Node) -> bool:
    """Whether an operation is random: dropout, of attentions too; of a piece or captured.

    One that no rule knows is asked of torch, which tags its operations.
    """
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is attend_rows or operation(node) == "scaled_dot_product_attention":
        drops: Any = argument(node, 4, "dropout_p", 0.0)
        return drops != 0.0
    found = find_rule(node)
    if called(node).endswith("autograd_function_apply"):
        return any(map(draws_values, _body(node, 0)))
    if found is None:
        return _draws_by_tags(origin(node) or node)
    if found.family != "random":
        return False
    if operation(node) != "dropout":
        return True
    drops = argument(node, 1, "p", 0.5)
    return drops != 0.0 and argument(node, 2, "training", True) is not False


def acts_on_gradient(node: fx.Node) -> bool:
    """Whether an operation's backward may be other than linear: a hook, or a function of a user's.

    The gradient of a sum is then not the sum of its parts' gradients.
    """
    if node.op not in ("call_function", "call_method"):
        return False
    if hooks_gradient(node):
        return True
    if called(node).endswith("autograd_function_apply"):
        return not _is_linear(node)
    custom = isinstance(node.target, (OpOverload, OpOverloadPacket))
    return custom and find_rule(node) is None


def of_other_values(source: fx.Graph, facts: Facts, carrying: set[fx.Node]) -> set[fx.Node]:
    """What has no gradient and isn't what the prefill has: made from draws, or from a loss.

    A replayed draw is another one, and a replayed loss is that of selected tokens.
    """
    other = [
        node for node in carrying if draws_values(node) or (node in facts.plans and _is_loss(node))
    ]

    def follows(node: fx.Node) -> bool:
        tensors = list(tensors_of(example(node)))
        if not tensors or node in facts.chosen or any(free_unbacked_symbols(x) for x in tensors):
            return False
        return node in carrying or not needs_grad(node)

    return descendants(other, follows) if other else set()


def _is_loss(node: fx.Node) -> bool:
    found = find_rule(node)
    return found is not None and found.family == "loss"


_DRAWS = "fxseek: draws"
"""Where a captured node has the answer of `_draws_by_tags`."""


class _Tags(TorchDispatchMode):
    """Notes whether an operation runs that torch knows as random."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws_by_tags(node: fx.Node) -> bool:
    if example(node) is None:  # a pass has put it there
        return False
    if _DRAWS not in node.meta:
        node.meta[_DRAWS] = _draws_on_examples(node)
    return node.meta[_DRAWS]


def _draws_on_examples(node: fx.Node) -> bool:
    try:
        with _Tags() as tags:
            value_of(node, recorded=False)  # a checkpoint around the model would see it
    except Exception:  # it doesn't run on examples: in doubt, it draws
        return True
    return tags.drawn


def _body(node: fx.Node, at: int) -> Iterator[fx.Node]:
    """The operations of an autograd function's forward (0) or backward (1) graph."""
    attribute, owner = node.args[at], node.graph.owning_module
    assert isinstance(attribute, fx.Node) and owner is not None
    body = owner.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    yield from body.graph.nodes


_MOVING = (
    "bfloat16", "clone", "contiguous", "detach", "double", "expand", "flatten", "float", "getitem",
    "half", "mean", "movedim", "narrow", "neg", "permute", "reshape", "select", "squeeze", "sum",
    "t", "to", "transpose", "type_as", "unflatten", "unsqueeze",
)  # fmt: skip
_PRODUCTS = ("mul", "matmul", "mm", "bmm", "einsum", "linear")
_ZEROS = ("zeros", "zeros_like", "new_zeros")


def _is_linear(function: fx.Node) -> bool:
    """Whether the slopes that a function's backward gives are linear in those that it is given.

    Only where each operation on the way moves, scales or adds up slopes.
    """
    forward = list(_body(function, 0))
    results: Any = forward[-1].args[0][0]  # type: ignore[index]
    count = len(results) if isinstance(results, (list, tuple)) else 1
    *backward, output = _body(function, 1)
    slopes = set([node for node in backward if node.op == "placeholder"][:count])
    zeros = {node for node in backward if called(node) in _ZEROS}
    for node in backward:
        if slopes.isdisjoint(node.all_input_nodes) or node in zeros:
            continue
        if not isinstance(example(node), torch.Tensor):  # a size, say
            continue
        if not _keeps_linear(node, slopes, zeros):
            return False
        slopes.add(node)
    return slopes.union(zeros).issuperset(output.all_input_nodes)


def _keeps_linear(node: fx.Node, slopes: set[fx.Node], zeros: set[fx.Node]) -> bool:
    """Whether an operation on slopes is linear in them."""
    name, first, rest = called(node), node.args[:1], node.args[1:]
    given = [x for x in node.all_input_nodes if x in slopes]
    alone = len(given) == 1 and _times(node, given[0]) == 1
    if not example(node).is_floating_point():
        return False
    if name in ("add", "sub", "cat", "stack"):
        terms = first[0] if name in ("cat", "stack") else node.args[:2]
        nodes = slopes | zeros
        return isinstance(terms, (list, tuple)) and (
            all(isinstance(x, fx.Node) and x in nodes for x in terms)
            and nodes.issuperset(node.all_input_nodes)
        )
    if name == "where":
        nodes = slopes | zeros
        linear = all(x in nodes if isinstance(x, fx.Node) else x == 0 for x in rest)
        return first[0] not in slopes and len(rest) == 2 and linear
    if not alone:
        return False
    if name in _PRODUCTS:
        return name != "linear" or argument(node, 2, "bias") is None
    if first != (given[0],):
        return False
    if name == "div":
        return argument(node, 2, "rounding_mode") is None
    if name == "masked_fill":
        return argument(node, 2, "value") == 0
    return name in _MOVING or (name == "getattr" and rest[0] in ("T", "mT"))


def _times(node: fx.Node, operand: fx.Node) -> int:
    """How often a product reads an operand."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found.count(operand)

"""Autograd functions: an operation whose forward and backward are graphs of their own.

Dynamo captures ``Function.apply`` as ``autograd_function_apply(forward, backward, *operands)``.
The forward graph returns the results and what backward reads; the backward graph takes the
gradients of the results and that, and returns a gradient (or None) for each operand.

Proof of the law: where each operation of the forward graph has a plan that reads the selected
rows alone of every value with tokens, the graph is a chain of per-token operations, and commutes
with selecting rows; likewise the backward graph, a map of the results' gradients and the saved
values to gradients of those operands. An operand without tokens must get no gradient: that would
be a sum over tokens. Both graphs run as they are on fewer rows, so a size in them may shape
values with tokens (it follows the rows), and may enter no other operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxseek.errors import GraphError
from fxseek.passes.facts import (
    KEPT,
    Facts,
    Rows,
    Sizes,
    ancestors,
    example,
    is_tensor,
    needs_grad,
    tensors_of,
)
from fxseek.passes.ir import Selected
from fxseek.passes.rules.registry import (
    Call,
    Full,
    Length,
    Plan,
    Sample,
    find_rule,
    operation,
    rule,
    wants_of,
)

_OF_SHAPES = ("size", "dim", "ndimension", "numel")
"""Methods that read the shape of a tensor and none of its values."""


class _Linear(torch.autograd.Function):
    """A linear layer with a frozen weight and a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return slope @ weight, None


class _Gate(torch.autograd.Function):
    """Two operands and two results; what is saved has tokens too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gate = y.sigmoid()
        ctx.save_for_backward(x, gate)
        return x * gate, gate.clone()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, slope: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        return slope * gate, (slope * x + other) * gate * (1 - gate)


def _linear(x: Tensor, weight: Tensor) -> Any:
    return _Linear.apply(x, weight.detach())


def _gate(x: Tensor) -> Any:
    product, gate = _Gate.apply(x, x * 2)  # type: ignore[misc]
    return product + gate


@rule(
    "higher_order::autograd_function_apply",
    family="per-token",
    reason="its forward and its backward graph are chains of per-token operations",
    samples=(
        Sample(_linear, ("b t 5", "3 5")),
        Sample(_gate, ("b 2 t 5",)),
        Sample(_gate, ("b t 5",)),
        Sample(lambda x: _gate(x.reshape(-1, 5)), ("b t 5",)),
    ),
)
def autograd_function(call: Call) -> Plan | None:
    """An autograd function, by analysis of its two graphs."""
    node, operands = call.node, call.node.args[2:]
    if node.kwargs.get("non_differentiable_idx") or node.kwargs.get("dirty_idx"):
        return None
    forward, backward = (_body(arg) for arg in node.args[:2])
    if forward is None or backward is None:
        return None
    rows = [call.rows(operand) for operand in operands]
    if not any(rows) or any(
        found is None and is_tensor(operand) and call.facts.token_sized(operand)  # type: ignore[arg-type]
        for found, operand in zip(rows, operands, strict=True)
    ):
        return None

    run = _bound(forward, call.sizes, rows)
    if run is None:
        return None
    results, saved = _pair(forward)
    unread = _unread(node, results, run.facts)
    wanted = [*saved, *(result for i, result in enumerate(results) if i not in unread)]
    if not run.walk(ancestors(x for x in wanted if isinstance(x, fx.Node))):
        return None
    known = [None if i in unread else run.rows.get(result) for i, result in enumerate(results)]
    if not all(isinstance(x, Rows) for i, x in enumerate(known) if i not in unread):
        return None

    known += [run.rows.get(value) if isinstance(value, fx.Node) else None for value in saved]
    back = _bound(backward, call.sizes, known)
    slopes: Any = backward.output_node().args[0]
    if back is None or len(slopes) != len(operands):
        return None
    passed = [
        (slope, operand, own)
        for slope, operand, own in zip(slopes, operands, rows, strict=True)
        if isinstance(slope, fx.Node) and is_tensor(operand) and needs_grad(operand)  # type: ignore[arg-type]
    ]
    if not back.walk(ancestors(slope for slope, _, _ in passed)):
        return None
    for slope, operand, own in passed:
        if own is None or not is_tensor(slope) or back.rows.get(slope) != own:
            return None
        if back.facts.shape(slope) != call.shape(operand):  # type: ignore[arg-type]
            return None

    wants = [_want(call, operand, own) for operand, own in zip(operands, rows, strict=True)]
    args = (*node.args[:2], *wants)
    return Plan(tuple(known[: len(results)]), call.target, args, dict(node.kwargs))


def _want(call: Call, operand: Any, rows: Rows | None) -> Any:
    """An operand as the compact call takes it."""
    if rows is not None:
        return call.own(operand, rows)
    if not isinstance(operand, fx.Node):
        return operand
    value = example(operand)
    if isinstance(value, torch.SymInt):
        size = call.sizes.expression(value)
        if call.sizes.has_tokens(size):
            return Length(size.subs(call.sizes.tokens, KEPT))
    return Full(operand)


def _body(attribute: Any) -> fx.Graph | None:
    """The graph of a function as the rules read graphs, or None if it can't be had."""
    # These passes import the rules.
    from fxseek.passes.functionalise import functionalise
    from fxseek.passes.normalise import normalise

    if not isinstance(attribute, fx.Node) or attribute.op != "get_attr":
        return None
    owner = attribute.graph.owning_module
    body = None if owner is None else owner.get_submodule(str(attribute.target))
    if not isinstance(body, fx.GraphModule):
        return None
    try:
        return normalise(functionalise(body.graph).graph)
    except GraphError:  # it writes to what it is given
        return None


def _pair(forward: fx.Graph) -> tuple[list[Any], list[Any]]:
    """What a forward graph returns: results, and what backward reads."""
    results, saved = forward.output_node().args[0]  # type: ignore[misc]
    return list(results) if isinstance(results, (list, tuple)) else [results], list(saved)  # type: ignore[arg-type]


def _unread(function: fx.Node, results: list[Any], facts: Facts) -> set[int]:
    """Results without tokens that nothing reads: torch 2.11 has local variables among them."""
    users = list(function.users)
    if not all(user.target is operator.getitem for user in users):
        return set()
    read: list[Any] = [user.args[1] for user in users]
    return {
        i
        for i, x in enumerate(results)
        if i not in read and not (isinstance(x, fx.Node) and is_tensor(x) and facts.token_sized(x))
    }


def _bound(graph: fx.Graph, sizes: Sizes, rows: list[Any]) -> _Walk | None:
    """A walk of a graph whose inputs have these rows; None where they do not fit."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(rows):
        return None
    walk = _Walk(graph, sizes)
    for node, own in zip(inputs, rows, strict=True):
        if own is None:
            fits = not walk.facts.token_sized(node)
        else:
            fits = is_tensor(node) and sizes.valid(own, walk.facts.shape(node))
            walk.take(node, own)
        if not fits or walk.facts.square(node):  # a size may stand for its columns
            return None
    return walk


class _Walk:
    """Follows the rows through a graph by the rules; see the module's proof."""

    def __init__(self, graph: fx.Graph, sizes: Sizes) -> None:
        self.graph = graph
        self.facts = Facts(sizes)
        self.rows: dict[fx.Node, Any] = self.facts.rows

    def take(self, node: fx.Node, rows: Any) -> None:
        """Note that a value has tokens."""
        self.facts.rows[node] = rows
        self.facts.stream.add(node)

    def walk(self, needed: Iterable[fx.Node]) -> bool:
        """Whether each of the nodes is per-token, or has no tokens."""
        wanted = set(needed)
        return all(
            self._holds(node)
            for node in self.graph.nodes
            if node in wanted and node.op not in ("placeholder", "output")
        )

    def _holds(self, node: fx.Node) -> bool:
        carried = [operand for operand in node.all_input_nodes if operand in self.facts.stream]
        if not list(tensors_of(example(node))):
            # A size, or something read out of values.
            return not carried or (node.op == "call_method" and node.target in _OF_SHAPES)
        if not carried:
            return not self.facts.token_sized(node) and not self._sizes_of(node)
        if node.target is operator.getitem and not is_tensor(carried[0]):
            rows = self.rows[carried[0]][node.args[1]]
        else:
            rows = self._planned(node)
        parts = (rows,) if rows is None or isinstance(rows, Rows) else rows
        if not all(isinstance(own, Rows) for own in parts):
            return False
        if self.facts.square(node):
            return False
        self.take(node, rows)
        return True

    def _planned(self, node: fx.Node) -> Any:
        found = find_rule(node)
        if found is None or found.family != "per-token":
            return None
        if found.name == "squeeze":  # as it stands it would drop the rows where one is selected
            return None
        if self._sizes_of(node) and not found.layout:
            return None
        plan = found.function(Call(node, self.facts))
        if plan is None or not _same_operation(plan.target, found.name):
            return None
        whole = [want for want in wants_of(plan) if isinstance(want, (Full, Selected))]
        if any(isinstance(want, Selected) or want.node in self.facts.stream for want in whole):
            return None
        return plan.rows

    def _sizes_of(self, node: fx.Node) -> bool:
        """Whether an operand is a size, or another number that is computed."""
        return any(
            operand.op != "get_attr" and not list(tensors_of(example(operand)))
            for operand in node.all_input_nodes
        )


def _same_operation(target: Callable[..., Any], name: str) -> bool:
    """Whether a plan calls what the graph calls: the graph itself is not rewritten."""
    probe = fx.Graph().call_function(target)
    return operation(probe) == name or (name, operation(probe)) in _SPELLED_ALIKE


_SPELLED_ALIKE = {
    *((name, "reshape") for name in ("flatten", "unflatten", "unsqueeze")),
    *((name, "expand") for name in ("broadcast_to", "expand_as")),
}
"""Rules that answer with explicit sizes in place of the operation."""

"""Hoist: gathers of constants leave the learn stage.

Before::

    learn(mask_full, kept):  mask_rows = gather_rows(mask_full, kept, Rows(2, 0));  ...

After::

    gather(mask_full, kept) → mask_rows
    learn(mask_rows):  ...

The full constants are let go before the first operation that saves anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxseek.ops.attention import attend_rows, shared_mask
from fxseek.ops.rows import gather_rows
from fxseek.passes.facts import example
from fxseek.passes.ir import Argument, Gathered, Input, Parameter, Piece, Prefilled, origin
from fxseek.passes.rules import argument


def hoist_gathers(stage: Piece) -> Piece:
    """Let a stage take the rows of constants gathered: `Gathered` inputs, gathered ahead of it.

    Constants are inputs without gradient. The graph of `stage` is not to be used afterwards.
    """
    graph = stage.graph
    given = stage.placeholders()
    start = next(iter(graph.nodes))
    made: dict[Gathered, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not gather_rows:
            continue
        operand, _, rows = node.args
        unsqueezed = 0
        while operand.op == "call_function" and operand.target is torch.unsqueeze:
            operand, unsqueezed = operand.args[0], unsqueezed + 1
        source = given.get(operand)
        if not isinstance(source, (Argument, Parameter, Prefilled)):
            continue
        value = example(source.node)
        trained = isinstance(value, torch.Tensor) and value.requires_grad
        if trained and not isinstance(source, Prefilled):
            continue
        key = Gathered(source.node, unsqueezed, rows)
        if key not in made:
            with graph.inserting_before(start):
                made[key] = graph.placeholder(node.name)
            made[key].meta = dict(node.meta)
        node.replace_all_uses_with(made[key])
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.target is torch.unsqueeze and not node.users:
            graph.erase_node(node)
    items = given | {node: key for key, node in made.items()}
    inputs: list[Input] = []
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        if not node.users:
            graph.erase_node(node)
        else:
            inputs.append(items[node])
    alive = set(graph.nodes)
    compact = {node: rows for node, rows in stage.compact.items() if rows in alive}
    return Piece(graph, inputs, stage.outputs, stage.general, compact)


def masks_of_attentions(stage: Piece) -> frozenset[Gathered]:
    """The gathered inputs of a learn stage that attentions alone read, as their masks."""
    return frozenset(
        item
        for node, item in stage.placeholders().items()
        if isinstance(item, Gathered)
        and all(
            user.target is attend_rows and user.kwargs.get("mask") is node and node not in user.args
            for user in node.users
        )
    )


def share_masks(stage: Piece) -> Piece:
    """Let the attentions of a learn stage share one additive mask.

    Before::

        o1 = attend_rows(q1, k1, v1, kept, mask=mask_rows)       # boolean
        o2 = attend_rows(q2, k2, v2, kept, mask=mask_rows)

    After::

        mask = shared_mask(mask_rows, q1, k1)
        o1 = attend_rows(q1, k1, v1, kept, mask=mask); o2 = attend_rows(..., mask=mask)
    """
    made: dict[Any, Any] = {}
    given = stage.placeholders()
    for node in list(stage.graph.nodes):
        mask = node.kwargs.get("mask") if node.target is attend_rows else None
        item = given.get(mask) if isinstance(mask, fx.Node) else None
        if not isinstance(item, Gathered):
            continue
        if example(item.node).dtype != torch.bool:
            continue
        grouped = node.kwargs.get("enable_gqa", False)
        key = (mask, grouped, _heads(node) if grouped else None)
        if key not in made:
            with stage.graph.inserting_before(node):
                made[key] = stage.graph.call_function(
                    shared_mask, (mask, *node.args[:2]), {"enable_gqa": grouped}
                )
        node.update_kwarg("mask", made[key])
    return stage


def _heads(attention: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """How many heads queries and keys of an attention of the learn stage have."""
    captured = origin(attention)
    assert captured is not None
    operands = (argument(captured, 0, "query"), argument(captured, 1, "key"))
    return tuple(example(x).shape[-3] for x in operands if isinstance(x, fx.Node))

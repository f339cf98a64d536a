"""Pass 6, hoist: gathers of constants leave the learn stage.

Before::

    learn(mask_full, kept):  mask_rows = gather_rows(mask_full, kept, 2, 0);  ...

After::

    gather(mask_full, kept) → mask_rows
    learn(mask_rows):  ...

The full constants are let go before the first operation that saves anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxseek.passes.ditch import StageGraph, StageInput
from fxseek.passes.facts import example
from fxseek.passes.rules import argument
from fxseek.rows import attend_rows, gather_rows, shared_mask


def hoist_gathers(
    stage: StageGraph,
) -> tuple[StageGraph, list[tuple[StageInput, tuple[Any, ...]]]]:
    """Split off the gathers whose operand is a stage input without gradient.

    Returns the stage that takes gathered rows, and the gathers: for each the new input and
    (leading dimensions to add, row, batch, packed, heads).
    """
    graph = stage.graph
    given = stage.placeholders()
    start = next(iter(graph.nodes))
    gathers: list[tuple[StageInput, tuple[Any, ...]]] = []
    made: dict[StageInput, Any] = {}
    for node in list(graph.nodes):
        if node.target is not gather_rows:
            continue
        operand, _, *where = node.args
        unsqueezed = 0
        while operand.op == "call_function" and operand.target is torch.unsqueeze:
            operand, unsqueezed = operand.args[0], unsqueezed + 1
        source = given.get(operand)
        if source is None or source.node is None or source.kind not in ("input", "value"):
            continue
        value = source.node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.requires_grad and source.kind == "input":
            continue
        key = StageInput("gathered", source.node, f"{unsqueezed},{where}")
        if key not in made:
            with graph.inserting_before(start):
                made[key] = graph.placeholder(node.name)
            made[key].meta = dict(node.meta)
            gathers.append((key, (unsqueezed, *where)))
        node.replace_all_uses_with(made[key])
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.target is torch.unsqueeze and not node.users:
            graph.erase_node(node)
    inputs: list[StageInput] = []
    by_placeholder = {node: key for key, node in made.items()}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        if not node.users:
            graph.erase_node(node)
        else:
            inputs.append(by_placeholder.get(node) or given[node])
    alive = set(graph.nodes)
    compact = {node: made for node, made in stage.compact.items() if made in alive}
    return StageGraph(graph, inputs, stage.outputs, stage.general, compact), gathers


def masks_of_attentions(stage: StageGraph) -> set[StageInput]:
    """The gathered inputs of a learn stage that attentions alone read, as their masks."""
    return {
        item
        for node, item in stage.placeholders().items()
        if item.kind == "gathered"
        and all(
            user.target is attend_rows and user.kwargs.get("mask") is node and node not in user.args
            for user in node.users
        )
    }


def share_masks(stage: StageGraph) -> None:
    """Let the attentions of a learn stage share one additive mask (in place).

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
        if item is None or item.node is None or item.kind != "gathered":
            continue
        if item.node.meta["example_value"].dtype != torch.bool:
            continue
        grouped = node.kwargs.get("enable_gqa", False)
        key = (mask, grouped, _heads(item.node.graph, node) if grouped else None)
        if key not in made:
            with stage.graph.inserting_before(node):
                made[key] = stage.graph.call_function(
                    shared_mask, (mask, *node.args[:2]), {"enable_gqa": grouped}
                )
        node.update_kwarg("mask", made[key])


def _heads(captured: fx.Graph, attention: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """How many heads queries and keys of an attention of the learn stage have."""
    name = attention.meta["fxseek"][1]
    origin = next(node for node in captured.nodes if node.name == name)
    operands = (argument(origin, 0, "query"), argument(origin, 1, "key"))
    return tuple(example(x).shape[-3] for x in operands if isinstance(x, fx.Node))

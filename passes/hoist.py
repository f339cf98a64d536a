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

from fxseek.passes.ditch import StageGraph, StageInput
from fxseek.rows import gather_rows


def hoist_gathers(
    stage: StageGraph,
) -> tuple[StageGraph, list[tuple[StageInput, tuple[Any, ...]]]]:
    """Split off the gathers whose operand is a stage input without gradient.

    Returns the stage that takes gathered rows, and the gathers: for each the new input and
    (leading dimensions to add, row, batch, packed, heads).
    """
    graph = stage.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    kind_of = dict(zip(placeholders, stage.inputs, strict=True))
    gathers: list[tuple[StageInput, tuple[Any, ...]]] = []
    made: dict[StageInput, Any] = {}
    for node in list(graph.nodes):
        if node.target is not gather_rows:
            continue
        operand, _, *where = node.args
        unsqueezed = 0
        while operand.op == "call_function" and operand.target is torch.unsqueeze:
            operand, unsqueezed = operand.args[0], unsqueezed + 1
        source = kind_of.get(operand)
        if source is None or source.node is None or source.kind not in ("input", "value"):
            continue
        value = source.node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.requires_grad and source.kind == "input":
            continue
        key = StageInput("gathered", source.node, f"{unsqueezed},{where}")
        if key not in made:
            with graph.inserting_before(placeholders[0]):
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
            inputs.append(by_placeholder.get(node) or kind_of[node])
    alive = set(graph.nodes)
    compact = {node: made for node, made in stage.compact.items() if made in alive}
    return StageGraph(graph, inputs, stage.outputs, stage.general, compact), gathers

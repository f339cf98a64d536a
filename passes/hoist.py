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

from fxseek import _torch
from fxseek.ops.attention import CausalRows, attend_rows, shared_mask
from fxseek.ops.rows import gather_rows
from fxseek.passes.facts import example
from fxseek.passes.ir import (
    Argument,
    Gathered,
    Parameter,
    Piece,
    Prefilled,
    Selected,
    origin,
    placeholder_of,
)
from fxseek.passes.modes import erase_unread
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
    erase_unread(graph)
    return stage.edited(given | {node: key for key, node in made.items()})


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


def mask_by_flags(stage: Piece) -> Piece:
    """Let the attentions of a learn stage share one causal mask in the place of their flags.

    Before::

        o1 = attend_rows(q1, k1, v1, kept, is_causal=True)
        o2 = attend_rows(q2, k2, v2, kept, is_causal=True)

    After::

        mask = CausalRows(kept, consecutive)
        o1 = attend_rows(q1, k1, v1, kept, mask=mask); o2 = attend_rows(..., mask=mask)
    """
    attentions = stage.graph.find_nodes(op="call_function", target=attend_rows)
    flagged = [x for x in attentions if x.kwargs.get("is_causal") is True and _batched(x)]
    if not flagged:
        return stage
    items = stage.placeholders()
    kept = flagged[0].args[3]
    assert isinstance(kept, fx.Node)
    with stage.graph.inserting_after(kept):
        consecutive = placeholder_of(stage.graph, Selected("consecutive"))
    with stage.graph.inserting_before(next(x for x in stage.graph.nodes if x.op != "placeholder")):
        mask = stage.graph.call_function(CausalRows, (kept, consecutive))
    for node in flagged:
        node.update_kwarg("is_causal", False)
        node.update_kwarg("mask", mask)
    return stage.edited({**items, consecutive: Selected("consecutive")})


def _batched(attention: fx.Node) -> bool:
    """Whether the operands are [batch, heads, tokens, width], with as many keys as queries."""
    query, key = _shapes(attention)
    queries, keys = (_torch.size_expression(shape[-2]) for shape in (query, key))
    batch_dim = attention.kwargs.get("batch_dim")  # None with one row
    return batch_dim in (0, None) and len(query) == 4 and queries == keys


def _shapes(attention: fx.Node) -> list[torch.Size]:
    """The sizes of queries and keys, as captured, of an attention of the learn stage."""
    captured = origin(attention)
    assert captured is not None
    operands = (argument(captured, i, name) for i, name in enumerate(("query", "key")))
    return [example(x).shape for x in operands]


def share_masks(stage: Piece) -> Piece:
    """Let the attentions of a learn stage share one additive mask.

    Before::

        o1 = attend_rows(q1, k1, v1, kept, mask=mask_rows)       # boolean
        o2 = attend_rows(q2, k2, v2, kept, mask=mask_rows)

    After::

        mask = shared_mask(mask_rows, q1, k1, v1, dropout_p=0.0, enable_gqa=False)
        o1 = attend_rows(q1, k1, v1, kept, mask=mask); o2 = attend_rows(..., mask=mask)
    """
    made: dict[Any, Any] = {}
    given = stage.placeholders()
    for node in list(stage.graph.nodes):
        mask = node.kwargs.get("mask") if node.target is attend_rows else None
        if not isinstance(mask, fx.Node):
            continue
        item = given.get(mask)
        boolean = isinstance(item, Gathered) and example(item.node).dtype == torch.bool
        if not boolean and mask.target is not CausalRows:
            continue
        grouped = node.kwargs.get("enable_gqa", False)
        options = {"dropout_p": node.kwargs.get("dropout_p", 0.0), "enable_gqa": grouped}
        heads = tuple(shape[-3] for shape in _shapes(node)) if grouped else None
        key = (mask, *options.values(), heads)
        if key not in made:
            with stage.graph.inserting_before(node):
                made[key] = stage.graph.call_function(shared_mask, (mask, *node.args[:3]), options)
        node.update_kwarg("mask", made[key])
    return stage

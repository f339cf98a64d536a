"""Chunks: what lies between two attentions runs on chunks of tokens in the prefill.

Before::

    x1 = add(x0, linear(o0, wo)); h = mlp(norm(x1)); x2 = add(x1, h)     # [batch, tokens, ...]
    q, k, v = linear(norm(x2), ...)
    o1 = sdpa(q, k, v)

After::

    x2, q, k, v = tokens_1(o0, x0, ...)      # the same on chunks of tokens, one after the other
    o1 = sdpa(q, k, v)

A region is what rules know to be per-token and what has the same attentions in front of it. Its
inner values, of which an MLP's are the largest of a forward, exist for one chunk at a time.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxseek.errors import GraphError
from fxseek.passes.ditch import ditch
from fxseek.passes.facts import Facts, Rows, is_tensor
from fxseek.passes.ir import Piece, Swept, origin
from fxseek.passes.tokens import per_token


def chunk_tokens(prefill: Piece, source: fx.Graph, facts: Facts, size: int) -> Piece:
    """Let a prefill run its per-token regions on `size` tokens at a time."""
    made = ((origin(node), node) for node in prefill.graph.nodes)
    copies = {captured: node for captured, node in made if captured is not None}
    for region in _regions(source, facts, set(copies)):
        piece = _outlined(region, source, facts, copies)
        if piece is not None:
            rows: Any = {node: facts.rows[node] for node in (*piece.given(), *piece.outputs)}
            _call(prefill, region, Swept(piece, rows, size), copies)
    return prefill


def _regions(source: fx.Graph, facts: Facts, present: set[fx.Node]) -> list[set[fx.Node]]:
    """Per-token nodes, by the number of operations on their way that mix tokens."""
    level: dict[fx.Node, int] = {}
    regions: dict[int, set[fx.Node]] = {}
    for node in source.nodes:
        followed = node in facts.chosen or (node in facts.stream and facts.token_sized(node))
        if node not in present or not followed:
            continue
        before = [level[x] for x in node.all_input_nodes if x in level]
        level[node] = max(before, default=0)
        if node.op == "placeholder":
            continue
        if per_token(node, facts):
            regions.setdefault(level[node], set()).add(node)
        else:
            level[node] += 1
    return list(regions.values())


def _outlined(
    region: set[fx.Node], source: fx.Graph, facts: Facts, copies: dict[fx.Node, fx.Node]
) -> Piece | None:
    """A region as a piece of its own; None where rows of what it takes are not enough."""
    for node in source.nodes:  # memory that choices are written into
        readers = {user for user in node.users if user in copies}
        like_a_choice = any(x in region and x in facts.chosen for x in node.all_input_nodes)
        if node in copies and like_a_choice and readers and readers <= region:
            region.add(node)
    inside = {copies[node] for node in region}
    outputs = [
        node
        for node in source.nodes
        if node in region and any(user not in inside for user in copies[node].users)
    ]
    given = {
        operand
        for node in region
        for operand in node.all_input_nodes
        if operand not in region
        and operand.op != "placeholder"
        and operand in facts.stream
        and facts.token_sized(operand)
        and _whole_rows(operand, facts)
    }
    if not given or not all(_whole_rows(node, facts) for node in outputs):
        return None
    try:
        piece = ditch(
            source,
            facts,
            carrying=(region & facts.stream) - facts.chosen,
            outputs=[("rows", x) for x in outputs],
            given=given,
        )
    except GraphError:
        return None
    return piece if piece.runs_on_rows() else None


def _call(
    prefill: Piece, region: set[fx.Node], swept: Swept, copies: dict[fx.Node, fx.Node]
) -> None:
    """Let a prefill call a piece in a region's place, if there is a place for the call."""
    inside = {copies[node] for node in region}
    outputs = swept.piece.outputs
    order = {node: index for index, node in enumerate(prefill.graph.nodes)}
    arguments = [copies.get(node) for node in swept.piece.reads()]
    users = [user for node in outputs for user in copies[node].users if user not in inside]
    first = min(users, key=order.__getitem__)
    if any(x is None or x in inside or order[x] >= order[first] for x in arguments):
        return
    name = f"tokens_{len(prefill.parts)}"
    prefill.parts[name] = swept
    with prefill.graph.inserting_before(first):
        called = prefill.graph.create_node("call_module", name, tuple(arguments))
        for index, node in enumerate(outputs):
            made = prefill.graph.call_function(operator.getitem, (called, index))
            made.meta = dict(copies[node].meta)
            old = copies[node]
            for user in [user for user in old.users if user not in inside]:
                user.replace_input_with(old, made)
            copies[node] = made
    for node in reversed([node for node in prefill.graph.nodes if node in inside]):
        prefill.graph.erase_node(node)


def _whole_rows(node: fx.Node, facts: Facts) -> bool:
    """Whether a value is one tensor whose token dimension is the tokens alone."""
    rows = facts.rows.get(node)
    return is_tensor(node) and isinstance(rows, Rows) and not rows.packed


__all__ = ["chunk_tokens"]

"""Pass 8, chunks: what lies between two attentions runs on chunks of tokens in the prefill.

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

from torch import fx

from fxseek.chunks import ChunkedRegion
from fxseek.errors import GraphError
from fxseek.passes.ditch import StageGraph, ditch
from fxseek.passes.facts import Facts, Rows, is_tensor
from fxseek.passes.tokens import per_token


def chunk_tokens(prefill: StageGraph, source: fx.Graph, facts: Facts, size: int) -> int:
    """Run the per-token regions of a prefill on `size` tokens at a time (in place).

    Answers how many regions it found.
    """
    captured = {node.name: node for node in source.nodes}
    copies = {
        captured[node.meta["fxseek"][1]]: node
        for node in prefill.graph.nodes
        if node.meta.get("fxseek", ("",))[0] == "extract"
    }
    for node, item in zip(prefill.graph.nodes, prefill.inputs, strict=False):
        assert item.node is not None
        copies[item.node] = node
    count = 0
    for region in _regions(source, facts, set(copies)):
        count += _replace(prefill, source, facts, region, copies, size, count)
    return count


def _regions(source: fx.Graph, facts: Facts, present: set[fx.Node]) -> list[set[fx.Node]]:
    """Per-token nodes, by the number of operations on their way that mix tokens."""
    level: dict[fx.Node, int] = {}
    regions: dict[int, set[fx.Node]] = {}
    for node in source.nodes:
        if node not in present or node not in facts.stream or not facts.token_sized(node):
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


def _replace(
    prefill: StageGraph,
    source: fx.Graph,
    facts: Facts,
    region: set[fx.Node],
    copies: dict[fx.Node, fx.Node],
    size: int,
    number: int,
) -> bool:
    """Let one region be a call of a module; no where it has no place or shape for that."""
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
        return False
    try:
        stage = ditch(
            source, facts, carrying=region, outputs=[("rows", x) for x in outputs], given=given
        )
    except GraphError:
        return False
    if stage.general or any(item.kind not in _KINDS for item in stage.inputs):
        return False
    order = {node: index for index, node in enumerate(prefill.graph.nodes)}
    arguments = [copies.get(x.node) for x in stage.inputs if x.node is not None]
    users = [user for node in outputs for user in copies[node].users if user not in inside]
    first = min(users, key=order.__getitem__)
    if any(x is None or x in inside or order[x] >= order[first] for x in arguments):
        return False
    name = f"tokens_{number}"
    rows = [facts.rows[node] for node in outputs]
    prefill.modules[name] = ChunkedRegion(stage, facts.rows, rows, size)  # type: ignore[arg-type]
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
    return True


_KINDS = ("input", "value", "rows", "kept")


def _whole_rows(node: fx.Node, facts: Facts) -> bool:
    """Whether a value is one tensor whose token dimension is the tokens alone."""
    rows = facts.rows.get(node)
    return is_tensor(node) and isinstance(rows, Rows) and not rows.packed


__all__ = ["chunk_tokens"]

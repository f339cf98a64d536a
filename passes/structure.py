"""Pass 4, split: find the loss, the attentions, and the cut points of the residual stream.

Every path from the tokens to the loss goes through the residual stream; the values that all
paths share are the dominators of the loss. The last of them before the last attention is the
input of the last block (z^(L-1) in the paper), the first after it is where the rest of the
model is per-token again.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from fxseek.passes.facts import Facts, ancestors, example, is_tensor
from fxseek.passes.rules import operation


@dataclass(frozen=True)
class Structure:
    """Where a captured model can be cut.

    `loss`: the token loss (a scalar cross-entropy), or None; `outputs`: what the graph
    returns; `attentions`: attention nodes in order (SDPA calls, or the softmax of tokens ×
    tokens); `block_input` and `block_exit`: the stream before and after the last attention.
    """

    outputs: tuple[fx.Node, ...]
    loss: fx.Node | None
    attentions: tuple[fx.Node, ...]
    block_input: fx.Node | None
    block_exit: fx.Node | None
    stream_cuts: tuple[fx.Node, ...]


def find_structure(graph: fx.Graph, facts: Facts) -> Structure:
    """Find loss, attentions and cut points of a graph with token facts."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    outputs = tuple(output.all_input_nodes)
    losses = [
        node
        for node in graph.nodes
        if operation(node) == "cross_entropy" and node in facts.plans and facts.rows[node] is None
    ]
    loss = losses[0] if losses else None
    results = [node for node in outputs if node in facts.stream and is_tensor(node)]
    sinks = [loss] if loss is not None else results
    before = ancestors(sinks)
    attentions = tuple(
        node for node in graph.nodes if node in before and _is_attention(node, facts)
    )
    cuts = _cuts(graph, facts, before, sinks)
    entry = leave = None
    if attentions and cuts:
        last = attentions[-1]
        up = ancestors([last]) - {last}
        earlier = [node for node in cuts if node in up]
        entry = earlier[-1] if earlier else None
        down = [node for node in cuts if node is not last and last in ancestors([node])]
        leave = down[0] if down else None
    return Structure(outputs, loss, attentions, entry, leave, tuple(cuts))


def _is_attention(node: fx.Node, facts: Facts) -> bool:
    name = operation(node)
    if name == "scaled_dot_product_attention":
        return node in facts.plans
    if name != "softmax" or node not in facts.plans:
        return False
    return facts.square(node)


def _cuts(
    graph: fx.Graph, facts: Facts, before: set[fx.Node], sinks: list[fx.Node]
) -> list[fx.Node]:
    """Nodes that every path of the stream to the sinks goes through, in order."""
    members = [
        node
        for node in graph.nodes
        if node in before and node in facts.stream and node.op != "placeholder"
    ]
    streamed = {node for node in members if _from_tokens(node, facts)}
    flow: nx.DiGraph = nx.DiGraph()
    start, end = "start", "end"
    for node in streamed:
        operands = [operand for operand in node.all_input_nodes if operand in streamed]
        for operand in operands:
            flow.add_edge(operand, node)
        if not operands:
            flow.add_edge(start, node)
    for sink in sinks:
        if sink in streamed:
            flow.add_edge(sink, end)
    if start not in flow or end not in flow or not nx.has_path(flow, start, end):
        return []
    parents = nx.immediate_dominators(flow, start)
    cuts: list[fx.Node] = []
    at = parents[end]
    while at != start:
        if is_tensor(at) and facts.token_sized(at):
            cuts.append(at)
        at = parents[at]
    cuts.reverse()
    return cuts


def _from_tokens(node: fx.Node, facts: Facts) -> bool:
    return node in facts.token_made


__all__ = ["Structure", "example", "find_structure"]

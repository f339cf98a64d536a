"""Split: find the loss, the attentions, and the cut points of the residual stream.

Every path from the tokens to the loss goes through the residual stream; the values that all
paths share are the dominators of the loss. The last of them before the last attention is the
input of the last block (z^(L-1) in the paper), the first after it is where the rest of the
model is per-token again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxseek.passes.facts import (
    Facts,
    Rows,
    ancestors,
    descendants,
    example,
    is_tensor,
    needs_grad,
    where,
    written_out,
)
from fxseek.passes.rules import Call, argument, called, operation


@dataclass(frozen=True)
class Structure:
    """Where a captured model can be cut.

    `losses`: the cross-entropies over tokens that are (part of) what is minimised, each a scalar
    that is taken over selected tokens; `loss`: the first of them, or None; `objective`: the token
    loss where it is the only one, else the only scalar with gradient that the graph returns (the
    loss of a classifier, a sum of several), or None; `unrestricted`: operations by which other
    values of tokens are made a part of what is minimised; `pooled`: places in a row that the model
    reads one by one on the way to an objective without token loss, as constants or as nodes that
    hold positions; `has_loss`: the graph returns the loss; `left`:
    it is left to the caller, who is given values of tokens; `attentions`: attention nodes in order
    (SDPA calls, or the softmax of tokens × tokens); `block_input` and `block_exit`: the stream
    before and after the last attention.
    """

    has_loss: bool
    left: bool
    losses: tuple[fx.Node, ...]
    objective: fx.Node | None
    unrestricted: tuple[fx.Node, ...]
    pooled: tuple[Place, ...]
    attentions: tuple[fx.Node, ...]
    block_input: fx.Node | None
    block_exit: fx.Node | None
    stream_cuts: tuple[fx.Node, ...]

    @property
    def loss(self) -> fx.Node | None:
        """The (first) token loss."""
        return self.losses[0] if self.losses else None

    def notes(self) -> list[str]:
        """What of the loss is not taken over selected tokens, for a person."""
        if self.left:
            return [
                "the loss is computed outside the model, from values of all tokens; their gradients"
                " are those of the selected tokens, and get smaller with the ratio. If the model "
                "computes it, from arguments that are not called labels, compile with "
                "loss=lambda outputs, batch: outputs.loss"
            ]
        if not self.losses and (self.pooled or not self.has_loss):
            return []
        if not self.losses:
            return [
                "no cross-entropy over tokens was found in the captured graph that the loss is made"
                " of, so the loss keeps its full-token value; its gradients are those of the "
                "selected tokens"
            ]
        notes = (
            f"a part of the loss is no cross-entropy over tokens that fxseek can take over the "
            f"selected ones ({called(node)}: {where(node)}): it keeps its "
            f"full-token value; its gradients are those of the selected tokens"
            for node in self.unrestricted
        )
        return list(dict.fromkeys(notes))  # one line of the model may make several operations


def find_structure(
    graph: fx.Graph,
    facts: Facts,
    *,
    loss_first: bool = False,
    loss: fx.Node | None = None,
    labelled: bool = True,
) -> Structure:
    """Find loss, attentions and cut points of a graph with token facts.

    `loss_first`: what is minimised is the first scalar that the graph returns, and no other.
    `loss`: it is this one, which stands for a loss outside the graph. Without labels
    (`labelled`), a graph that has no cross-entropy and returns values of tokens leaves its loss to
    the caller, whatever scalars it returns.
    """
    outputs = tuple(graph.output_node().all_input_nodes)
    results = [node for node in outputs if node in facts.stream and is_tensor(node)]
    scalars = [node for node in outputs if is_tensor(node) and _trained_scalar(node)]
    minimised = scalars[:1] if loss_first else scalars
    if loss is not None:
        minimised = [loss]
    made_of = ancestors(minimised or outputs)
    losses = [
        node
        for node in graph.nodes
        if node in made_of
        and operation(node) == "cross_entropy"
        and node in facts.plans
        and facts.rows[node] is None
    ]
    unrestricted = _unrestricted(minimised, losses, facts) if losses else []
    sized = [node for node in results if needs_grad(node) and facts.token_sized(node)]
    left = loss is None and not losses and bool(sized) and not (scalars and labelled)
    if left:
        objective = None
    elif len(losses) == 1:
        objective = losses[0]
    else:
        objective = minimised[0] if len(minimised) == 1 else None
    sinks = results if objective is None else [objective]
    before = ancestors(sinks)
    attentions = tuple(
        node for node in graph.nodes if node in before and _is_attention(node, facts)
    )
    cuts = _cuts(facts, before, sinks, losses)
    entry = leave = None
    if attentions and cuts:
        last = attentions[-1]
        up = ancestors([last]) - {last}
        earlier = [node for node in cuts if node in up]
        entry = earlier[-1] if earlier else None
        after = descendants([last]) - {last}
        down = [node for node in cuts if node in after]
        leave = down[0] if down else None
    pooled = () if losses else tuple(_pooled(graph, facts, before))
    return Structure(
        loss is None and not left and bool(scalars),
        left,
        tuple(losses),
        objective,
        tuple(unrestricted),
        pooled,
        attentions,
        entry,
        leave,
        tuple(cuts),
    )


def _unrestricted(minimised: list[fx.Node], losses: list[fx.Node], facts: Facts) -> list[fx.Node]:
    """Where values without tokens are made of tokens, on the way back from what is minimised."""
    found: dict[fx.Node, None] = {}
    seen = set(losses)
    queue = list(minimised)
    while queue:
        node = queue.pop()
        if node in seen or not needs_grad(node):
            continue
        seen.add(node)
        if any(needs_grad(x) and facts.token_sized(x) for x in node.all_input_nodes):
            found[node] = None
        else:
            queue.extend(node.all_input_nodes)
    return list(found)


def _trained_scalar(node: fx.Node) -> bool:
    return example(node).dim() == 0 and needs_grad(node)


@dataclass(frozen=True)
class Place:
    """A place in the rows: a constant (negative from the end) or a node that holds positions.

    `each`: the node holds one position for each row of the batch, and not some for all of them.
    """

    position: int | fx.Node
    each: bool = False


def _pooled(graph: fx.Graph, facts: Facts, before: set[fx.Node]) -> Iterator[Place]:
    """Places that indexing picks out of the token row, such as ``hidden[:, 0]``.

    A step that selects other tokens alone would have no gradient at all, or another one.
    """
    for node in graph.nodes:
        name = operation(node)
        if node not in before or not needs_grad(node) or name not in _PICKS:
            continue
        call = Call(node, facts)
        source = call.arg(0, "input")
        rows = facts.rows.get(source)
        if not isinstance(rows, Rows) or rows.packed:
            continue
        rank = example(source).dim()
        if name == "getitem":
            items = written_out(node.args[1], rank) or [None]
            if any(x is None or (isinstance(x, fx.Node) and example(x) is None) for x in items):
                continue
            item = items[rows.row]
            rest = None if rows.batch is None else items[rows.batch]
            yield from _places(item, each=isinstance(rest, fx.Node))
            continue
        dim, start = call.arg(1, "dim"), call.arg(2, "index", call.arg(2, "start"))
        if not isinstance(dim, int) or dim % rank != rows.row or not isinstance(start, int):
            continue
        length = call.arg(3, "length") if name == "narrow" else 1
        if isinstance(length, int):
            yield from (Place(start + i) for i in range(length))


_PICKS = ("getitem", "select", "narrow")


def _places(item: Any, *, each: bool) -> Iterator[Place]:
    """The places that one entry of a subscript picks; none of those that grow with the row."""
    if isinstance(item, bool):
        return
    if isinstance(item, int):
        yield Place(item)
    elif isinstance(item, slice):
        start, stop = item.start or 0, item.stop
        if not all(isinstance(x, int | None) for x in (item.start, item.stop, item.step)):
            return
        if stop is None and start < 0:
            stop = 0
        if stop is not None and (start >= 0) == (stop > 0):  # both from one end
            yield from (Place(i) for i in range(start, stop, item.step or 1))
    elif isinstance(item, fx.Node) and is_tensor(item):
        value = example(item)
        if not value.is_floating_point() and value.dtype != torch.bool and value.dim() <= 1:
            yield Place(item, each)


def _is_attention(node: fx.Node, facts: Facts) -> bool:
    name = operation(node)
    if name == "scaled_dot_product_attention":
        key = argument(node, 1, "key")
        assert isinstance(key, fx.Node)
        # of the tokens themselves, perhaps behind a prefix, and not of an encoder's
        beyond = facts.shape(key)[-2] - facts.sizes.tokens
        return node in facts.plans and bool(beyond.is_Integer)
    if name != "softmax" or node not in facts.plans:
        return False
    return facts.square(node)


def _cuts(
    facts: Facts, before: set[fx.Node], sinks: list[fx.Node], losses: list[fx.Node]
) -> list[fx.Node]:
    """Nodes that every path of the stream to the sinks goes through, in order.

    What a loss takes for constants, such as targets made from the tokens, is on no path.
    """
    made = {
        node
        for node in before
        if node in facts.stream and node in facts.token_made and node.op != "placeholder"
    }
    # positions and counts that come from the stream (which expert a token goes to) are on its paths
    streamed = made | (descendants(made) & before)
    flow: nx.DiGraph = nx.DiGraph()
    start, end = "start", "end"
    for node in streamed:
        operands = [operand for operand in node.all_input_nodes if operand in streamed]
        if node in losses:
            logits = argument(node, 0, "input")
            operands = [x for x in operands if x is logits or needs_grad(x)]
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
        if at in made and is_tensor(at) and facts.token_sized(at):
            cuts.append(at)
        at = parents[at]
    cuts.reverse()
    return cuts


__all__ = ["Place", "Structure", "find_structure"]

"""Extract: the part of the captured graph that a stage reads, unchanged.

The prefill and the score stage run captured operations on all tokens. Extracting from the
values that later stages ask for leaves dead code behind: no logits unless something reads
them, nothing after the last keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from fxseek.passes.facts import ancestors, hooks_gradient, leaves_autocast, switches_grad
from fxseek.passes.ir import Input, Piece, input_of, placeholder_of
from fxseek.passes.modes import regions


def extract(
    source: fx.Graph,
    outputs: Sequence[fx.Node],
    *,
    given: Iterable[fx.Node] = (),
    grad_modes: bool = False,
) -> Piece:
    """The nodes between `given` (and the inputs) and `outputs`, as a graph of their own.

    Placeholders of the result stand for inputs of the captured graph or for given values.
    `grad_modes` keeps the captured switches of the grad mode, and hooks on gradients; a stage that
    runs without grad as a whole must not have them.
    """
    stops = set(given)
    made = ancestors(outputs, lambda node: node not in stops and node.op != "placeholder")
    taken = {x for node in made for x in node.all_input_nodes}.union(outputs) - made
    in_regions = regions(source)
    inside = {region for node in made for region in in_regions.get(node, ())}
    graph = fx.Graph(owning_module=source.owning_module)
    new_of: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    for node in source.nodes:
        if node in taken:
            inputs.append(input_of(node))
            new_of[node] = placeholder_of(graph, inputs[-1])
            new_of[node].meta |= node.meta
    for node in source.nodes:
        if switches_grad(node):
            if grad_modes:
                graph.node_copy(node)
            continue
        closes = leaves_autocast(node) and node.args[0] in inside
        if node in taken or not (node in made or node in inside or closes):
            continue
        if hooks_gradient(node) and not grad_modes:
            new_of[node] = new_of[node.args[0]]  # type: ignore[index]
            continue
        new_of[node] = graph.node_copy(node, new_of.__getitem__)
        new_of[node].meta["origin"] = node
    graph.output(tuple(new_of[node] for node in outputs))
    return Piece(graph, inputs, list(outputs))


__all__ = ["extract"]

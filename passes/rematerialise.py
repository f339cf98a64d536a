"""Rematerialise: what backward can make again cheaply instead of keeping it.

Before (what autograd saves is marked)::

    n = norm(x) *                           h = linear(n, w)
    a = silu(h) *                           p = a * u *                 y = linear(p, v)

After, with x, h and u saved::

    norm | linear | silu, mul | linear      # {norm} is made again from x, {silu, mul} from h and u

A region is what follows from a few values without any product: norms, activations, rotations,
casts, layout. Regions end at products, attentions and draws, where the residual stream is all that
goes on, and at the next attention where something else goes on too. What latents are expanded to
(`latents.py`) is made again, products and all. Whether making a region again saves memory is known
when it is run: `fxseek.run.selective`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
from torch import fx

from fxseek.passes.facts import needs_grad
from fxseek.passes.ir import Argument, Given, Input, Parameter
from fxseek.passes.latents import is_expanded
from fxseek.passes.modes import regions
from fxseek.passes.rules import find_rule


@dataclass(frozen=True)
class Region:
    """Nodes in the order in which they run.

    `last`: the node after which none of them is read, other than to be returned.
    """

    nodes: tuple[fx.Node, ...]
    last: fx.Node


def cheap_regions(
    graph: fx.Graph,
    inputs: Iterable[Input],
    cuts: Iterable[fx.Node],
    attentions: Iterable[fx.Node] = (),
) -> list[Region]:
    """The regions of a stage that carry gradient.

    None goes on past `cuts`, nor from one side of an attention to the other.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    in_autocast = regions(graph)  # which would have to be entered again
    ends = set(cuts)
    carrying: set[fx.Node] = set()
    given = iter(inputs)
    between = nx.Graph()
    depths = _depths(graph, set(attentions))
    for node in graph.nodes:
        if node.op == "placeholder":
            item = next(given)
            trained = isinstance(item, (Argument, Parameter)) and needs_grad(item.node)
            if trained or isinstance(item, Given):
                carrying.add(node)
            continue
        again = is_expanded(node)
        if not carrying.isdisjoint(node.all_input_nodes):
            carrying.add(node)
        elif not again:
            continue
        found = find_rule(node)
        cheap = again or (found is not None and found.cheap)
        if not cheap or node in ends or node in in_autocast:
            continue
        between.add_node(node)
        between.add_edges_from(
            (node, x) for x in node.all_input_nodes if x in between and depths[x] == depths[node]
        )
    found_regions = []
    for component in nx.connected_components(between):
        nodes = tuple(sorted(component, key=order.__getitem__))
        readers = [user for node in nodes for user in node.users if user.op != "output"]
        found_regions.append(Region(nodes, max([*nodes, *readers], key=order.__getitem__)))
    return found_regions


def _depths(graph: fx.Graph, attentions: set[fx.Node]) -> dict[fx.Node, int]:
    """How many attentions lie on the way to each node that has most of them."""
    depths: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth = max((depths[x] for x in node.all_input_nodes), default=0)
        depths[node] = depth + (node in attentions)
    return depths


__all__ = ["Region", "cheap_regions"]

"""Modes: which nodes lie in autocast regions, and which run without grad."""

from __future__ import annotations

from torch import fx

from fxseek.passes.facts import enters_autocast, leaves_autocast, switches_grad

__all__ = ["regions", "without_grad"]


def regions(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The autocast regions that each node lies in, outermost first."""
    stack: list[fx.Node] = []
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if enters_autocast(node):
            stack.append(node)
        elif leaves_autocast(node):
            if node.args[0] in stack:
                stack.remove(node.args[0])  # type: ignore[arg-type]
        elif stack:
            found[node] = tuple(stack)
    return found


def without_grad(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the graph runs under ``no_grad``."""
    found: set[fx.Node] = set()
    recorded = True
    for node in graph.nodes:
        if switches_grad(node):
            recorded = bool(node.args[0])
        elif not recorded:
            found.add(node)
    return found

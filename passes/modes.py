"""Modes: which nodes lie in autocast regions, which run without grad, and what nothing reads."""

from __future__ import annotations

from torch import fx

from fxseek.passes.facts import enters_autocast, leaves_autocast, switches_grad, switches_mode

__all__ = ["erase_unread", "regions", "without_grad"]


def erase_unread(graph: fx.Graph) -> None:
    """Erase what nothing reads, but for inputs and for what decides how other nodes are run."""
    for node in reversed(list(graph.nodes)):  # torch's own way needs modules that are yet to come
        if not node.users and node.op not in ("placeholder", "output") and not switches_mode(node):
            graph.erase_node(node)


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

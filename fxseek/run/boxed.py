"""Running a graph whose inputs come in a list, which it empties."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import fx, nn

__all__ = ["Boxed", "Root", "unpack_list"]

Root = nn.Module | dict[str, Any]
"""What a graph has by name, as `fx.GraphModule` takes it."""


class Boxed:
    """A graph as a function of a list: each value is let go after its last use.

    The generated code of a `GraphModule` drops its own values as soon as it can, but the caller
    holds the arguments. Here the list is emptied first, so nobody does. `root`: what the graph has
    by name.
    """

    def __init__(self, root: Root, graph: fx.Graph) -> None:
        boxed = fx.Graph()
        copies = unpack_list(boxed, graph.find_nodes(op="placeholder"))
        for node in graph.nodes:
            if node.op != "placeholder":
                copies[node] = boxed.node_copy(node, copies.__getitem__)
        self.run = with_source_lines(fx.GraphModule(root, boxed))

    def __call__(self, values: list[Any]) -> Any:
        """What the graph gives for these arguments."""
        return self.run(values)


def unpack_list(graph: fx.Graph, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Let a new graph take the values of another one's nodes in a list, and empty it."""
    values = graph.placeholder("values")
    graph.call_method("reverse", (values,))
    return {
        node: graph.create_node("call_method", "pop", (values,), name=node.name) for node in nodes
    }


def with_source_lines(module: fx.GraphModule) -> Callable[..., Any]:
    """The module's forward; errors get a note of the node and of the model's line behind it."""
    forward = module.forward
    nodes = {node.name: node for node in module.graph.nodes}

    def run(*arguments: Any) -> Any:
        try:
            return forward(*arguments)
        except Exception as error:
            node = nodes.get(_assigned(error.__traceback__, forward.__code__) or "")
            if node is not None:
                error.add_note(f"While running {node.format_node()}")
                if node.stack_trace:
                    error.add_note(f"Original traceback:\n{node.stack_trace}")
            raise

    return run


def _assigned(trace: TracebackType | None, code: Any) -> str | None:
    """The name that the failing line of generated code assigns to."""
    for frame, line in traceback.walk_tb(trace):
        if frame.f_code is code:
            found = re.match(r"\s*(\w+)", linecache.getline(code.co_filename, line))
            return found[1] if found else None
    return None

"""Inline: regions that Dynamo keeps as graphs of their own become part of the graph.

Before::

    body = get_attr("wrap_body_0")
    out = tag_activation_checkpoint(body, x, weight, use_reentrant=False)
    y = out[0]

After::

    h = linear(x, weight)
    y = silu(h)

Gradient checkpointing has nothing left to do, and inside a region the passes could not tell
tokens apart. Autograd functions stay one operation each: their backward is their own.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

_REGIONS = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}
"""Regions, and how many arguments come before the operands: the body, and a name for it."""


def inline(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with the bodies of regions in place of their calls."""
    copy = fx.Graph(owning_module=graph.owning_module)
    copy.output(_copy_into(copy, graph, {}, ""))
    copy.output_node().meta = dict(graph.output_node().meta)
    for node in reversed(list(copy.nodes)):
        if node.op == "get_attr" and not node.users:
            copy.erase_node(node)
    return copy


def _copy_into(copy: fx.Graph, graph: fx.Graph, new_of: dict[fx.Node, Any], prefix: str) -> Any:
    """Copy the nodes that `new_of` does not bind yet; answers what the graph returns."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node in new_of:
            continue
        if node.op == "output":
            break
        source = node.args[0] if node.args else None
        if node.op == "call_function" and name in _REGIONS:
            new_of[node] = _body_into(copy, node, new_of, prefix)
        elif node.target is operator.getitem and isinstance(new_of[source], (tuple, list)):  # type: ignore[index]
            new_of[node] = new_of[source][node.args[1]]  # type: ignore[index]
        else:
            new_of[node] = made = copy.node_copy(node, new_of.__getitem__)
            if node.op == "get_attr":
                made.target = f"{prefix}{node.target}"
    return map_arg(graph.output_node().args[0], new_of.__getitem__)


def _body_into(copy: fx.Graph, region: fx.Node, new_of: dict[fx.Node, Any], prefix: str) -> Any:
    attribute = region.args[0]
    assert isinstance(attribute, fx.Node)
    owner = attribute.graph.owning_module
    assert owner is not None
    body = owner.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    operands = region.args[_REGIONS[region.target.__name__] :]  # type: ignore[union-attr]
    parameters = [node for node in body.graph.nodes if node.op == "placeholder"]
    bound = dict(zip(parameters, map_arg(operands, new_of.__getitem__), strict=True))
    return _copy_into(copy, body.graph, bound, f"{prefix}{attribute.target}.")


__all__ = ["inline"]

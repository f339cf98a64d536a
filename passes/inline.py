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

A body that is called several times (layers that look alike, which Dynamo has traced once) becomes
as many pieces of the graph, each with example values of its own, as if it had been traced so often:
later passes tell captured tensors apart by identity.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

_REGIONS = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}
"""Regions, and how many arguments come before the operands: the body, and a name for it."""

AS_MODULES = "fxseek_as_modules"
"""In the meta of a call of a region that was traced for another layer: an `AsModules`."""


class AsModules(NamedTuple):
    """A layer in the place of the one that was traced.

    `keys`: Dynamo's key of each module of the traced layer, and of its own; `before`, `after`: the
    last two parts of their paths, a list's name and a place in it.
    """

    keys: dict[str, str]
    before: str
    after: str

    def stack(self, traced: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
        """An operation's stack of modules, with this layer in it.

        The key of a module's second call ends in ``@1``.
        """
        stack = [(*key.partition("@"), path, kind) for key, (path, kind) in traced.items()]
        known = [path for key, _, _, path, _ in stack if key in self.keys]
        layer = known[0] if known and known[0].endswith(self.before) else None

        def moved(path: str) -> str:
            if layer is None or not path.startswith(layer):
                return path
            return layer.removesuffix(self.before) + self.after + path[len(layer) :]

        return {
            f"{self.keys.get(key, key)}{at}{call}": (
                moved(path) if key in self.keys else path,
                kind,
            )
            for key, at, call, path, kind in stack
        }


def inline(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with the bodies of regions in place of their calls.

    Placeholders come first: Dynamo of torch 2.12 has sizes behind what reads them.
    """
    copy = fx.Graph(owning_module=graph.owning_module)
    inputs = graph.find_nodes(op="placeholder")
    copy.output(_copy_into(copy, graph, {x: copy.node_copy(x) for x in inputs}, ""))
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
    given = set(bound)
    result = _copy_into(copy, body.graph, bound, f"{prefix}{attribute.target}.")
    made = [new for node, new in bound.items() if node not in given and isinstance(new, fx.Node)]
    if AS_MODULES in region.meta:
        _set_apart(made, region.meta[AS_MODULES])
    if region.target.__name__ == "invoke_subgraph":  # type: ignore[union-attr]
        _name_results(region, result, set(made))
    return result


def _set_apart(nodes: list[fx.Node], modules: AsModules) -> None:
    """Give the copied nodes of a body modules of their own, and tensors in tuples.

    An element of a tuple is known by its identity; other values that nothing writes to need none.
    """
    twins: dict[int, torch.Tensor] = {}
    for node in nodes:
        value = node.meta.get("example_value")
        for x in value if isinstance(value, (tuple, list)) else ():
            if isinstance(x, torch.Tensor):
                twins[id(x)] = x.detach().requires_grad_(x.requires_grad)
    for node in nodes:
        if twins and "example_value" in node.meta:
            node.meta["example_value"] = tree_map(
                lambda x: twins.get(id(x), x), node.meta["example_value"]
            )
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = modules.stack(stack)


def _name_results(region: fx.Node, result: Any, made: set[fx.Node]) -> None:
    """Give the results of a region the example values of its call: what follows may write there."""
    for user in region.users:
        inner = result[user.args[1]] if user.target is operator.getitem else None
        if inner in made:
            inner.meta["example_value"] = user.meta["example_value"]


__all__ = ["AS_MODULES", "AsModules", "inline"]

"""Offload: keys and values wait on the host between the prefill and the learn stage.

Before::

    prefill:  k = ...; o = sdpa(q, k, v); ...; return (k, ...)
    learn:    k = scatter_rows(k_full, k_rows, kept); o = attend_rows(q, k, v)

After::

    prefill:  k = ...; o = sdpa(q, k, v); k_host = to_host(k); ...; return (k_host, ...)
    learn:    k = scatter_rows(to_device(k_full), k_rows, kept); ...
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxseek.ops.offload import to_device, to_host
from fxseek.ops.rows import scatter_rows
from fxseek.passes.ir import Piece, Prefilled


def take_from_host(learn: Piece) -> tuple[Piece, list[fx.Node]]:
    """Let the scatters of a learn stage take their bases from the host.

    Answers the captured nodes whose values must wait there, in the order of their use.
    """
    given = learn.placeholders()
    found: list[fx.Node] = []
    for node in list(learn.graph.nodes):
        if node.target is not scatter_rows:
            continue
        base = node.args[0]
        item = given.get(base)
        if not isinstance(item, Prefilled) or len(base.users) > 1:
            continue
        with learn.graph.inserting_before(node):
            fetched = learn.graph.call_function(to_device, (base,))
        node.replace_input_with(base, fetched)
        found.append(item.node)
    return learn, found


def send_to_host(prefill: Piece, nodes: list[fx.Node]) -> Piece:
    """Let a prefill send values to the host after their last use."""
    output = prefill.graph.output_node()
    order = {node: index for index, node in enumerate(prefill.graph.nodes)}
    made: dict[fx.Node, Any] = dict(zip(prefill.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
    for node in nodes:
        value = made[node]
        users = [user for user in value.users if user is not output]
        last = max([value, *users], key=order.__getitem__)
        with prefill.graph.inserting_after(last):
            sent = prefill.graph.call_function(to_host, (value,))
        order[sent] = order[last]
        output.replace_input_with(value, sent)
    return prefill


__all__ = ["send_to_host", "take_from_host"]

"""Outputs: which of the captured outputs a step computes, and for which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.passes.facts import (
    Facts,
    Rows,
    ancestors,
    descendants,
    example,
    is_tensor,
    needs_grad,
    primary,
    user_tensors,
    where,
)
from fxseek.passes.head import Head
from fxseek.passes.ir import Piece
from fxseek.passes.rules import operation
from fxseek.passes.structure import Structure


@dataclass(frozen=True)
class Outputs:
    """What the learn stage makes.

    `wanted`: pairs as `ditch` takes them; `template`: the captured results, with the places of
    `wanted` where they go; `dropped`: which of the captured outputs are not computed.
    """

    wanted: tuple[tuple[str, fx.Node], ...]
    template: tuple[Any, ...]
    dropped: tuple[int, ...]


class _Place(int):
    """The place of an output among the learn stage's results."""


def find_outputs(graph: fx.Graph, facts: Facts, kind: str, written: int) -> Outputs:
    """What is wanted of a graph whose last `written` outputs are new values of buffers.

    `kind`: what token-shaped outputs are, as `SeekConfig.outputs` says it.
    """
    wanted: list[tuple[str, fx.Node]] = []

    def want(node: fx.Node) -> Any:
        sized = is_tensor(node) and facts.token_sized(node)
        if sized and kind == "loss" and (facts.rows.get(node) is not None or needs_grad(node)):
            return None
        if sized and facts.rows.get(node) is not None:
            wanted.append(("rows" if kind == "selected" else "full", node))
        else:
            wanted.append(("value", node))
        return _Place(len(wanted) - 1)

    given: Any = graph.output_node().args[0]
    count = len(given) - written
    template: Any = map_arg(given[:count], want)
    for node in given[count:]:
        wanted.append(("full", node))
        template = (*template, _Place(len(wanted) - 1))
    dropped = [i for i, node in enumerate(given) if node is not None and template[i] is None]
    return Outputs(tuple(wanted), tuple(template), tuple(dropped))


def returns(learn: Piece, outputs: Outputs) -> Piece:
    """Let a learn stage return the captured results."""
    output = learn.graph.output_node()
    results: Any = output.args[0]

    def fill(value: Any) -> Any:
        if isinstance(value, _Place):
            return results[value]
        return tuple(map(fill, value)) if isinstance(value, (list, tuple)) else value

    output.args = (fill(outputs.template),)
    return learn


def ends_in(head: Head, outputs: Outputs) -> bool:
    """Whether the loss is all that is wanted of what a head makes."""
    inside = descendants([head.entry]) - descendants([head.loss.node]) - {head.entry}
    loss = head.loss.node
    wanted = ancestors((node for _, node in outputs.wanted), lambda node: node is not loss)
    return inside.isdisjoint(wanted)


def refuse_unselected(graph: fx.Graph, facts: Facts, structure: Structure, dim: int) -> None:
    """A step that would train every token must not say that it selects some.

    Raises:
        GraphError: no value with gradient has token rows, or `dim` counts something else.
    """
    trained = [node for node in graph.nodes if needs_grad(node) and facts.token_sized(node)]
    first = (primary(user_tensors(graph)) or user_tensors(graph))[0]
    name = _torch.source_name(first) or first.name
    shape = [_torch.size_hint(size) for size in example(first).shape]
    if trained and not any(isinstance(facts.rows.get(node), Rows) for node in trained):
        raise GraphError(
            f"nothing to select: tokens are in dimension {dim} of {name} {shape}, and no value "
            "with gradient has them in a dimension of their own beside the batch, so that every "
            "token would be trained. Pass token_dim= if tokens are in another dimension. Train a "
            "model that compares choices [batch, choices, tokens] without fxseek.compile."
        )
    ids = not example(first).is_floating_point() and example(first).dim() > dim + 1
    others = [
        node
        for node in facts.token_made
        if operation(node) in ("scaled_dot_product_attention", "softmax")
        and example(node).dim() == 4
    ]
    if ids and others and not structure.attentions:
        raise GraphError(
            f"dimension {dim} of {name} {shape} counts no tokens: an attention reads another one, "
            f"at {where(others[0])}. Pass token_dim= the dimension that counts tokens."
        )


__all__ = ["Outputs", "ends_in", "find_outputs", "refuse_unselected", "returns"]

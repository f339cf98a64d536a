"""Uncounted tokens: those that a model makes itself, as many as no input says.

A vision transformer cuts an image into patches::

    x = conv2d(pixel_values)             # [batch, 40, 5, 5]
    x = x.flatten(2).transpose(1, 2)     # [batch, 25, 40]
    x = cat((class_token, x), 1) + table # [batch, 26, 40]: what the first block is given

Their number is a constant of the graph, and no symbol tells it from other constants. So the place
is found where tokens begin: the outermost module around the first attention that is given nothing
but one value of the image, with as many rows as the attention has keys. The graph is captured again
with a count in front of that module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.passes.facts import (
    descendants,
    example,
    is_tensor,
    module_paths,
    needs_grad,
    where,
)
from fxseek.passes.rules import argument, operation

__all__ = ["Uncounted", "UncountedTokens", "find_uncounted", "refuse_bypass"]


@dataclass(frozen=True)
class Uncounted:
    """Where tokens begin: `module` is given [batch, tokens, width]."""

    module: str
    tokens: int


class UncountedTokens(GraphError):
    """No input counts the tokens, and they begin at `place`."""

    def __init__(self, message: str, place: Uncounted) -> None:
        super().__init__(message)
        self.place = place


def find_uncounted(graph: fx.Graph, image: fx.Node) -> Uncounted | None:
    """Where the tokens begin that are made of an input; None where that is not clear."""
    made = descendants([image])
    attention = next((node for node in graph.nodes if node in made and _attends(node)), None)
    tokens = None if attention is None else _attended(attention)
    if attention is None or tokens is None:
        return None
    wanted = [*map(_torch.size_expression, (example(image).shape[0], tokens))]
    for module in filter(None, module_paths(attention)):
        inside = {node for node in graph.nodes if module in module_paths(node)}
        given = {x for node in inside for x in node.all_input_nodes if x in made and is_tensor(x)}
        given -= inside
        if len(given) == 1:
            shape = list(map(_torch.size_expression, example(given.pop()).shape))
            if len(shape) == 3 and shape[:2] == wanted:
                return Uncounted(module, _torch.size_hint(tokens))
    return None


def refuse_bypass(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """What counted tokens are made of may have no gradient but through them.

    Raises:
        GraphError: what is in front of the count is read behind it too, or returned.
    """
    counts = [node for node in graph.nodes if operation(node) == "rows_at"]
    behind = descendants(counts)
    for node in descendants(inputs) - behind:
        if not needs_grad(node):
            continue
        for user in node.users:
            if user not in counts and (user in behind or user.op == "output"):
                raise GraphError(
                    "patches have gradient that comes from elsewhere than the layers that they go "
                    f"through: what is made at {where(node)} is read behind these or returned, so "
                    "that patches that are not selected would be trained. Leave that out "
                    "(output_hidden_states=True, a connection past all layers)."
                )


def _attends(node: fx.Node) -> bool:
    name = operation(node)
    return name == "scaled_dot_product_attention" or (
        name == "softmax" and is_tensor(node) and example(node).dim() > 3
    )


def _attended(node: fx.Node) -> int | torch.SymInt | None:
    """How many tokens attend to each other; None where they attend to others."""
    if operation(node) == "softmax":
        queries, keys = example(node).shape[-2:]
    else:
        operands = (argument(node, 0, "query"), argument(node, 1, "key"))
        queries, keys = (example(x).shape[-2] for x in operands)
    same = _torch.size_expression(keys) == _torch.size_expression(queries)
    return keys if same else None

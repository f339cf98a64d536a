"""Unshift: a label shift by slicing becomes a shift by padding.

Before::

    x = logits[..., :-1, :].reshape(-1, v);  y = labels[..., 1:].reshape(-1)
    loss = cross_entropy(x, y)                  # tokens − 1 terms in each row

After::

    x = logits.reshape(-1, v);  y = next_labels(labels, -100).reshape(-1)
    loss = cross_entropy(x, y)                  # tokens terms, the last of them ignored

The value is the same: an ignored term counts neither in the sum nor in the mean. Now every
term belongs to a token, so that the loss can be taken over selected tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek._torch import size_expression
from fxseek.passes.facts import Sizes, example, is_tensor, listed, made_call, written_out
from fxseek.passes.rules import argument, operation
from fxseek.passes.rules.loss import TokenLoss


def next_labels(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """The label of the next position, [batch, tokens]; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=ignored)


def scale_of_all(scale: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The scale of the terms of all positions but the last, for all: [batch, tokens]."""
    return F.pad(scale.reshape(labels.shape[0], -1), (0, 1))


def unshift(graph: fx.Graph, sizes: Sizes) -> fx.Graph:
    """The graph with the shifts of its cross-entropies by padding."""
    for node in list(graph.nodes):
        if operation(node) == "cross_entropy":
            _unshift(graph, node, sizes)
    return graph


def _unshift(graph: fx.Graph, node: fx.Node, sizes: Sizes) -> None:
    loss = TokenLoss.of(node)
    if loss is None or loss.reduction not in ("mean", "sum") or loss.probabilities:
        return
    if not isinstance(loss.ignore_index, int):
        return
    flat = example(loss.logits).dim() == 2 and example(loss.target).dim() == 1
    logits: Any = loss.logits
    if not flat:  # classes in front of the positions
        if example(logits).dim() != 3 or example(loss.target).dim() != 2:
            return
        logits = _before_transpose(logits)
    cut_logits, casts = sliced(logits, rank=3)
    cut_target, target_casts = sliced(loss.target, rank=2)
    if cut_logits is None or cut_target is None:
        return
    if not cuts(cut_logits, last=True) or not cuts(cut_target, last=False):
        return
    whole: Any = cut_logits.args[0]
    labels: Any = cut_target.args[0]
    if sizes.shape(example(whole))[:2] != sizes.shape(example(labels)):
        return
    width = example(whole).shape[-1]
    if sizes.expression(width) != sizes.expression(example(loss.logits).shape[1]):
        return

    make = partial(made_call, graph, node)
    with graph.inserting_before(node):
        x: Any = whole
        for dtype in casts:
            x = make(torch.Tensor.to, x, dtype)
        x = make(torch.reshape, x, (-1, width)) if flat else make(torch.transpose, x, 1, 2)
        y = make(next_labels, labels, loss.ignore_index, example_value=example(labels))
        for dtype in target_casts:
            y = make(torch.Tensor.to, y, dtype)
        y = make(torch.reshape, y, (-1,)) if flat else y
        if loss.scale is not None:
            ones = torch.ones_like(example(labels), dtype=example(loss.scale).dtype)
            scale = make(scale_of_all, loss.scale, labels, example_value=ones)
            scale = make(torch.reshape, scale, (-1,)) if flat else scale
            node.replace_input_with(loss.scale, scale)
    node.replace_input_with(loss.logits, x)
    node.replace_input_with(loss.target, y)


def _before_transpose(node: fx.Node) -> fx.Node | None:
    """``x`` of a transposed ``x`` of three dimensions, the last two of which are swapped."""
    name = operation(node)
    if name == "transpose":
        swapped = {argument(node, i, f"dim{i - 1}") for i in (1, 2)}
        swapped = {dim % 3 for dim in swapped if isinstance(dim, int)}
    elif name == "permute":
        swapped = {1, 2} if [dim % 3 for dim in listed(node)] == [0, 2, 1] else set()
    else:
        swapped = set()
    source = node.args[0] if swapped == {1, 2} else None
    return source if isinstance(source, fx.Node) else None


def sliced(
    node: fx.Node | None, rank: int, through: tuple[str, ...] = ()
) -> tuple[fx.Node | None, list[torch.dtype]]:
    """The slice of `rank` dimensions behind casts and reshapes, and those casts in order.

    `through`: names of other operations that are looked through.
    """
    casts: list[torch.dtype] = []
    at: Any = node
    while is_tensor(at):
        name = operation(at)
        if name == "getitem" and example(at).dim() == rank:
            return at, casts[::-1]
        if name == "to" and is_tensor(at.args[0]):
            if example(at).dtype != example(at.args[0]).dtype:
                casts.append(example(at).dtype)
        elif name not in ("reshape", "flatten", "contiguous", "clone", *through):
            return None, []
        at = at.args[0]
    return None, []


def cuts(node: fx.Node, *, last: bool) -> bool:
    """Whether a slice drops the last (or the first) entry of dimension 1, and nothing else."""
    source: Any = node.args[0]
    if not is_tensor(source):
        return False
    before, after = example(source), example(node)
    if before.dim() != after.dim():
        return False
    items = written_out(node.args[1], before.dim()) or [None]
    if not all(isinstance(item, slice) and item.step in (None, 1) for item in items):
        return False
    for dim, item in enumerate(items):
        shrinks = size_expression(before.shape[dim]) - size_expression(after.shape[dim])
        if shrinks != (1 if dim == 1 else 0):
            return False
        if dim != 1 and item.start not in (None, 0):
            return False
    start = items[1].start
    return start in (None, 0) if last else start == 1

"""Pass 2b, unshift: a label shift by slicing becomes a shift by padding.

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

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek._torch import size_expression
from fxseek.passes.facts import Sizes, example, is_tensor
from fxseek.passes.rules import argument, operation


def next_labels(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """The label of the next position, [batch, tokens]; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=ignored)


def unshift(graph: fx.Graph, sizes: Sizes) -> fx.Graph:
    """A copy of `graph` with the shifts of its cross-entropies by padding."""
    copy = fx.Graph(owning_module=graph.owning_module)
    new_of: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new_of[node] = copy.node_copy(node, new_of.__getitem__)
        if operation(node) == "cross_entropy":
            _unshift(copy, new_of[node], sizes)
    return copy


def _unshift(graph: fx.Graph, loss: fx.Node, sizes: Sizes) -> None:
    logits, target = argument(loss, 0, "input"), argument(loss, 1, "target")
    reduction = argument(loss, 6, "reduction", "mean")
    ignored = argument(loss, 4, "ignore_index", -100)
    if not is_tensor(logits) or not is_tensor(target) or reduction not in ("mean", "sum"):
        return
    if example(logits).dim() != 2 or example(target).dim() != 1 or not isinstance(ignored, int):
        return
    cut_logits, casts = _sliced(logits, rank=3)
    cut_target, target_casts = _sliced(target, rank=2)
    if cut_logits is None or cut_target is None:
        return
    if not _cuts(cut_logits, last=True) or not _cuts(cut_target, last=False):
        return
    whole: Any = cut_logits.args[0]
    labels: Any = cut_target.args[0]
    if sizes.shape(example(whole))[:2] != sizes.shape(example(labels)):
        return
    width = example(logits).shape[-1]

    with graph.inserting_before(loss):

        def make(function: Callable[..., Any], *args: Any) -> fx.Node:
            node = graph.call_function(function, args)
            values = [example(a) if isinstance(a, fx.Node) else a for a in args]
            node.meta = {**loss.meta, "example_value": function(*values)}
            return node

        x: Any = whole
        for dtype in casts:
            x = make(torch.Tensor.to, x, dtype)
        x = make(torch.reshape, x, (-1, width))
        y = graph.call_function(next_labels, (labels, ignored))
        y.meta = {**loss.meta, "example_value": example(labels)}
        for dtype in target_casts:
            y = make(torch.Tensor.to, y, dtype)
        y = make(torch.reshape, y, (-1,))
    loss.replace_input_with(logits, x)
    loss.replace_input_with(target, y)


def _sliced(node: fx.Node, rank: int) -> tuple[fx.Node | None, list[torch.dtype]]:
    """The slice of `rank` dimensions behind casts and reshapes, and those casts in order."""
    casts: list[torch.dtype] = []
    at: Any = node
    while is_tensor(at):
        name = operation(at)
        if name == "getitem" and example(at).dim() == rank:
            return at, casts[::-1]
        if name == "to" and is_tensor(at.args[0]):
            if example(at).dtype != example(at.args[0]).dtype:
                casts.append(example(at).dtype)
        elif name not in ("reshape", "flatten", "contiguous", "clone"):
            return None, []
        at = at.args[0]
    return None, []


def _cuts(node: fx.Node, *, last: bool) -> bool:
    """Whether a slice drops the last (or the first) entry of dimension 1, and nothing else."""
    source: Any = node.args[0]
    if not is_tensor(source):
        return False
    before, after = example(source), example(node)
    if before.dim() != after.dim():
        return False
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (before.dim() - len(items) + 1)
    items += [slice(None)] * (before.dim() - len(items))
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

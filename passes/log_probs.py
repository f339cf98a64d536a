"""Log-probs: statistics of tokens for a loss outside the model, of every token and by weight.

Before::

    h = hidden[:, :-1].reshape(-1, width);  y = labels[:, 1:].clamp(min=0).reshape(-1)
    s = token_statistics(h, weight, bias, y)                   # [batch · (tokens − 1), 5]

After::

    y = next_labels(labels, -100)                              # [batch, tokens]
    t = by_weight(token_statistics(hidden, weight, bias, y), y)
    s = t[:, :-1].reshape(-1, 5)
    loss = cross_entropy(logits.reshape(-1, vocabulary), y.reshape(-1))     # scores alone read it

Now every row of statistics belongs to a token. The loss, the mean negative log-likelihood, is no
output: it stands for the one outside, which the graph doesn't have, where tokens are scored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.errors import GraphError
from fxseek.ops.log_probs import IGNORED, STATISTICS, by_weight, token_statistics
from fxseek.passes.facts import Sizes, example, where
from fxseek.passes.rules import argument, operation
from fxseek.passes.unshift import cuts, next_labels, sliced

_ARGUMENTS = (
    "hidden", "weight", "bias", "labels", "temperature", "softcap", "scale", "wanted",
)  # fmt: skip


def find_log_probs(
    graph: fx.Graph, sizes: Sizes, chunk_bytes: int
) -> tuple[fx.Graph, fx.Node | None]:
    """A copy of `graph`, and the loss that stands for the one outside; None where none is needed.

    Raises:
        GraphError: the statistics are not those of all tokens in order.
    """
    copy = fx.Graph(owning_module=graph.owning_module)
    new_of: dict[fx.Node, fx.Node] = {}
    losses: list[fx.Node] = []
    for node in graph.nodes:
        made = copy.node_copy(node, new_of.__getitem__)
        if operation(node) == "token_statistics":
            made, loss = _of_all_tokens(copy, made, sizes, chunk_bytes)
            losses.append(loss)
        new_of[node] = made
    return copy, losses[0] if losses else None


def _of_all_tokens(
    graph: fx.Graph, node: fx.Node, sizes: Sizes, chunk_bytes: int
) -> tuple[fx.Node, fx.Node]:
    """What stands for the statistics of flattened tokens, and the loss."""
    hidden, weight, bias, labels, temperature, softcap, scale, wanted, *_ = (
        argument(node, at, name) for at, name in enumerate(_ARGUMENTS)
    )
    rows, casts = sliced(hidden, 3)
    target, _ = sliced(labels, 2, ("clamp",))
    shifted = rows is not None and target is not None
    if shifted:
        assert rows is not None and target is not None
        shifted = cuts(rows, last=True) and cuts(target, last=False)
        rows, target = rows.args[0], target.args[0]  # type: ignore[assignment]
    if not shifted or sizes.shape(example(rows))[:2] != sizes.shape(example(target)):
        raise GraphError(
            "the model returns log-probabilities of other tokens than fxseek knows, which are "
            f"those of hidden[:, :-1] for labels[:, 1:], at {where(node)}"
        )
    how = (temperature, softcap, scale)
    with graph.inserting_before(node):

        def make(function: Callable[..., Any], *args: Any, value: Any = None) -> fx.Node:
            made = graph.call_function(function, args)
            if value is None:
                value = function(*(example(x) if isinstance(x, fx.Node) else x for x in args))
            made.meta = {**node.meta, "example_value": value}
            return made

        for dtype in casts:
            rows = make(torch.Tensor.to, rows, dtype)
        target = make(next_labels, target, IGNORED, value=example(target))
        found = make(token_statistics, rows, weight, bias, target, *how, wanted, chunk_bytes)
        found = make(by_weight, found, target)
        cut = make(operator.getitem, found, (slice(None), slice(None, -1)))
        flat = make(torch.reshape, cut, (-1, len(STATISTICS)))
        own = example(rows).dtype
        kinds = [x if x is None or example(x).dtype == own else make(torch.Tensor.to, x, own)
                 for x in (weight, bias)]  # fmt: skip
        logits = make(F.linear, rows, *kinds)
        if example(logits).dtype.itemsize < 4:
            logits = make(torch.Tensor.to, logits, torch.float32)
        logits = make(operator.mul, logits, scale)
        if softcap is not None:
            logits = make(torch.tanh, make(operator.truediv, logits, softcap))
            logits = make(operator.mul, logits, softcap)
        logits = make(operator.truediv, logits, temperature)
        flat_logits = make(torch.reshape, logits, (-1, example(logits).shape[-1]))
        loss = make(F.cross_entropy, flat_logits, make(torch.reshape, target, (-1,)))
    node.replace_all_uses_with(flat)
    graph.erase_node(node)
    return flat, loss


__all__ = ["find_log_probs"]

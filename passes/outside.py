"""Outside: what stands for a loss that the graph leaves to its caller.

Statistics of tokens become those of every token, with gradients by the weights of a selection.

Before::

    h = hidden[:, :-1].reshape(-1, width);  y = labels[:, 1:].clamp(min=0).reshape(-1)
    s = token_statistics(h, weight, bias, y)                   # [batch · (tokens − 1), 5]

After::

    y = next_labels(labels, -100)                              # [batch, tokens]
    t = by_weight(token_statistics(hidden, weight, bias, y), y)
    s = t[:, :-1].reshape(-1, 5)
    loss = cross_entropy(logits.reshape(-1, vocabulary), y.reshape(-1))     # scores alone read it

Now every row of statistics belongs to a token. The loss, the mean negative log-likelihood, is no
output: tokens are scored by it, for want of the one outside. Where a graph returns one value for
each row, a reward, tokens are scored by their sum: a row's gradient is that of its value, whatever
the loss.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.errors import GraphError
from fxseek.ops.log_probs import IGNORED, STATISTICS, by_weight, token_statistics
from fxseek.passes.facts import (
    Facts,
    Rows,
    Sizes,
    example,
    is_tensor,
    made_call,
    needs_grad,
    where,
)
from fxseek.passes.ir import Gathered, Piece, placeholder_of
from fxseek.passes.rules import argument
from fxseek.passes.unshift import cuts, next_labels, sliced

_ARGUMENTS = (
    "hidden", "weight", "bias", "labels", "temperature", "softcap", "scale", "wanted",
)  # fmt: skip


@dataclass(frozen=True)
class Outside:
    """`loss` stands for the loss outside; `read`: what that reads of each token, if it is known."""

    loss: fx.Node
    read: fx.Node | None


def find_outside(
    graph: fx.Graph, sizes: Sizes, chunk_bytes: int
) -> tuple[fx.Graph, Outside | None]:
    """The graph, and what is known of a loss outside; None where the graph has its own.

    Raises:
        GraphError: the statistics are not those of all tokens in order.
    """
    found: Outside | None = None
    for node in graph.find_nodes(op="call_function", target=token_statistics):
        found = _of_all_tokens(graph, node, sizes, chunk_bytes)
    if found is None and (total := _sum_of_rewards(graph, sizes)) is not None:
        found = Outside(total, None)
    return graph, found


def refuse_unweighted(facts: Facts, outside: Outside | None) -> None:
    """What a loss outside reads must have the weights of a selection.

    Raises:
        GraphError: the tokens of what it reads are not known.
    """
    if outside is not None and outside.read is not None and outside.read not in facts.plans:
        raise GraphError(
            f"the tokens of the log-probabilities at {where(outside.read)} are not known, so that "
            "selected ones could not be weighed. This is a defect of fxseek: please report it with "
            "the model's configuration."
        )


def reuse_values(learn: Piece, facts: Facts, outside: Outside) -> Piece:
    """Let a learn stage read the statistics of kept tokens, which the prefill makes of all.

    Before::

        s = token_statistics(hidden_rows, weight, bias, label_rows, ...)

    After::

        s = token_statistics(hidden_rows, ..., known=statistics)   # the prefill's, gathered

    Its forward makes no logits then. The stage is not to draw at random: its values would be
    others. The graph of `learn` is not to be used afterwards.
    """
    assert outside.read is not None
    statistics: Any = outside.read.args[0]
    made = learn.compact.get(statistics)
    rows = facts.rows.get(statistics)
    if made is None or made.target is not token_statistics or not isinstance(rows, Rows):
        return learn
    item = Gathered(statistics, 0, rows)
    items = learn.placeholders()
    with learn.graph.inserting_before(next(iter(learn.graph.nodes))):
        known = placeholder_of(learn.graph, item)
    made.update_kwarg("known", known)
    return replace(learn, inputs=[item, *items.values()])


def _sum_of_rewards(graph: fx.Graph, sizes: Sizes) -> fx.Node | None:
    """The sum of what a graph returns, if that is one value for each row of the batch."""
    output = graph.output_node()
    trained = [node for node in output.all_input_nodes if is_tensor(node) and needs_grad(node)]
    if len(trained) != 1:
        return None
    (rewards,) = trained
    shape = sizes.shape(example(rewards))
    if not 1 <= len(shape) <= 2 or sizes.has_tokens(shape[0]) or shape[1:] not in ((), (1,)):
        return None
    with graph.inserting_before(output):
        return made_call(graph, rewards, torch.sum, rewards)


def _of_all_tokens(graph: fx.Graph, node: fx.Node, sizes: Sizes, chunk_bytes: int) -> Outside:
    """Make the statistics of flattened tokens follow from those of all tokens."""
    hidden, weight, bias, labels, temperature, softcap, scale, wanted = (
        argument(node, at, name) for at, name in enumerate(_ARGUMENTS)
    )
    cut_rows, casts = sliced(hidden, 3)
    cut_labels, _ = sliced(labels, 2, ("clamp",))
    rows: Any = None if cut_rows is None else cut_rows.args[0]
    target: Any = None if cut_labels is None else cut_labels.args[0]
    if (
        cut_rows is None
        or cut_labels is None
        or not (cuts(cut_rows, last=True) and cuts(cut_labels, last=False))
        or sizes.shape(example(rows))[:2] != sizes.shape(example(target))
    ):
        raise GraphError(
            "the model returns log-probabilities of other tokens than fxseek knows, which are "
            f"those of hidden[:, :-1] for labels[:, 1:], at {where(node)}"
        )
    how = (temperature, softcap, scale)
    make = partial(made_call, graph, node)
    with graph.inserting_before(node):
        for dtype in casts:
            rows = make(torch.Tensor.to, rows, dtype)
        target = make(next_labels, target, IGNORED, example_value=example(target))
        found = make(token_statistics, rows, weight, bias, target, *how, wanted, chunk_bytes)
        found = make(by_weight, found, target)
        cut = make(operator.getitem, found, (slice(None), slice(None, -1)))
        flat = make(torch.reshape, cut, (-1, len(STATISTICS)))
        own = example(rows).dtype
        given = [
            x if x is None or example(x).dtype == own else make(torch.Tensor.to, x, own)
            for x in (weight, bias)
        ]
        logits = make(F.linear, rows, *given)
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
    return Outside(loss, found)


__all__ = ["Outside", "find_outside", "refuse_unweighted", "reuse_values"]

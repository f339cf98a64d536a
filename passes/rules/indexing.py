"""Lookups by index: embeddings, and gathers along features.

Proof of the law: token t's result is looked up with token t's own indices, in a table that is
shared by all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxseek.ops.rows import rows_at
from fxseek.passes.facts import is_tensor
from fxseek.passes.rules.experts import look_up
from fxseek.passes.rules.registry import Call, Full, Plan, RowsOf, Sample, rule


@rule(
    "embedding",
    family="per-token",
    reason="each index is looked up by itself in a table without tokens",
    samples=(
        Sample(lambda i, w: F.embedding(i, w), ("int:b t", "7 5")),
        Sample(lambda i, w: F.embedding(i, w, padding_idx=0), ("int:b t", "7 5")),
    ),
)
def embedding(call: Call) -> Plan | None:
    """``weight[indices]``; a table that is renormalised in place is not understood.

    Nor is a gradient scaled by how often an index occurs: that counts all tokens.
    """
    indices, weight = call.arg(0, "input"), call.arg(1, "weight")
    rows = call.rows(indices)
    if rows is None or call.arg(3, "max_norm") is not None:
        return None
    if call.arg(5, "scale_grad_by_freq"):
        return None
    if call.facts.token_sized(weight) or not call.sizes.valid(rows, call.out):
        return None
    args = (call.own(indices, rows), Full(weight), *call.node.args[2:])
    kwargs = {k: v for k, v in call.node.kwargs.items() if k not in ("input", "weight")}
    return Plan(rows, call.target, args, kwargs)


@rule(
    "rows_at",
    family="per-token",
    reason="each position is looked up by itself in a table without tokens",
    samples=(
        Sample(
            lambda i, w: rows_at(w.expand(i.shape[0], -1, -1), i.clamp(max=6)), ("int:b t", "7 5")
        ),
    ),
)
def at_positions(call: Call) -> Plan | None:
    """`rows_at`: the rows of a value without tokens become those of the tokens."""
    x, positions = call.arg(0, "x"), call.arg(1, "positions")
    rows = call.rows(positions)
    if rows is None or rows.packed or call.facts.token_sized(x):
        return None
    if not call.sizes.valid(rows, call.out):
        return None
    return Plan(rows, rows_at, (Full(x), call.own(positions, rows)))


@rule(
    "gather",
    family="per-token",
    reason="picks features of each token by that token's indices",
    samples=(
        Sample(lambda x, i: torch.gather(x, -1, i), ("b t 5", "int:b t 3")),
        Sample(lambda x, i: x.gather(2, i), ("b t 5", "int:b t 2")),
    ),
)
def gather(call: Call) -> Plan | None:
    """``x.gather(dim, index)`` along a feature dimension."""
    x, dim, index = call.arg(0, "input"), call.arg(1, "dim"), call.arg(2, "index")
    rows = call.rows(x)
    if rows is None or not isinstance(dim, int):
        return None
    rank = len(call.shape(x))
    if dim % rank in rows.dims or not call.sizes.valid(rows, call.shape(index)):
        return None
    args = (RowsOf(x, rows, rank), dim, RowsOf(index, rows, rank))
    return Plan(rows, call.target, args)


@rule(
    "scatter",
    family="per-token",
    reason="writes features of each token at that token's indices",
    samples=(
        Sample(lambda x, i: x.scatter(-1, i[..., :1], 0.5), ("b t 5", "int:b t 3")),
        Sample(lambda x, i, y: x.scatter(2, i, y), ("b t 5", "int:b t 1", "b t 1")),
        Sample(lambda x, i, y: x.scatter(1, i, src=y), ("b 3 t 5", "int:b 1 t 5", "b 1 t 5")),
    ),
)
def scatter(call: Call) -> Plan | None:
    """``x.scatter(dim, index, src)`` along a feature dimension; `src` is a tensor or a number."""
    x, dim, index = call.arg(0, "input"), call.arg(1, "dim"), call.arg(2, "index")
    source = call.arg(3, "src", call.node.kwargs.get("value"))
    rows = call.rows(x)
    if rows is None or type(dim) is not int or call.node.kwargs.get("reduce") is not None:
        return None
    rank = len(call.shape(x))
    operands = [index, source] if is_tensor(source) else [index]
    if dim % rank in rows.dims:
        return None
    if not all(call.sizes.valid(rows, call.shape(operand)) for operand in operands):
        return None
    written = RowsOf(source, rows, rank) if is_tensor(source) else source
    args = (RowsOf(x, rows, rank), dim, RowsOf(index, rows, rank), written)
    return Plan(rows, torch.scatter, args)


def _sorted(x: torch.Tensor) -> torch.Tensor:
    """Rows in the order of their first feature, and back."""
    rows = x.reshape(-1, x.shape[-1])
    order = rows[:, 0].argsort()
    return rows.index_select(0, order).exp().index_select(0, order.argsort())


@rule(
    "index_select",
    family="per-token",
    reason="entries change places, or each key is looked up by itself",
    samples=(
        Sample(lambda i, w: w.index_select(0, i.reshape(-1)), ("int:b t", "7 5")),
        Sample(_sorted),
    ),
)
def index_select(call: Call) -> Plan | None:
    """``x.index_select(0, index)``."""
    if call.arg(1, "dim") != 0:
        return None
    return look_up(call, call.arg(0, "input"), call.arg(2, "index"))


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    family="constant",
    cheap=True,
    reason="one number everywhere",
    samples=(
        Sample(lambda x: x + torch.zeros_like(x) + torch.ones_like(x, dtype=torch.int64)),
        Sample(lambda x: x * torch.full_like(x.mean(-1, keepdim=True), 3.0)),
    ),
)
def fill(call: Call) -> Plan | None:
    """A constant of the shape of another value."""
    source = call.arg(0, "input")
    rows = call.rows(source)
    return None if rows is None else call.same(source, rows, rows)

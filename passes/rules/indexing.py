"""Lookups by index: embeddings, and gathers along features.

Proof of the law: token t's result is looked up with token t's own indices, in a table that is
shared by all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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

"""Scaled dot-product attention: queries of selected tokens against keys and values of all.

Proof of the law: row t of the result is Σ_j softmax_j(q_t · k_j + mask_tj) v_j, so it reads
row t of the query and of the mask, and keys and values whole.
"""

from __future__ import annotations

import torch.nn.functional as F

from fxseek.ops.attention import attend_rows
from fxseek.passes.facts import is_tensor
from fxseek.passes.ir import Selected
from fxseek.passes.rules.registry import Call, Full, Plan, Sample, rule


@rule(
    "scaled_dot_product_attention",
    family="attention",
    reason="each query row attends by itself; keys and values are read whole",
    samples=(
        Sample(F.scaled_dot_product_attention, ("b 2 t 5", "b 2 7 5", "b 2 7 5")),
        Sample(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3),
            ("b 6 t 5", "b 2 7 5", "b 2 7 5"),
        ),
        Sample(
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > 0),
            ("b 2 t 5", "b 2 7 5", "b 2 7 5", "b 1 t 7"),
        ),
        Sample(
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
            ("b 2 t 5", "b 2 7 5", "b 2 7 5", "b 1 1 7"),
        ),
    ),
)
def sdpa(call: Call) -> Plan | None:
    """``F.scaled_dot_product_attention`` with or without mask, causal, grouped-query."""
    query, key, value = call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")
    rows = call.rows(query)
    rank = len(call.shape(query))
    if rows is None or rows.row != rank - 2 or not call.sizes.valid(rows, call.out):
        return None
    if (rows.packed or rows.heads > 1) and call.arg(5, "is_causal", False):
        return None  # the kept positions of a row of the batch are not where the flag needs them
    mask = call.arg(3, "attn_mask")
    options = {
        "dropout_p": call.arg(4, "dropout_p", 0.0),
        "is_causal": call.arg(5, "is_causal", False),
        "scale": call.arg(6, "scale"),
        "enable_gqa": call.arg(7, "enable_gqa", False),
        "batch_dim": rows.batch,
    }
    if mask is not None:
        if not is_tensor(mask):
            return None
        want = call.aligned(mask, rows, rank)
        if want is None:
            return None
        options["mask"] = want
    args = (call.own(query, rows), Full(key), Full(value), Selected("kept"))
    return Plan(rows, attend_rows, args, options)

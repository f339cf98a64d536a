"""Products with quantised weights: operations that bitsandbytes defines, told by their names.

Proof of the law: as for products of plain weights. The weight and its scales are shared by all
tokens, and row t of the left operand alone makes row t of the result. The 8-bit product that
splits off outlier columns has no rule: any token may make a column an outlier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxseek.passes.rules.products import last_is_row
from fxseek.passes.rules.registry import Call, Plan, Sample, rule, tensor_nodes, whole


def _gemm_4bit(x: Tensor, bias: Tensor) -> Tensor:
    import bitsandbytes  # noqa: F401 - defines the operation

    rows = x.detach().bfloat16().float()  # few bits, so that sums are exact in any order
    weight = torch.full((2 * 64 // 2, 1), 0xFF, dtype=torch.uint8)  # ones
    scales, added = torch.linspace(1, 2, 2), bias.detach().float().round()
    gemm = torch.ops.bitsandbytes.gemm_4bit
    plain = gemm(rows, weight, (2, 64), scales, 64, "nf4")
    return plain + gemm.default(rows, weight, (2, 64), scales, 64, "nf4", bias=added)


@rule(
    "bitsandbytes::gemm_4bit",
    family="per-token",
    needs="bitsandbytes",
    reason="a linear layer whose weight is stored in 4 bits",
    samples=(Sample(_gemm_4bit, ("b t 64", "2")),),
)
def gemm_4bit(call: Call) -> Plan | None:
    """``x @ dequantised(weight).T + bias``."""
    x: Any = call.arg(0, "A")
    rows = call.rows(x)
    if rows is None or last_is_row(call, x, rows) or not call.sizes.valid(rows, call.out):
        return None
    others = tensor_nodes((call.node.args[1:], call.node.kwargs))
    if any(call.facts.token_sized(other) for other in others):
        return None
    args = (call.own(x, rows), *whole(call.node.args[1:]))
    kwargs = whole({key: arg for key, arg in call.node.kwargs.items() if arg is not x})
    return Plan(rows, call.target, args, kwargs)

"""Cross-entropy over tokens: the mean over the selected labelled positions.

The full loss is a mean (or sum) of one term per token; only the terms of kept positions are
computed, with the weights of the selection. See `fxseek.loss.selected_cross_entropy`.
"""

from __future__ import annotations

import torch.nn.functional as F

from fxseek.loss import selected_cross_entropy
from fxseek.passes.facts import is_tensor
from fxseek.passes.rules.registry import Call, Full, Plan, Sample, Stage, fake, rule


@rule(
    "cross_entropy",
    family="loss",
    reason="a sum of one term per token, each of that token's logits and target",
    samples=(
        Sample(
            lambda x, y: F.cross_entropy(x.reshape(-1, 5), y.reshape(-1), reduction="none"),
            ("b t 5", "int:b t"),
        ),
        Sample(
            lambda x, y: F.cross_entropy(x.transpose(1, 2), y, reduction="none"),
            ("b t 5", "int:b t"),
        ),
    ),
)
def cross_entropy(call: Call) -> Plan | None:
    """``F.cross_entropy`` with class indices; reductions mean, sum and none."""
    logits, target = call.arg(0, "input"), call.arg(1, "target")
    if not is_tensor(logits) or not is_tensor(target) or fake(target).is_floating_point():
        return None
    rows = call.rows(logits)
    class_dim = 0 if len(call.shape(logits)) == 1 else 1
    if rows is None or class_dim in rows.dims or call.arg(2, "weight") is not None:
        return None
    if call.arg(3, "size_average") is not None or call.arg(5, "reduce") is not None:
        return None
    target_rows = rows.without([class_dim])
    if target_rows.batch not in (None, 0) or not call.sizes.valid(target_rows, call.shape(target)):
        return None
    reduction = call.arg(6, "reduction", "mean")
    options = {
        "ignore_index": call.arg(4, "ignore_index", -100),
        "label_smoothing": call.arg(7, "label_smoothing", 0.0),
    }
    operands = (call.own(logits, rows), call.own(target, target_rows))
    if reduction == "none":
        return Plan(target_rows, F.cross_entropy, operands, {**options, "reduction": "none"})
    sizes = (call.sizes.tokens, call.sizes.packed, call.sizes.batch or 1)
    if any(size not in sizes for size in call.shape(target)):
        return None  # several terms per token: the weights would not line up
    return Plan(
        None,
        selected_cross_entropy,
        (*operands, Stage("weights"), Full(target)),
        {**options, "reduction": reduction},
    )

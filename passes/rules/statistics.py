"""Statistics of each token's distribution over the vocabulary, for losses outside the model."""

from __future__ import annotations

from fxseek.ops.log_probs import by_weight, times_weights, token_statistics
from fxseek.passes.facts import is_tensor
from fxseek.passes.ir import Selected
from fxseek.passes.rules.registry import Call, Full, Plan, Sample, rule, whole


@rule(
    "token_statistics",
    family="per-token",
    reason="the vocabulary is shared by all tokens, and a token has one label",
    samples=(
        Sample(lambda x, w, y: token_statistics(x, w, None, y), ("b t 5", "3 5", "int:b t")),
        Sample(
            lambda x, w, b, y: token_statistics(x, w, b, y, 0.7, 2.0, 3.0, chunk_bytes=100),
            ("b t 5", "3 5", "3", "int:b t"),
        ),
    ),
)
def statistics(call: Call) -> Plan | None:
    """`fxseek.ops.log_probs.token_statistics`."""
    hidden, labels = call.arg(0, "hidden"), call.arg(3, "labels")
    rows = call.rows(hidden)
    if rows is None or not is_tensor(labels) or len(call.shape(hidden)) - 1 in rows.dims:
        return None
    if not call.sizes.valid(rows, call.shape(labels)):
        return None
    shared = whole((call.arg(1, "weight"), call.arg(2, "bias")))
    args = (call.own(hidden, rows), *shared, call.own(labels, rows), *whole(call.node.args[4:]))
    own = ("hidden", "weight", "bias", "labels")
    options = {name: x for name, x in call.node.kwargs.items() if name not in own}
    return Plan(rows, token_statistics, args, whole(options))


@rule(
    "by_weight",
    family="per-token",
    reason="the value itself; a selected token's gradient is scaled by its own weight",
    samples=(Sample(lambda x: by_weight(x) * 1.0, ("b t 5",)),),
)
def weighted(call: Call) -> Plan | None:
    """`fxseek.ops.log_probs.by_weight`."""
    x, labels = call.arg(0, "x"), call.arg(1, "labels")
    rows = call.rows(x)
    if rows is None or rows.packed or rows.row != 1 or rows.batch not in (None, 0):
        return None
    given = (call.own(x, rows), Selected("weights"))
    if is_tensor(labels):
        given = (*given, call.own(labels, rows), Full(labels))
    return Plan(rows, times_weights, given)

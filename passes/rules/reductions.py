"""Reductions, scans and norms over features.

Proof of the law: the dimensions that are reduced, scanned or normalised are neither the token
row nor the batch, so each token's result reads that token alone. Over the token row, or over
all dimensions, an operation takes the general path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.passes.facts import is_tensor, tensors_of
from fxseek.passes.rules.registry import Call, Plan, Sample, rule, whole


def _dims(value: object, rank: int) -> tuple[int, ...] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(isinstance(dim, int) for dim in value):
        return None
    return tuple(dim % rank for dim in value)


def _over_features(call: Call, dims: tuple[int, ...] | None, keepdim: bool) -> Plan | None:
    source = call.node.args[0] if call.node.args else None
    rows = call.rows(source)
    if rows is None or dims is None or not isinstance(source, fx.Node):
        return None
    if any(dim in rows.dims for dim in dims):
        return None
    if any(is_tensor(node) for node in call.node.all_input_nodes if node is not source):
        return None
    after = rows if keepdim else rows.without(dims)
    results = list(tensors_of(call.node.meta["example_value"]))
    if not all(call.sizes.valid(after, call.sizes.shape(result)) for result in results):
        return None
    single = is_tensor(call.node)
    return Plan(
        after if single else tuple(after for _ in results),
        call.target,
        (call.own(source, rows), *call.node.args[1:]),
        dict(call.node.kwargs),
    )


@rule(
    "mean",
    "sum",
    "prod",
    "amax",
    "amin",
    "var",
    "std",
    "logsumexp",
    "any",
    "all",
    "argmax",
    "argmin",
    "nansum",
    family="per-token",
    cheap=True,
    reason="only feature dimensions are reduced",
    samples=(
        Sample(lambda x: x.mean(-1, keepdim=True)),
        Sample(lambda x: x.sum(-1)),
        Sample(lambda x: x.pow(2).mean(dim=(-1,))),
        Sample(lambda x: x.amax((1, 3)), ("b 2 t 5",)),
        Sample(lambda x: x.var(-1, keepdim=True)),
        Sample(lambda x: torch.logsumexp(x, -1)),
        Sample(lambda x: (x.prod(-1), x.amin(2, True), x.std(-1), x.nansum([2]))),
        Sample(lambda x: ((x > 0.5).any(-1), (x > 0.5).all(2), x.argmax(-1), x.argmin(2))),
    ),
)
def reduce(call: Call) -> Plan | None:
    """Reductions with a ``dim`` argument."""
    source: Any = call.node.args[0]
    rank = len(call.shape(source)) if is_tensor(source) else 0
    dims = _dims(call.arg(1, "dim"), rank) if rank else None
    if call.node.kwargs.get("out") is not None:
        return None
    name = getattr(call.target, "__name__", "")
    keep = call.node.kwargs.get("keepdim", False)
    # positions differ (var: correction is keyword-only), so read keepdim where it is a bool
    if "keepdim" not in call.node.kwargs and len(call.node.args) > 2:
        keep = call.node.args[2] if name not in ("var", "std") else None
    if not isinstance(keep, bool):
        return None
    return _over_features(call, dims, keep)


@rule(
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "flip",
    "sort",
    "argsort",
    "topk",
    "normalize",
    "glu",
    family="per-token",
    reason="works along one feature dimension and keeps the others",
    samples=(
        Sample(lambda x: F.softmax(x, dim=-1)),
        Sample(lambda x: F.log_softmax(x, dim=1), ("b 3 t 5",)),
        Sample(lambda x: x.softmax(-1)),
        Sample(lambda x: x.cumsum(-1)),
        Sample(lambda x: x.flip(-1)),
        Sample(lambda x: x.topk(2, dim=-1)[0]),
        Sample(lambda x: F.glu(x, -1), ("b t 6",)),
        Sample(lambda x: (x.cumprod(2), x.sort(-1)[0], x.argsort(-1), F.normalize(x, dim=-1))),
        Sample(lambda x: x.flip(1, 3), ("b 3 t 5",)),
    ),
)
def along(call: Call) -> Plan | None:
    """Operations along one dimension."""
    source = call.node.args[0] if call.node.args else None
    if not is_tensor(source) or not isinstance(source, fx.Node):
        return None
    rank = len(call.shape(source))
    name = getattr(call.target, "__name__", "")
    position = {"topk": 2, "normalize": 2}.get(name, 1)
    default = {"topk": -1, "sort": -1, "argsort": -1, "normalize": 1, "glu": -1}.get(name)
    dim = call.arg(position, "dim", call.node.kwargs.get("dims", default))
    if name == "sort" and "stable" in call.node.kwargs:
        dim = call.node.kwargs.get("dim", -1)
    if name == "flip" and isinstance(dim, int):
        dim = call.node.args[1:]  # x.flip(1, 2): every further argument is a dimension
    if isinstance(dim, bool):
        return None
    return _over_features(call, _dims(dim, rank), keepdim=True)


@rule(
    "layer_norm",
    "rms_norm",
    family="per-token",
    cheap=True,
    reason="normalises the trailing feature dimensions of each token",
    samples=(
        Sample(lambda x, w, b: F.layer_norm(x, (5,), w, b), ("b t 5", "5", "5")),
        Sample(lambda x, w: F.rms_norm(x, (5,), w), ("b t 5", "5")),
        Sample(lambda x: F.layer_norm(x, (3, 5)), ("b t 3 5",)),
    ),
)
def norm(call: Call) -> Plan | None:
    """Norms over ``normalized_shape``."""
    source = call.arg(0, "input")
    rows = call.rows(source)
    shape = call.arg(1, "normalized_shape")
    if rows is None or not isinstance(shape, (list, tuple)):
        return None
    rank = len(call.shape(source))
    if any(dim >= rank - len(shape) for dim in rows.dims):
        return None
    args = (call.own(source, rows), *whole(call.node.args[1:]))
    return Plan(rows, call.target, args, whole(dict(call.node.kwargs)))

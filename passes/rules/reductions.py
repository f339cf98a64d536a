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

from fxseek.passes.entries import Groups
from fxseek.passes.facts import is_tensor
from fxseek.passes.rules.experts import add_up, rows_as, sort_entries
from fxseek.passes.rules.pointwise import pointwise_plan
from fxseek.passes.rules.registry import Call, Plan, Sample, rule


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
    rows = call.placed(source)
    if rows is None or dims is None or not isinstance(source, fx.Node):
        return None
    if any(dim in rows.dims for dim in dims):
        return None
    if any(is_tensor(node) for node in call.node.all_input_nodes if node is not source):
        return None
    return call.same(source, rows, rows if keepdim else rows.without(dims))


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


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """Entries in the order of their choices, and in that of an argsort, and back."""
    x = x.reshape(-1, x.shape[-1])
    keys, perm = x[:, :4].topk(2, -1)[1].view(-1).sort()
    other = (x.argmax(-1) * 3).argsort()
    y = (x[perm // 2].softmax(-1) * keys[:, None])[perm.argsort()].view(-1, 2, x.shape[1]).sum(1)
    return y * x[other].cumsum(-1).relu()[other.argsort()]


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
        Sample(_in_order),
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
    if name in ("sort", "argsort"):
        in_order = sort_entries(call, dim)
        if in_order is not None:
            return in_order
    if name == "cumsum" and rows_as(Groups, call, source) is not None:
        return add_up(call, dim)
    return _over_features(call, _dims(dim, rank), keepdim=True)


@rule(
    "max",
    "min",
    family="per-token",
    reason="the greatest of a token's features, or of two elements at one index",
    samples=(
        Sample(lambda x: x.max(-1)[0]),
        Sample(lambda x: torch.min(x, dim=2, keepdim=True)[0]),
        Sample(lambda x, y: torch.max(x, y) - torch.min(x, y), ("b t 5", "b t 1")),
    ),
)
def extreme(call: Call) -> Plan | None:
    """``max(x, dim)``, with its index, and ``max(x, y)``."""
    source, dim = call.arg(0, "input"), call.arg(1, "dim", call.node.kwargs.get("other"))
    if is_tensor(dim):
        return pointwise_plan(call)
    keep = call.arg(2, "keepdim", False)
    if type(dim) is not int or not isinstance(keep, bool) or not isinstance(source, fx.Node):
        return None
    return _over_features(call, _dims(dim, len(call.shape(source))), keep)


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
    rows = call.placed(source)
    shape = call.arg(1, "normalized_shape")
    if rows is None or not isinstance(shape, (list, tuple)):
        return None
    rank = len(call.shape(source))
    if any(dim >= rank - len(shape) for dim in rows.dims):
        return None
    return call.same(source, rows, rows)

"""Operations that only move elements: views, transposes, slices of features, joins.

Proof of the law: each is a map of indices that carries the token index to one place, so it
commutes with selecting rows. Reshapes are read as groups of dimensions with equal products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxseek.passes.entries import entries_of, moved_rows
from fxseek.passes.facts import Placed, Rows, is_tensor, written_out
from fxseek.passes.rules.experts import look_up
from fxseek.passes.rules.registry import Call, Full, Plan, Sample, fake, operation, rule


def _source(call: Call) -> tuple[Any, Placed | None]:
    """The first operand, and where its tokens are."""
    source = call.node.args[0] if call.node.args else None
    return source, call.placed(source)


def _reads_more(call: Call) -> bool:
    """Whether the call reads another node than its source (a size or an index that is computed)."""
    return len(call.node.all_input_nodes) > 1


def _checked(call: Call, rows: Placed | None) -> Placed | None:
    return rows if rows is not None and call.sizes.valid(rows, call.out) else None


@rule(
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    family="per-token",
    layout=True,
    cheap=True,
    reason="row-major order is kept and the token dimension stays a dimension (or batch × tokens)",
    samples=(
        Sample(lambda x: x.view(x.shape[0], x.shape[1], 2, 3), ("b t 6",)),
        Sample(lambda x: x.reshape(-1, 5), ("b t 5",)),
        Sample(lambda x: x.reshape(-1, 5).view(x.shape[0], -1, 5), ("b t 5",)),
        Sample(lambda x: x.flatten(2), ("b t 3 5",)),
        Sample(lambda x: x.unsqueeze(1), ("b t 5",)),
        Sample(lambda x: x.unsqueeze(2).squeeze(2), ("b t 5",)),
        Sample(lambda x: x.unflatten(-1, (2, 3)), ("b t 6",)),
    ),
)
def reshape(call: Call) -> Plan | None:
    """Every operation that keeps the row-major order, as one reshape to explicit sizes."""
    source, rows = _source(call)
    if rows is None:
        return None
    if fake(source).dtype != fake(call.node).dtype:
        return None  # x.view(dtype) reads the bits anew
    after = _checked(call, moved_rows(call.sizes, rows, call.shape(source), call.out))
    if after is None:
        return None
    return Plan(after, torch.reshape, (call.own(source, rows), call.compact_shape(after)))


@rule(
    "transpose",
    "permute",
    "movedim",
    "t",
    family="per-token",
    layout=True,
    cheap=True,
    reason="dimensions change places; the token dimension goes along",
    samples=(
        Sample(lambda x: x.transpose(1, 2), ("b t 3 5",)),
        Sample(lambda x: x.permute(0, 2, 1, 3), ("b t 3 5",)),
        Sample(lambda x: x.permute(2, 0, 1), ("b t 5",)),
        Sample(lambda x: x.movedim(1, 2), ("b t 3 5",)),
        Sample(lambda x: x.transpose(-1, -2), ("b t 5",)),
        Sample(lambda x: x.reshape(-1, 5).t()),
        Sample(lambda x: x.transpose(0, 1)),
    ),
)
def permute(call: Call) -> Plan | None:
    """Transpositions; the new places are read off by permuting a list of dimensions."""
    source, rows = _source(call)
    if rows is None:
        return None
    rank = len(call.shape(source))
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")  # sizes name dimensions
    order = [size - 1 for size in call.target(probe, *call.node.args[1:], **call.node.kwargs).shape]
    return call.same(source, rows, rows.moved(order.index))


@rule(
    "expand",
    "broadcast_to",
    "expand_as",
    family="per-token",
    layout=True,
    cheap=True,
    reason="repeats along dimensions of size 1, which belong to no token, or makes rows of tokens",
    samples=(
        Sample(lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1)),
        Sample(lambda x: x.unsqueeze(0).expand(2, *x.shape)),
        Sample(lambda x: torch.broadcast_to(x.unsqueeze(0), (2, *x.shape))),
        Sample(lambda x, y: x[..., :1].expand_as(y), ("b t 5", "b t 5")),
        Sample(lambda x, w: x * w.expand(x.shape[0], x.shape[1], -1), ("b t 5", "5")),
        Sample(lambda x, w: x + w.view(3, 1, 1).expand_as(x), ("b 3 t 5", "3")),
    ),
)
def expand(call: Call) -> Plan | None:
    """Broadcasting to explicit sizes; what has no tokens becomes the same for each."""
    source, rows = _source(call)
    if rows is None:
        return _of_each(call)
    after = _checked(call, rows.shift(len(call.out) - len(call.shape(source))))
    if after is None:
        return None
    target = torch.Tensor.expand
    return Plan(after, target, (call.own(source, rows), call.compact_shape(after)))


def _of_each(call: Call) -> Plan | None:
    """A value without tokens, the same for every token."""
    source = call.arg(0, "input")
    if not is_tensor(source) or call.facts.token_sized(source):
        return None
    rows = call.sizes.rows(call.out)
    if rows is None or rows.packed:
        return None
    return Plan(rows, torch.Tensor.expand, (Full(source), call.compact_shape(rows)))


@rule(
    "repeat_interleave",
    "repeat",
    "tile",
    family="per-token",
    layout=True,
    cheap=True,
    reason="each copy of a token is an entry of it; no other repetition has a plan",
    samples=(
        Sample(lambda x: x.repeat_interleave(3, dim=2)),
        Sample(lambda x: x.repeat(1, 1, 2)),
        Sample(lambda x: x.tile((2,))),
        Sample(lambda x: x.repeat(2, 1, 1, 1)),
        Sample(lambda x: x.reshape(-1, 5).repeat_interleave(2, 0).view(-1, 2, 5).sum(1)),
        Sample(lambda x: x.reshape(-1, 5).repeat(3, 1).view(3, -1, 5).sum(0)),
        Sample(lambda x: x.tile((3, 1)).unflatten(1, (3, -1)).exp()),
    ),
)
def repeat(call: Call) -> Plan | None:
    """Repetition along features, or of tokens, which makes entries of them."""
    source, rows = _source(call)
    if rows is None or _reads_more(call):
        return None
    before, each = call.shape(source), operation(call.node) == "repeat_interleave"
    if each and call.arg(2, "dim") is None and len(before) > 1:
        return None  # flattened
    after = rows.shift(len(call.out) - len(before))
    times = call.out[after.row] / before[rows.row] if 0 <= after.row < len(call.out) else None
    if times is not None and times.is_Integer and times != 1:
        entries = entries_of(after)
        if entries.order is not None:
            return None
        name = "inner" if each else "outer"
        after = replace(entries, **{name: getattr(entries, name) * int(times)})
    return call.same(source, rows, after)


@rule(
    "view_as_complex",
    "view_as_real",
    family="per-token",
    cheap=True,
    reason="the last dimension holds the parts of a complex number",
    samples=(
        Sample(lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), ("b t 3 2",)),
        Sample(lambda x: torch.view_as_real(torch.view_as_complex(x)).flatten(3), ("b 3 t 5 2",)),
    ),
)
def complex_view(call: Call) -> Plan | None:
    """Pairs of numbers as complex ones, and back."""
    source, rows = _source(call)
    if rows is None:
        return None
    last = len(call.shape(source)) - 1
    if operation(call.node) == "view_as_complex" and last in rows.dims:
        return None
    return call.same(source, rows, rows)


@rule(
    "cat",
    "stack",
    family="per-token",
    layout=True,
    cheap=True,
    reason="joins along a feature dimension, token by token",
    samples=(
        Sample(lambda x, y: torch.cat((x, y), dim=-1), ("b t 5", "b t 3")),
        Sample(lambda x: torch.cat((-x, x), -1)),
        Sample(lambda x, y: torch.stack((x, y), dim=1), ("b t 5", "b t 5")),
        Sample(lambda x, y: torch.stack((x, y), dim=-1), ("b t 5", "b t 5")),
    ),
)
def join(call: Call) -> Plan | None:
    """Concatenation and stacking along a dimension without tokens."""
    parts = call.arg(0, "tensors")
    if not isinstance(parts, (list, tuple)) or not all(is_tensor(part) for part in parts):
        return None
    name = getattr(call.target, "__name__", "")
    rank = len(call.out)
    dim = call.arg(1, "dim", 0)
    if not isinstance(dim, int):
        return None
    dim %= rank
    readings: set[Rows] = set()
    for stream in (True, False):
        for part in parts:
            rows = call.rows(part) if (part in call.facts.stream) is stream else None
            if rows is not None:
                readings.add(rows)
        if readings:
            break
    if len(readings) != 1:
        return None
    rows = readings.pop()
    moved = rows.moved(lambda old: old + (old >= dim)) if name == "stack" else rows
    after = _checked(call, moved)
    if after is None or dim in after.dims:
        return None
    wanted = call.sizes.packed if rows.packed else call.sizes.tokens
    if any(call.shape(part)[rows.row] != wanted for part in parts):
        return None
    if rows.batch is not None and any(
        call.shape(part)[rows.batch] != call.sizes.batch for part in parts
    ):
        return None
    joined = [call.own(part, rows) for part in parts]
    return Plan(after, call.target, (joined, dim))


@rule(
    "chunk",
    "split",
    "unbind",
    "tensor_split",
    "split_with_sizes",
    family="per-token",
    cheap=True,
    reason="cuts along a feature dimension; every piece keeps its tokens",
    samples=(
        Sample(lambda x: x.chunk(2, dim=-1)[1], ("b t 6",)),
        Sample(lambda x: x.split(2, dim=2)[0], ("b t 6",)),
        Sample(lambda x: x.split((2, 4), -1)[1], ("b t 6",)),
        Sample(lambda x: x.unbind(2)[1], ("b t 3 5",)),
        Sample(lambda x: x.unbind(1)[1], ("b 3 t 5",)),
        Sample(lambda x: x.tensor_split(2, -1)[0]),
        Sample(lambda x: x.split_with_sizes((2, 3), -1)[1]),
    ),
)
def cut(call: Call) -> Plan | None:
    """Splits into tuples."""
    source, rows = _source(call)
    if rows is None:
        return None
    rank = len(call.shape(source))
    unbind = getattr(call.target, "__name__", "") == "unbind"
    dim = call.arg(1, "dim", 0) if unbind else call.arg(2, "dim", 0)
    if not isinstance(dim, int) or _reads_more(call):
        return None
    dim %= rank
    if dim in rows.dims:
        return None
    return call.same(source, rows, rows.without([dim]) if unbind else rows)


@rule(
    "getitem",
    "narrow",
    "select",
    family="per-token",
    cheap=True,
    reason="slices features or adds dimensions; the token and batch dimensions are taken whole",
    samples=(
        Sample(lambda x: x[..., :3]),
        Sample(lambda x: x[:, :, 1:4]),
        Sample(lambda x: x[..., 2]),
        Sample(lambda x: x[:, None]),
        Sample(lambda x: x[..., None]),
        Sample(lambda x: x[:, 0:, ::2]),
        Sample(lambda x: x[:, 1], ("b 3 t 5",)),
        Sample(lambda x: x.narrow(-1, 1, 2)),
        Sample(lambda x: x.select(-1, 1)),
        Sample(lambda x: x.select(1, 0), ("b 3 t 5",)),
        Sample(lambda x: x[:, :, [2, 0]]),
        Sample(lambda x: x[..., [-2], :], ("b t 3 5",)),
    ),
)
def getitem(call: Call) -> Plan | None:
    """Basic indexing that leaves the token and the batch dimension whole."""
    source = call.node.args[0]
    if not is_tensor(source):
        return None  # an element of a tuple: the ditch pass follows it
    by: Any = call.node.args[1] if operation(call.node) == "getitem" else None
    if is_tensor(by) or (isinstance(by, tuple) and is_tensor(by[0]) and len(by) == 1):
        return look_up(call, source, by[0] if isinstance(by, tuple) else by)
    source, rows = _source(call)
    if rows is None:
        return None
    rank = len(call.shape(source))
    name = getattr(call.target, "__name__", "")
    if name in ("narrow", "select"):
        dim = call.arg(1, "dim")
        if not isinstance(dim, int) or _reads_more(call):
            return None
        dim %= rank
        if dim in rows.dims:
            return None
        return call.same(source, rows, rows.without([dim]) if name == "select" else rows)
    index = written_out(by, rank)
    if index is None:
        return None
    places_after: dict[int, int] = {}
    emitted: list[Any] = []
    old = new = 0
    for item in index:
        if item is None:
            new += 1
            emitted.append(None)
            continue
        if isinstance(item, bool):
            return None
        if isinstance(item, int):
            if old in rows.dims:
                return None
            emitted.append(item)
            old += 1
            continue
        if _is_feature_list(item) and old not in rows.dims:
            if any(isinstance(other, (list, int)) for other in index if other is not item):
                return None  # several advanced indices are paired, and may move to the front
            emitted.append(list(item))
            places_after[old] = new
            old, new = old + 1, new + 1
            continue
        if not isinstance(item, slice):
            return None
        if old in rows.dims:
            if item.start not in (None, 0) or item.step not in (None, 1):
                return None
            emitted.append(slice(None))  # the size check below bears out that it is whole
        else:
            emitted.append(slice(*(_place(x) for x in (item.start, item.stop, item.step))))
        places_after[old] = new
        old, new = old + 1, new + 1
    after = _checked(call, rows.moved(places_after.__getitem__))
    if after is None:
        return None
    return Plan(after, call.target, (call.own(source, rows), tuple(emitted)))


def _is_feature_list(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(type(x) is int for x in item)


def _place(item: Any) -> Any:
    return Full(item) if isinstance(item, fx.Node) else item

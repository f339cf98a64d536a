"""Orders of entries: sorts by a choice, lookups by it, products in groups, and the way back.

A mixture of experts makes entries of tokens (one for each expert that a token has chosen), sorts
them by expert, multiplies each group with the expert's weights, and adds up what belongs together.
Proof of the law: place i of a value in the order `perm` depends on entry ``perm[i]`` alone, and
each operation here keeps that, so that an entry's value does not depend on the place that it has:

- ``x[perm // k]`` reads the token of the entry, ``table[key[perm]]`` what the entry's key says;
- ``grouped_mm(x, w, ends)``, where `ends` counts the keys by which `x` is sorted, is
  ``x[i] @ w[key[perm[i]]]``, as place i lies between the ends of the groups before and at its key;
- ``y[inverse]`` and ``zeros.index_add(0, perm // k, y)`` bring each entry back to its own token.

So any set of tokens may be sorted by itself. `perm` and `ends` are no values of tokens: they have
facts of their own (`Order`, `Groups`), and whatever else reads them gets those of all tokens.
Which of several entries with one key comes first doesn't matter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.ops.experts import add_entries, count_keys
from fxseek.ops.rows import inverse
from fxseek.passes.entries import Entries, Groups, Order, entries_of, plainly
from fxseek.passes.facts import Placed, is_tensor
from fxseek.passes.rules.registry import (
    Call,
    Full,
    Kept,
    Length,
    Plan,
    Sample,
    argument,
    fake,
    operation,
    rule,
)

_K = TypeVar("_K", Order, Groups)


def rows_as(kind: type[_K], call: Call, node: Any) -> _K | None:
    """The order that a value numbers, or the groups that it counts; None if it does not."""
    found = call.facts.rows.get(node) if isinstance(node, fx.Node) else None
    return found if isinstance(found, kind) else None


def sort_entries(call: Call, dim: Any) -> Plan | None:
    """A sort of keys, one for each entry, in one dimension; of an order, its inverse."""
    keys, name = call.arg(0, "input"), operation(call.node)
    if not is_tensor(keys) or not isinstance(keys, fx.Node) or dim not in (0, -1):
        return None
    order = rows_as(Order, call, keys)
    if order is not None and name == "argsort" and order.over == 1 and not order.inverse:
        return Plan(replace(order, inverse=not order.inverse), inverse, (Kept(keys),))
    of = call.placed(keys)
    if of is None or len(call.shape(keys)) != 1 or entries_of(of) != _canonical(of):
        return None
    made = Order(call.node, entries_of(of))
    rows = made if name == "argsort" else (replace(made.of, order=call.node), made)
    return Plan(rows, call.target, (call.own(keys, of), *call.node.args[1:]), call.node.kwargs)


def _canonical(rows: Placed) -> Entries:
    """The same entries as one dimension token by token has them."""
    found = entries_of(rows)
    return Entries(found.rows._replace(row=0, batch=None, heads=1), found.inner)


def divide_order(call: Call) -> Plan | None:
    """``perm // k``, which numbers tokens in the place of entries."""
    order, by = rows_as(Order, call, call.arg(0, "input")), call.arg(1, "other")
    if order is None or order.inverse or type(by) is not int or by < 1:
        return None
    if operation(call.node) == "div" and call.node.kwargs.get("rounding_mode") is None:
        return None
    if order.of.inner % (order.over * by):
        return None
    args = (Kept(call.arg(0, "input")), by)
    return Plan(replace(order, over=order.over * by), call.target, args, call.node.kwargs)


def look_up(call: Call, source: Any, index: Any) -> Plan | None:
    """``source[index]`` by one tensor: rows into an order or back, or a table by keys."""
    if not isinstance(source, fx.Node) or not is_tensor(index):
        return None
    order = rows_as(Order, call, index)
    if order is not None:
        rows = call.placed(source)
        found = None if rows is None else _ordered(entries_of(rows), order)
        if rows is None or found is None:
            return None
        return Plan(plainly(found), torch.index_select, (call.own(source, rows), 0, Kept(index)))
    rows = call.placed(index)
    if rows is None or call.facts.token_sized(source) or not call.sizes.valid(rows, call.out):
        return None
    if fake(index).is_floating_point() or fake(index).dtype == torch.bool:
        return None
    return Plan(rows, torch.Tensor.__getitem__, (Full(source), call.own(index, rows)))


def _ordered(rows: Entries, order: Order) -> Entries | None:
    """Where entries are that are looked up by an order."""
    if order.inverse:
        there = replace(order.of, order=order.sort)
        return replace(rows, order=None) if rows == there and order.over == 1 else None
    apart = replace(order.of, inner=order.of.inner // order.over)
    return replace(order.of, order=order.sort) if rows == apart else None


def count_entries(call: Call, keys: Any, count: Any) -> Plan | None:
    """How many entries have each of the keys 0 … `count` - 1, which are choices of tokens."""
    rows, chosen = call.placed(keys), _choice(keys)
    if rows is None or chosen is None or type(count) is not int or not isinstance(keys, fx.Node):
        return None
    return Plan(Groups(chosen, count, ends=False), count_keys, (call.own(keys, rows), count))


def add_up(call: Call, dim: Any) -> Plan | None:
    """A running sum of counts."""
    counts = call.arg(0, "input")
    groups = rows_as(Groups, call, counts)
    if groups is None or groups.ends or dim not in (0, -1):
        return None
    args = (Kept(counts), *call.node.args[1:])
    return Plan(replace(groups, ends=True), call.target, args, call.node.kwargs)


_WHOLE = (torch.float32, torch.float64, torch.int32, torch.int64)
"""Types that hold the number of any expert."""
_MOVES = ("reshape", "flatten", "to", "contiguous", "clone")


def _choice(node: Any) -> fx.Node | None:
    """The indices that a value holds as they are, in whatever order: none is below 0."""
    while isinstance(node, fx.Node) and is_tensor(node):
        name, source = operation(node), node.args[0] if node.args else None
        if name in ("argmax", "argmin"):
            return node
        if name == "getitem" and isinstance(source, fx.Node) and not is_tensor(source):
            chooses = operation(source)
            if node.args[1] == 1 and chooses in ("topk", "sort", "max", "min"):
                return node
            if node.args[1] != 0 or chooses != "sort":
                return None
            node = source.args[0]
        elif name in _MOVES:
            if name == "to" and fake(node).dtype not in _WHOLE:
                return None
            node = source
        else:
            return None
    return None


def _ascending(sort: fx.Node) -> bool:
    return argument(sort, 2, "descending", False) is False


def _one_by_one(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)


def _experts(x: torch.Tensor, weight: torch.Tensor, product: Any) -> torch.Tensor:
    """Two choices of each token, sorted, multiplied and brought back."""
    x = x.reshape(-1, x.shape[-1])
    gates, chosen = x[:, : weight.shape[0]].topk(2, -1)
    keys, perm = chosen.reshape(-1).sort()
    counts = torch.histc(keys.double(), weight.shape[0], 0, weight.shape[0] - 1)
    y = product(x[perm // 2], weight, counts.cumsum(0, dtype=torch.int32))
    y = (y * gates.reshape(-1)[perm].unsqueeze(-1) + weight[keys, 0])[perm.argsort()]
    return y.view(x.shape[0], 2, -1).sum(1)


@rule(
    "histc",
    family="groups",
    needs="transformers.integrations.moe",
    reason="counts the entries of each key; those of selected tokens count by themselves",
    samples=(Sample(lambda x, w: _experts(x, w, _one_by_one), ("b t 5", "3 5 7")),),
)
def histogram(call: Call) -> Plan | None:
    """``torch.histc`` of whole numbers, each in a bin of its own."""
    count, low, high = (call.arg(i, name) for i, name in ((1, "bins"), (2, "min"), (3, "max")))
    if type(count) is not int or count < 2 or low != 0 or high != count - 1:
        return None
    return count_entries(call, call.arg(0, "input"), count)


@rule(
    "count_keys",
    family="groups",
    reason="counts the entries of each key; those of selected tokens count by themselves",
    samples=(Sample(lambda x, w: _counted(x, w), ("b t 5", "3 7 5")),),
)
def counts(call: Call) -> Plan | None:
    """`fxseek.ops.experts.count_keys`."""
    return count_entries(call, call.arg(0, "keys"), call.arg(1, "count"))


def product_in_groups(call: Call, x: Any, weight: Any, of: Any, *, ends: bool) -> Plan | None:
    """A product of entries, ordered by a key, with the weights of their keys."""
    groups, rows = rows_as(Groups, call, of), call.placed(x)
    if groups is None or groups.ends is not ends or not isinstance(rows, Entries):
        return None
    if not is_tensor(weight):
        return None
    sort = rows.order
    if sort is None or not _ascending(sort) or _choice(sort.args[0]) is not groups.keys:
        return None
    shape = call.shape(weight)
    if rows.row != 0 or len(call.shape(x)) != 2 or len(shape) != 3 or shape[0] != groups.count:
        return None
    if call.facts.token_sized(weight) or not call.sizes.valid(rows, call.out):
        return None
    args = (call.own(x, rows), Full(weight))
    if ends:
        return Plan(rows, call.target, args, {"offs": Kept(of)})
    return Plan(rows, call.target, (*args, Kept(of)))


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    def product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        x, weight = ((y * 9).round().bfloat16() for y in (x, weight))  # sums are exact in any order
        return F.grouped_mm(x, weight, offs=ends).double()

    return _experts(x, weight, product)


def _counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1])
    chosen = x[:, :3].topk(2, -1)[1]
    perm = chosen.flatten().argsort()
    y = torch.ops.fxseek.grouped_linear(x[perm // 2], weight, count_keys(chosen, 3))
    return y[perm.argsort()].view(-1, 2, 7).sum(1)


@rule(
    "fxseek::grouped_linear",
    family="per-token",
    reason="each entry is multiplied with the weights of its own key",
    samples=(Sample(_counted, ("b t 5", "3 7 5")),),
)
def grouped_linear(call: Call) -> Plan | None:
    """`fxseek.ops.experts.grouped_linear`."""
    x, weight, counts = call.arg(0, "x"), call.arg(1, "weight"), call.arg(2, "counts")
    return product_in_groups(call, x, weight, counts, ends=False)


def _added_up(x: torch.Tensor) -> torch.Tensor:
    """Entries that are added up, to zeros and to what tokens have, in the place of a sum."""
    x = x.reshape(-1, x.shape[-1])
    keys, perm = x[:, :3].topk(2, -1)[1].flatten().sort(0)
    token = torch.div(perm, 2, rounding_mode="trunc")
    y = x[token].exp()
    return torch.zeros_like(x).index_add(0, token, y) * x.index_add(0, token, y * keys[:, None])


@rule(
    "grouped_mm",
    family="per-token",
    reason="each entry is multiplied with the weights of its own key",
    samples=(Sample(_grouped_mm, ("b t 16", "3 16 16")),),
)
def grouped_mm(call: Call) -> Plan | None:
    """``F.grouped_mm(x, weight, offs=ends)``."""
    if call.node.kwargs.get("bias") is not None or call.node.kwargs.get("out_dtype") is not None:
        return None
    x, weight, ends = call.arg(0, "mat_a"), call.arg(1, "mat_b"), call.node.kwargs.get("offs")
    return product_in_groups(call, x, weight, ends, ends=True)


@rule(
    "transformers::grouped_mm_fallback",
    family="per-token",
    needs="transformers.integrations.moe",
    reason="each entry is multiplied with the weights of its own key",
    samples=(Sample(lambda x, w: _experts(x, w, _one_by_one), ("b t 5", "3 5 7")),),
)
def grouped_mm_fallback(call: Call) -> Plan | None:
    """What transformers calls where `F.grouped_mm` has no kernel."""
    x, weight, ends = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "offs")
    return product_in_groups(call, x, weight, ends, ends=True)


@rule(
    "index_add",
    family="per-token",
    reason="adds each entry to its own token's row",
    samples=(Sample(_added_up),),
)
def index_add(call: Call) -> Plan | None:
    """``base.index_add(0, perm // k, entries)``."""
    base, dim, index, source = (call.node.args[i] for i in range(4))
    order, rows = rows_as(Order, call, index), call.placed(source)
    if order is None or order.inverse or dim != 0 or call.node.kwargs.get("alpha", 1) != 1:
        return None
    if rows != replace(order.of, order=order.sort) or not isinstance(base, fx.Node):
        return None
    tokens = plainly(replace(order.of, inner=order.of.inner // order.over))
    if not call.sizes.valid(tokens, call.out):
        return None
    given = (Kept(index), call.own(source, rows))  # type: ignore[arg-type]
    if call.placed(base) == tokens:
        return Plan(tokens, torch.index_add, (call.own(base, tokens), 0, *given))
    if getattr(base.target, "__name__", base.target) not in ("zeros", "new_zeros"):
        return None
    length = Length(call.sizes.compact(call.out, tokens)[0])
    return Plan(tokens, add_entries, (length, *given))


def _written(x: torch.Tensor) -> torch.Tensor:
    """Entries in an order, and back by its inverse."""
    x = x.reshape(-1, x.shape[-1])
    perm = x[:, :3].topk(2, -1)[1].view(-1).sort()[1]
    places = torch.empty_like(perm)
    places[perm] = torch.arange(perm.shape[0], device=perm.device)
    return x[perm // 2].exp()[places].view(-1, 2, x.shape[1]).sum(1)


@rule(
    "set_item",
    family="per-token",
    reason="places that are numbered in the order of entries number those of the entries",
    samples=(Sample(_written),),
)
def invert_order(call: Call) -> Plan | None:
    """``places[perm] = arange(n)``, as a new tensor: the inverse of an order."""
    base, index, value = call.node.args[:3]
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    order = rows_as(Order, call, index)
    if order is None or order.over != 1 or order.inverse or not is_tensor(base):
        return None
    if not isinstance(value, fx.Node) or value.target is not torch.arange or len(value.args) != 1:
        return None
    if set(value.kwargs) - {"device", "dtype"} or call.shape(value) != call.shape(base):  # type: ignore[arg-type]
        return None
    return Plan(replace(order, inverse=True), inverse, (Kept(index),))  # type: ignore[arg-type]

"""Normalise: one spelling per operation, and K/V before they are repeated.

Before::

    y = x.float();  z = torch.add(y, 1);  p = F.softmax(z, -1, _stacklevel=3)
    k = k[:, :, None].expand(b, h, r, n, d).reshape(b, h * r, n, d)
    o = scaled_dot_product_attention(q, k, v)

After::

    y = x.to(torch.float32);  z = y + 1;  p = torch.softmax(z, -1)
    o = scaled_dot_product_attention(q, k, v, enable_gqa=True)   # k as it was before
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek._torch import size_expression
from fxseek.passes.facts import example, is_tensor
from fxseek.passes.rules import registry

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "matmul": torch.matmul,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
}
_VARIADIC = {"permute", "reshape", "expand", "repeat", "tile", "flip", "view"}
_OTHER_ORDER = {"where"}
"""Methods whose tensor is not the first argument of the function of that name."""
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
"""Spellings that torch's own functions take for NumPy's sake."""
_FIRST = ("input", "tensors")


def normalise(graph: fx.Graph) -> fx.Graph:
    """The graph in which each registered operation is one call_function."""
    for node in graph.nodes:
        spelled = _spell(node)
        if spelled is not None:
            node.op = "call_function"
            node.target, node.args, node.kwargs = spelled
        _undo_repeat(node)
    return graph


def _spell(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The canonical call of a node, or None to keep it as it is."""
    if node.op not in ("call_function", "call_method"):
        return None
    args, kwargs = _arguments(node)
    if not args:
        return None
    source: Any = args[0]
    value = example(node)
    if getattr(node.target, "__name__", "") == "tracable_create_parameter":
        return torch.Tensor.detach, (source,), {}  # nobody can ask for its gradient
    if node.op == "call_method" and is_tensor(args[0]):
        method = str(node.target)
        if method in _DTYPES and len(args) == 1:
            return torch.Tensor.to, (args[0], _DTYPES[method]), {}
        if method == "type_as" or (method == "type" and len(args) == 2):
            return torch.Tensor.to, (args[0], value.device, value.dtype), {}
    name = registry.operation(node)
    if name is None:
        return None
    if name == "to" and len(args) > 1 and is_tensor(args[1]):
        # of the other tensor only dtype and device are read, not its tokens
        return torch.Tensor.to, (source, value.device, value.dtype, *args[2:]), kwargs
    if name in _ARITHMETIC and len(args) == 2 and not kwargs and isinstance(value, torch.Tensor):
        return _ARITHMETIC[name], args, {}
    if name in ("softmax", "log_softmax"):
        function = torch.softmax if name == "softmax" else torch.log_softmax
        place = 3 if node.target in (F.softmax, F.log_softmax) else 2  # behind _stacklevel
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        dtype = args[place] if len(args) > place else kwargs.get("dtype")
        if dim is None:
            return None
        return function, (source, dim), {} if dtype is None else {"dtype": dtype}
    if node.op == "call_method":
        method = str(node.target)
        function = getattr(torch, method, None)
        as_method = method in _VARIADIC | _OTHER_ORDER
        if not as_method and isinstance(function, types.BuiltinFunctionType):
            return function, args, kwargs
        return getattr(torch.Tensor, method), args, kwargs
    if args != node.args or kwargs != node.kwargs:
        assert callable(node.target)
        return node.target, args, kwargs
    return None


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments by torch's own names, the first one in its place."""
    args: tuple[Any, ...] = node.args
    kwargs = dict(node.kwargs)
    if registry.operation(node) is None:
        return args, kwargs
    kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items()}
    if not args and "condition" not in kwargs:
        for name in _FIRST:
            if name in kwargs:
                args = (kwargs.pop(name),)
                break
    return args, kwargs


def _undo_repeat(node: fx.Node) -> None:
    """Let attention read keys and values before `repeat_kv`, with grouped queries instead."""
    if node.target is not F.scaled_dot_product_attention or len(node.args) < 3:
        return
    query, key, value = node.args[:3]
    if len(node.args) > 7 or node.kwargs.get("enable_gqa"):
        return
    if not (is_tensor(query) and is_tensor(key) and is_tensor(value)):
        return
    before_key, before_value = _before_repeat(key), _before_repeat(value)
    if before_key is None or before_value is None:
        return
    if example(before_key).shape[1] != example(before_value).shape[1]:
        return
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    if not _same_sizes(tuple(example(query).shape[-3:-2]), tuple(example(key).shape[-3:-2])):
        return  # queries of one head that are broadcast
    node.args = (query, before_key, before_value, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}


def _before_repeat(node: Any) -> fx.Node | None:
    """``x`` of ``reshape(expand(x[:, :, None], …))`` or ``repeat_interleave(x, r, 1)``."""
    name = registry.operation(node)
    if name == "repeat_interleave":
        source, dim = node.args[0], registry.argument(node, 2, "dim")
        repeats = registry.argument(node, 1, "repeats")
        if dim in (1, -3) and isinstance(repeats, int) and example(node).dim() == 4:
            return source
        return None
    if name != "reshape" or example(node).dim() != 4:
        return None
    wide = node.args[0]
    if not is_tensor(wide) or registry.operation(wide) != "expand" or example(wide).dim() != 5:
        return None
    inserted = wide.args[0]
    if not is_tensor(inserted) or example(inserted).dim() != 5:
        return None
    kind = registry.operation(inserted)
    if kind not in ("getitem", "unsqueeze"):
        return None
    source = inserted.args[0]
    if not is_tensor(source):
        return None
    shape, times = example(source).shape, example(wide).shape[2]
    if len(shape) != 4 or (kind == "getitem" and not _inserts_third(inserted.args[1])):
        return None
    batch, heads, *rest = shape
    expected = {
        inserted: (batch, heads, 1, *rest),
        wide: (batch, heads, times, *rest),
        node: (batch, heads * times, *rest),
    }
    fits = all(_same_sizes(example(x).shape, sizes) for x, sizes in expected.items())
    return source if fits else None


def _inserts_third(index: Any) -> bool:
    """Whether a subscript is ``[:, :, None]``, however many whole dimensions follow."""
    whole = slice(None)
    return (
        isinstance(index, tuple)
        and index[:3] == (whole, whole, None)
        and all(item is ... or item == whole for item in index[3:])
    )


def _same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return [*map(size_expression, a)] == [*map(size_expression, b)]

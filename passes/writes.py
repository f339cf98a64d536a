"""Writes: which operations write in place, and the pure call that makes the new value."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.passes.facts import argument, example, is_tensor, where

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}

BOOLEAN = (
    *("eq", "ne", "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"),
    *("not_equal", "logical_and", "logical_or", "logical_xor", "logical_not"),
)
"""Their results are boolean; in place they are of the written tensor's type."""

_BUFFER_WRITERS = {
    F.batch_norm: (1, 5, "training", False),
    F.instance_norm: (1, 5, "use_input_stats", True),
    torch.batch_norm: (3, 5, "training", False),
    torch.instance_norm: (3, 5, "use_input_stats", True),
}
"""Where the running mean is among the arguments, and the flag by which it is updated, with its
default."""


def set_item(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """`x` with ``x[index] = value``, as a new tensor; differentiable in `x` and `value`."""
    copy = x.clone()
    copy[index] = value
    return copy


def copied(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What ``x.copy_(source)`` leaves in `x`, as a new tensor."""
    return source.to(x.device, x.dtype).expand(x.shape).clone()


def filled(x: torch.Tensor, value: Any) -> torch.Tensor:
    """What ``x.fill_(value)`` leaves in `x`, as a new tensor; `value` a number or one element."""
    if isinstance(value, torch.Tensor):
        return copied(x, value)
    return torch.full_like(x, value)


def refuse(node: fx.Node, what: str, remedy: str) -> GraphError:
    """The error for a write that has no pure form."""
    return GraphError(f"{what}, at {where(node)} ({node.format_node()}). {remedy}")


def refuse_input(node: fx.Node, written: fx.Node) -> GraphError:
    """The error for a write to an input or a parameter."""
    path = _torch.source_path(written) or written.name
    remedy = "Write to a copy of it."
    if _torch.is_module_state(written):
        remedy = (
            "A parameter may be written to in a step under no_grad or through its .data, from its "
            "own value alone and before it is read. Make other writes between steps."
        )
    return refuse(node, f"the graph writes to {path}", remedy)


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a norm updates its running statistics."""
    if node.target not in _BUFFER_WRITERS:
        return False
    mean, place, flag, default = _BUFFER_WRITERS[node.target]
    written = is_tensor(argument(node, mean, "running_mean"))
    return written and bool(argument(node, place, flag, default))


def write_of(node: fx.Node) -> tuple[fx.Node, Callable[..., Any], tuple[Any, ...], dict] | None:
    """The node that is written to and the call that makes its new value, or None."""
    args, kwargs = node.args, dict(node.kwargs)
    if node.op == "call_function":
        if node.target in _OPERATORS and is_tensor(args[0]):
            return args[0], _OPERATORS[node.target], args, kwargs  # type: ignore[return-value]
        if node.target is operator.setitem and is_tensor(args[0]):
            return args[0], set_item, args, kwargs  # type: ignore[return-value]
        name = getattr(node.target, "__name__", "")
        if kwargs.get("out") is not None and not _into_unread(node):
            raise refuse(node, "an operation writes to out=", "Use its result instead.")
        flagged = _without_flag(node)
        if flagged is not None:
            return flagged
        if _updates_statistics(node):
            raise refuse(
                node,
                f"{name} updates its running statistics in training",
                "Put the layer in eval mode, or use a norm over features.",
            )
        mutable = _torch.mutable_operation(node.target)
        if mutable is not None:
            raise refuse(
                node, f"the operation {mutable} writes to its arguments", "Use a pure one."
            )
        if name.startswith("_foreach_") and name.endswith("_"):
            raise refuse(node, f"torch.{name} writes to a list of tensors", "Use a pure operation.")
        if (
            getattr(node.target, "__module__", "") != "_operator"
            and name.endswith("_")
            and not name.startswith("_")
            and not name.endswith("__")
            and args
            and is_tensor(args[0])
        ):
            return _method(node, name, getattr(torch, name[:-1], None))
    if node.op == "call_method":
        name = str(node.target)
        if name.endswith("_") and not name.endswith("__"):
            return _method(node, name)
        if name == "__setitem__":
            return args[0], set_item, args, kwargs  # type: ignore[return-value]
    return None


def _into_unread(node: fx.Node) -> bool:
    """Whether ``out=`` is memory made for this factory call alone: only its result is read.

    ``torch.eye(3, out=torch.empty_like(x))``: then it says no more than dtype and device.
    """
    made = node.kwargs["out"]
    return (
        isinstance(made, fx.Node)
        and is_tensor(made)
        and getattr(made.target, "__name__", made.target) in _MAKERS
        and list(made.users) == [node]
        and [operand for operand in node.all_input_nodes if is_tensor(operand)] == [made]
    )


_MAKERS = ("empty", "empty_like", "new_empty")


@functools.lru_cache
def _flagged(target: Any) -> inspect.Signature | None:
    """The signature of a function that can be told to write in place."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # torch's own functions have no such flag
        return None
    return signature if "inplace" in signature.parameters else None


def _without_flag(
    node: fx.Node,
) -> tuple[fx.Node, Callable[..., Any], tuple[Any, ...], dict] | None:
    """A call with ``inplace=True`` without it, wherever the flag was given; else None."""
    signature = _flagged(node.target)
    if signature is None or not node.args:
        return None
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:  # a decorated function whose signature is another one's
        return None
    if bound.arguments.get("inplace") is not True:
        return None
    bound.arguments["inplace"] = False
    written = node.args[0]
    assert isinstance(written, fx.Node) and callable(node.target)
    return written, node.target, bound.args, bound.kwargs


_OF_SHAPE = (
    "as_strided_",
    "detach_",
    "rename_",
    "requires_grad_",
    "resize_",
    "resize_as_",
    "set_",
    "shallow_copy_data_",
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
)
"""They change what a tensor is, not only what it holds: the recorded examples are changed too."""


def _method(
    node: fx.Node, name: str, pure: Callable[..., Any] | None = None
) -> tuple[fx.Node, Callable[..., Any], tuple[Any, ...], dict] | None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    if name == "copy_":
        return target, copied, node.args[:2], {}
    if name == "zero_":
        return target, torch.zeros_like, (target,), {}
    if name == "fill_":
        return target, filled, node.args, dict(node.kwargs)
    if name == "bernoulli_":  # which draws by p, not by what the tensor holds
        chance = argument(node, 1, "p", 0.5)
        if isinstance(chance, (int, float)):
            options = {k: v for k, v in node.kwargs.items() if k != "p"}
            return target, torch.bernoulli, (target, chance), options
        raise refuse(node, "Tensor.bernoulli_ draws by another tensor", "Use torch.bernoulli(p).")
    pure = getattr(torch.Tensor, name[:-1], pure)
    if pure is None or name in _OF_SHAPE:
        raise refuse(node, f"Tensor.{name} changes a tensor in place", "Use a pure operation.")
    return target, pure, node.args, dict(node.kwargs)


_SETS_DATA = (torch.Tensor.set_, getattr(torch.ops.aten, "shallow_copy_data_", None))


def leaves_as_it_is(node: fx.Node) -> bool:
    """Whether a node is part of ``a.data = b`` where `b` is the memory of `a` already.

    A layer may keep its weight under two names and say at each call that they are one (the 8-bit
    layers of bitsandbytes do). Dynamo records ``Tensor.set_`` and one count of versions less, and
    since torch 2.14 ``shallow_copy_data_``.
    """
    if getattr(node.target, "__name__", "") == "_lower_version_count_by_1":
        return isinstance(node.args[0], fx.Node) and leaves_as_it_is(node.args[0])
    if node.target not in _SETS_DATA or len(node.args) != 2 or node.kwargs:
        return False
    written, source = (_given(arg) for arg in node.args)
    return (
        written is not None
        and source is not None
        and written.data_ptr() == source.data_ptr()
        and written.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        and (written.dtype, written.shape, written.stride())
        == (source.dtype, source.shape, source.stride())
    )


def _given(node: Any) -> torch.Tensor | None:
    """The tensor that a placeholder was captured with."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    return _torch.given_tensor(node)


def check_function(node: fx.Node) -> None:
    """Refuse an autograd function that writes to what it is given: its graph is run as it is."""
    attribute = node.args[0]
    assert isinstance(attribute, fx.Node) and attribute.graph.owning_module is not None
    body = attribute.graph.owning_module.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    given = {
        _torch.storage_key(example(inner))
        for inner in body.graph.nodes
        if inner.op == "placeholder" and is_tensor(inner)
    }
    for inner in body.graph.nodes:
        if not inner.op.startswith("call_") or leaves_as_it_is(inner):
            continue
        try:
            write = write_of(inner)
            written = None if write is None else write[0]
        except GraphError:  # a write that has no pure form; to a value of its own it may
            written = inner.args[0] if inner.args else None
        if is_tensor(written) and _torch.storage_key(example(written)) in given:  # type: ignore[arg-type]
            raise refuse(
                node,
                "an autograd function writes to one of its arguments",
                "Write to a copy of it.",
            )


__all__ = [
    "BOOLEAN",
    "check_function",
    "copied",
    "filled",
    "leaves_as_it_is",
    "refuse",
    "refuse_input",
    "set_item",
    "write_of",
]

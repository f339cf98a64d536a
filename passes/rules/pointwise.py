"""Pointwise operations: each output element depends on the operand elements at its own index.

Proof of the law: element (…, t, …) reads only elements at token t (or broadcast ones, which
belong to no token), so selecting rows before or after gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_arg

from fxseek.passes.entries import Order
from fxseek.passes.facts import is_tensor
from fxseek.passes.rules.experts import divide_order, rows_as
from fxseek.passes.rules.registry import (
    Call,
    Full,
    Plan,
    Sample,
    operation,
    rule,
    tensor_nodes,
    whole,
)


def pointwise_plan(call: Call) -> Plan | None:
    """The same call on the selected rows of every operand that has them."""
    node = call.node
    operands = tensor_nodes((node.args, node.kwargs))
    if not operands or not is_tensor(node):
        return None
    rows = call.agree(operands, call.out)
    if rows is None:
        return None
    rank = len(call.out)
    wants = {operand: call.aligned(operand, rows, rank) for operand in operands}
    if any(want is None for want in wants.values()):
        return None

    def place(operand: fx.Node) -> Any:
        return wants[operand] if operand in wants else Full(operand)

    args = map_arg(node.args, place)
    kwargs = map_arg(node.kwargs, place)
    return Plan(rows, call.target, args, kwargs)


_UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "digamma",
    "elu",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "frac",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "isfinite",
    "isinf",
    "isnan",
    "leaky_relu",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "logical_not",
    "logit",
    "logsigmoid",
    "mish",
    "nan_to_num",
    "neg",
    "positive",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rsqrt",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinc",
    "sinh",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "tanhshrink",
    "threshold",
    "trunc",
    "celu",
    "bitwise_not",
]

_PARAMETERS: dict[str, tuple[float, ...]] = {"threshold": (0.5, 0.1)}
_OF_INTEGERS = ("bitwise_not",)


def _unary_calls(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every unary function, one result each; `x` lies between 0 and 1."""
    results: list[torch.Tensor] = []
    for name in _UNARY:
        function = getattr(F, name, None) or getattr(torch, name)
        operand = (x * 9).long() if name in _OF_INTEGERS else x + 1 if name == "acosh" else x
        results.append(function(operand, *_PARAMETERS.get(name, ())))
    return tuple(results)


@rule(
    *_UNARY,
    family="per-token",
    cheap=True,
    reason="one element in, one element out",
    samples=(Sample(_unary_calls), Sample(_unary_calls, ("b 2 t 5",))),
)
def unary(call: Call) -> Plan | None:
    """Unary functions, with whatever scalar parameters they take."""
    return pointwise_plan(call)


_BINARY = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "floor_divide",
    "remainder",
    "fmod",
    "pow",
    "maximum",
    "minimum",
    "where",
    "clamp",
    "clamp_min",
    "clamp_max",
    "masked_fill",
    "addcmul",
    "addcdiv",
    "lerp",
    "atan2",
    "hypot",
    "logaddexp",
    "xlogy",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "logical_and",
    "logical_or",
    "logical_xor",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]


_SCALED = ("addcmul", "addcdiv", "lerp")
_OF_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor")


def _binary_calls(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every function of two operands or more, one result each; `x` lies between 0 and 1."""
    results: list[torch.Tensor] = []
    bits, other = (x * 9).long(), (y * 9).long()
    for name in _BINARY:
        function = getattr(torch, name)
        if name == "where":
            results.append(torch.where(y > 0, x, y))
        elif name == "masked_fill":
            results.append(x.masked_fill(y > 0, 2.0))
        elif name == "clamp":
            results.append(torch.clamp(x, y, y + 0.1))
        elif name == "floor_divide":  # has no derivative
            results.append(function(x.detach(), y.detach()))
        elif name in _OF_BITS:
            results.append(function(bits, other))
        elif name in _SCALED:
            results.append(function(x, y + 9, x * y + 9))
        else:
            results.append(function(x, y))
    return tuple(results)


@rule(
    *_BINARY,
    family="per-token",
    cheap=True,
    reason="broadcasting pairs equal indices; a size-1 or missing dimension belongs to no token",
    samples=(
        Sample(torch.add, ("b t 5", "b t 5")),
        Sample(torch.mul, ("b t 5", "5")),
        Sample(torch.sub, ("b t 5", "b 1 5")),
        Sample(torch.add, ("b t 5", "1 t 5")),
        Sample(torch.add, ("b t 5", "t 5")),
        Sample(torch.add, ("b t 5", "t 1")),
        Sample(torch.add, ("b 3 t 5", "t 5")),
        Sample(torch.div, ("b 3 t 5", "b 1 t 1")),
        Sample(lambda x, y: torch.where(y > 0, x, 0.5), ("b t 5", "b t 1")),
        Sample(lambda x, y: 2 - x * y, ("b t 5", "t 1")),
        Sample(lambda x: x.clamp(-1, 1), ("b t 5",)),
        Sample(lambda x, y: x.masked_fill(y > 0, 2.0), ("b t 5", "b t 1")),
        Sample(lambda x: x.clamp(min=0.1) ** 2, ("b t 5",)),
        Sample(_binary_calls, ("b t 5", "b t 1")),
        Sample(_binary_calls, ("b t 5", "t 5")),
    ),
)
def binary(call: Call) -> Plan | None:
    """Functions of several operands under broadcasting; an order divided gives entries' tokens."""
    if any(rows_as(Order, call, node) is not None for node in call.node.all_input_nodes):
        return divide_order(call) if operation(call.node) in ("div", "floor_divide") else None
    return pointwise_plan(call)


@rule(
    "to",
    "clone",
    "contiguous",
    family="per-token",
    cheap=True,
    reason="copies or converts element by element",
    samples=(
        Sample(lambda x: x.to(torch.float64)),
        Sample(lambda x: x.transpose(1, 2).contiguous()),
        Sample(torch.clone),
        Sample(lambda x, y: x.to(y), ("b t 5", "3")),
    ),
)
def convert(call: Call) -> Plan | None:
    """Conversions; a second tensor gives only its dtype and device."""
    source = call.node.args[0]
    rows = call.placed(source)
    if rows is None or not isinstance(source, fx.Node):
        return None
    others = tensor_nodes((call.node.args[1:], call.node.kwargs))
    if any(call.facts.token_sized(other) for other in others):
        return None
    wanted = call.aligned(source, rows, len(call.out))
    args = (wanted, *whole(call.node.args[1:]))
    return Plan(rows, call.target, args, whole(call.node.kwargs))


@rule(
    "dropout",
    "alpha_dropout",
    "bernoulli",
    family="random",
    reason="each element is kept or dropped by itself; prefill and learn draw separately",
    samples=(
        Sample(lambda x: F.dropout(x, 0.0, True)),
        Sample(lambda x: F.dropout(x, 0.3, False)),
        Sample(lambda x: F.alpha_dropout(x, 0.3, False)),
        Sample(lambda x: torch.bernoulli((x > 0.5).double())),
    ),
)
def random(call: Call) -> Plan | None:
    """Random masks drawn per element (those that drop whole channels have no rule)."""
    return pointwise_plan(call)

"""The rule registry: which operations are understood, and how they act on selected rows.

A rule takes a `Call` (the node with the facts of its operands) and answers with a `Plan`: the
same operation on compact operands, and where the tokens of its result are. It answers None
where the call is not per-token; the node then takes the general path, scatter → op → gather,
which is exact for every operation. A rule is an optimisation, never a condition for
correctness: in doubt it must answer None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.ops.experts import count_keys
from fxseek.ops.log_probs import by_weight, token_statistics
from fxseek.ops.loss import scaled_cross_entropy
from fxseek.ops.rows import rows_at
from fxseek.passes.entries import Entries, moved_rows
from fxseek.passes.facts import Facts, Placed, Rows, RowsLike, argument, example, is_tensor
from fxseek.passes.writes import set_item


@dataclass(frozen=True)
class RowsOf:
    """An operand wanted with only the selected rows.

    `rows` counts dimensions in a value of `rank` dimensions; an operand of lower rank is
    first given leading dimensions of size 1, as broadcasting does.
    """

    node: fx.Node
    rows: Placed
    rank: int


@dataclass(frozen=True)
class Kept:
    """An index of entries (an `Order`), as it is when only the selected tokens are there."""

    node: fx.Node


@dataclass(frozen=True)
class Full:
    """An operand wanted at full size, for all tokens."""

    node: fx.Node


@dataclass(frozen=True)
class Length:
    """A size argument, an expression in the token, batch and kept symbols."""

    expression: sympy.Expr


@dataclass(frozen=True)
class Plan:
    """How a node is computed on compact operands.

    `args` and `kwargs` hold `RowsOf`, `Kept`, `Full`, `Length` and `Selected` where operands go;
    `rows` says where the tokens of the (compact) result are, None for a result without.
    """

    rows: RowsLike
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Call:
    """A node as a rule sees it: arguments by name, shapes and rows of operands."""

    def __init__(self, node: fx.Node, facts: Facts) -> None:
        self.node = node
        self.facts = facts
        self.sizes = facts.sizes

    @property
    def target(self) -> Callable[..., Any]:
        """What the normalised node calls."""
        assert callable(self.node.target)
        return self.node.target

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever the caller put it."""
        return argument(self.node, position, name, default)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Size expressions of a tensor operand."""
        return self.facts.shape(node)

    @property
    def out(self) -> tuple[sympy.Expr, ...]:
        """Size expressions of the (tensor) result."""
        return self.facts.shape(self.node)

    def rows(self, node: Any) -> Rows | None:
        """Where an operand's tokens are: by its own rule, or for a constant by its sizes."""
        found = self.placed(node)
        return found if isinstance(found, Rows) else None

    def placed(self, node: Any) -> Placed | None:
        """The same; or, of a value with several entries for each token, where these are."""
        if not is_tensor(node):
            return None
        if node in self.facts.stream or node in self.facts.chosen:
            known = self.facts.rows.get(node)
            return known if isinstance(known, (Rows, Entries)) else None
        return self.guessed(node)

    def guessed(self, node: fx.Node) -> Rows | None:
        """Where a value's tokens are as far as its sizes tell.

        batch × tokens in one dimension may be in either order. Only a value that is made from
        a batch-major one is taken to be so.
        """
        if node in self.facts.guesses:
            return self.facts.guesses[node]
        shape = self.shape(node)
        shared = self.sizes.batch is None and self.facts.shared(node)
        rows = None if shared else self.sizes.rows(shape)
        if rows is not None and rows.packed:
            name, source = operation(node), node.args[0] if node.args else None
            if name in ("reshape", "flatten") and isinstance(source, fx.Node):
                before = self.rows(source)
                moved = before and moved_rows(self.sizes, before, self.shape(source), shape)
                rows = rows if moved == rows else None
            elif not any(
                (before := self.rows(operand)) is not None and before.packed
                for operand in _made_from(node)
            ):
                rows = None
        self.facts.guesses[node] = rows
        return rows

    def agree(self, operands: Sequence[fx.Node], out: Sequence[sympy.Expr]) -> Placed | None:
        """The rows of a broadcast result, if the operands leave one reading.

        Operands of the stream decide; constants only where no stream operand has rows.
        """
        for stream in (True, False):
            found: set[Placed] = set()
            for node in operands:
                if (node in self.facts.stream) is not stream:
                    continue
                rows = self.placed(node)
                if rows is not None:
                    found.add(rows.shift(len(out) - len(self.shape(node))))
            if len(found) == 1:
                rows = found.pop()
                return rows if self.sizes.valid(rows, out) else None
            if found:
                return None
        return None

    def own(self, node: fx.Node, rows: Placed) -> RowsOf:
        """An operand with these rows, counted in its own dimensions."""
        return RowsOf(node, rows, len(self.shape(node)))

    def aligned(self, node: fx.Node, rows: Placed, rank: int) -> RowsOf | Full | None:
        """A broadcast operand of a result with these rows; None where it does not fit."""
        shape = self.shape(node)
        shift = rank - len(shape)
        dim = rows.row - shift
        if dim < 0 or shape[dim] == 1:
            return Full(node)
        if shape[dim] != self.sizes.length(rows):
            return None
        return RowsOf(node, rows, rank)

    def same(self, source: Any, rows: Placed, after: Placed | None) -> Plan | None:
        """The same call on the rows of `source`, its first operand.

        Its results have their tokens at `after`; None where they cannot.
        """
        shapes = list(self.facts.shapes(self.node))
        if after is None or not all(self.sizes.valid(after, shape) for shape in shapes):
            return None
        args = (self.own(source, rows), *whole(self.node.args[1:]))
        found = after if is_tensor(self.node) else tuple(after for _ in shapes)
        return Plan(found, self.target, args, whole(dict(self.node.kwargs)))

    def compact_shape(self, rows: Placed) -> tuple[Length, ...]:
        """The size arguments that make the result compact."""
        return tuple(Length(size) for size in self.sizes.compact(self.out, rows))


def _made_from(node: fx.Node) -> list[fx.Node]:
    """The tensors that a value is made from; of a tuple's element, those of the tuple."""
    operands = node.all_input_nodes
    if len(operands) == 1 and not is_tensor(operands[0]):
        return operands[0].all_input_nodes
    return operands


RuleFunction = Callable[[Call], Plan | None]


@dataclass(frozen=True)
class Sample:
    """A call on which the law of a rule is tested.

    `function` takes one float64 tensor per entry of `shapes`, spelled like ``"b t 5"``:
    ``b`` the batch, ``t`` the tokens, numbers ordinary sizes; ``int:b t`` makes indices. The
    first tensor is the one whose tokens are perturbed; it lies between 0 and 1. Each name that a
    rule is registered for must be called by a sample. Distinct primes keep swapped axes from
    agreeing by luck.
    """

    function: Callable[..., Any]
    shapes: tuple[str, ...] = ("b t 5",)


@dataclass(frozen=True)
class Rule:
    """The rule of one operation: its name, its function, and why that is right."""

    name: str
    family: str
    """``"per-token"``; or what other passes look for: ``"random"`` draws, so is never made again;
    ``"constant"``, ``"attention"``, ``"loss"``, ``"groups"``."""
    function: RuleFunction
    reason: str
    samples: tuple[Sample, ...]
    layout: bool = False
    """Only moves or copies elements, so a full value can be had from the operand's."""
    needs: str = ""
    """The module that defines the operation, empty for torch's own; the samples import it."""
    cheap: bool = False
    """Made again to the bit by a pass over memory: no product, no draw, no sum in varying order."""


RULES: dict[str, Rule] = {}
_NAMES: dict[Any, str] = {}
_METHODS: dict[str, str] = {}

ALIASES: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, "__add__", "__radd__"),
    "sub": (operator.sub, torch.subtract, "subtract"),
    "mul": (operator.mul, torch.multiply, "multiply"),
    "div": (operator.truediv, torch.true_divide, torch.divide, "true_divide", "divide"),
    "floor_divide": (operator.floordiv,),
    "remainder": (operator.mod,),
    "pow": (operator.pow,),
    "neg": (operator.neg, torch.negative, "negative"),
    "matmul": (operator.matmul,),
    "abs": (operator.abs, torch.absolute, "absolute"),
    "bitwise_and": (operator.and_, "__and__", "__rand__"),
    "bitwise_or": (operator.or_, "__or__", "__ror__"),
    "bitwise_xor": (operator.xor, "__xor__", "__rxor__"),
    "bitwise_not": (operator.invert, operator.inv),
    "eq": (operator.eq, "__eq__"),
    "ne": (operator.ne, "__ne__", torch.not_equal),
    "lt": (operator.lt, torch.less),
    "le": (operator.le, torch.less_equal),
    "gt": (operator.gt, torch.greater),
    "ge": (operator.ge, torch.greater_equal),
    "getitem": (operator.getitem, "__getitem__"),
    "clamp": (torch.clip, "clip"),
    "transpose": (torch.swapaxes, torch.swapdims, "swapaxes", "swapdims"),
    "movedim": (torch.moveaxis, "moveaxis"),
    "cat": (torch.concat, torch.concatenate),
    "reshape": ("view", "reshape_as", "view_as"),
    "cross_entropy": (scaled_cross_entropy,),
    "by_weight": (by_weight,),
    "set_item": (set_item,),
    "count_keys": (count_keys,),
    "grouped_mm": tuple(filter(None, [getattr(torch, "_grouped_mm", None)])),  # Dynamo's view of it
    "rows_at": (rows_at,),
    "token_statistics": (token_statistics,),
}

_SPACES: tuple[Any, ...] = (F, torch, _torch.nn_functions(), torch.special, torch.Tensor)


def _register_names(name: str) -> None:
    if "::" in name:  # it may be defined later, by a library that is imported
        return
    spellings: list[Any] = list(ALIASES.get(name, ()))
    spellings += [getattr(space, name) for space in _SPACES if hasattr(space, name)]
    methods = [spelling for spelling in spellings if isinstance(spelling, str)]
    spellings += [getattr(torch.Tensor, method) for method in methods]
    if hasattr(torch.Tensor, name):
        spellings.append(name)
    if not spellings:
        raise ValueError(f"rule {name!r} names no operation of torch")
    for spelling in spellings:
        table = _METHODS if isinstance(spelling, str) else _NAMES
        other = table.setdefault(spelling, name)
        if other != name:
            raise ValueError(f"{spelling!r} is registered for both {other!r} and {name!r}")


def rule(
    *names: str,
    family: str,
    reason: str,
    samples: Sequence[Sample],
    layout: bool = False,
    needs: str = "",
    cheap: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for the operations of these names (every spelling of each).

    Names are those of torch.nn.functional, torch, torch.special or Tensor; other spellings are in
    `ALIASES`. A name like ``"namespace::name"`` is that of an operation in `torch.ops`. It need not
    exist yet; `needs` names the module that defines it.

    Raises:
        ValueError: a name is taken, unknown to torch, or there are no samples.
    """
    if not samples:
        raise ValueError(f"rule {names} has no samples: the generated law could not test it")

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in RULES:
                raise ValueError(f"a rule for {name!r} is registered already")
            _register_names(name)
            RULES[name] = Rule(name, family, function, reason, tuple(samples), layout, needs, cheap)
        return function

    return register


def operation(node: fx.Node) -> str | None:
    """The registered name of the operation that a node calls, or None."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function":
        try:
            name = _NAMES.get(node.target) or _torch.qualified_name(node.target)
        except TypeError:  # an unhashable callable is no operation of torch
            return None
        return name if name in RULES else None
    return None


def called(node: fx.Node) -> str:
    """What a node calls, by the name that messages give it."""
    return operation(node) or getattr(node.target, "__name__", str(node.target))


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's operation, or None."""
    name = operation(node)
    return None if name is None else RULES[name]


def whole(value: Any) -> Any:
    """A (nested) argument whose nodes are all wanted at full size."""
    place: Any = Full  # a want, where fx expects an argument of a node
    return map_arg(value, place)


def wants_of(value: Any) -> Iterator[Any]:
    """What a plan's arguments, or a (nested) one of them, consist of: wants and constants."""
    if isinstance(value, Plan):
        yield from wants_of((value.args, value.kwargs))
    elif isinstance(value, dict):
        yield from wants_of(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from wants_of(item)
    else:
        yield value


def tensor_nodes(value: Any) -> list[fx.Node]:
    """The tensor nodes in a (nested) argument, in order."""
    found: list[fx.Node] = []
    map_arg(value, lambda node: found.append(node) if is_tensor(node) else None)
    return found


def fake(node: fx.Node) -> torch.Tensor:
    """The example tensor of a tensor node."""
    value = example(node)
    assert isinstance(value, torch.Tensor)
    return value

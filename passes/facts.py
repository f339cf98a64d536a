"""What is known of a captured value: its sizes as expressions, and where its tokens are.

A dimension is a token dimension exactly where the size expression of the node's example
value holds the token symbol, and the batch dimension where it is the batch symbol. Which of
two token dimensions is the *row* (the token that a value belongs to) and which a *column*
(tokens attended to) follows from the operation that made the value: the rules know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.ops.rows import Rows
from fxseek.passes.entries import Entries, Groups, Order, entries_of

KEPT = sympy.Symbol("kept", integer=True, positive=True)
"""The number of selected tokens of a row, in size expressions of a compact graph."""


Placed = Rows | Entries
"""Where the tokens of a value are that has some for each token."""

RowsLike = Placed | Order | Groups | tuple[Placed | Order | None, ...] | None


@dataclass(frozen=True)
class Sizes:
    """Reads size expressions, with the symbols of all token inputs unified.

    `tokens` and `batch` are sympy symbols; `batch` is None when the batch is 1. `virtual` tokens
    are put by the model in front of those that it is given (prompt tuning); they are among
    `tokens`, so that the inputs are ``tokens - virtual`` long.
    """

    tokens: sympy.Symbol
    batch: sympy.Symbol | None
    same: dict[sympy.Symbol, sympy.Expr]
    hints: dict[sympy.Symbol, int]
    virtual: int = 0
    _unified: dict[int | sympy.Expr, sympy.Expr] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _shapes: dict[int, tuple[torch.Tensor, tuple[sympy.Expr, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def expression(self, size: int | torch.SymInt) -> sympy.Expr:
        """One size, as an expression in the unified symbols."""
        key = _torch.size_expression(size) if isinstance(size, torch.SymInt) else size
        found = self._unified.get(key)
        if found is None:
            found = _divided(sympy.sympify(key).xreplace(self.same))
            found = self._unified[key] = sympy.expand(found)
        return found

    def shape(self, value: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """All sizes of an example value."""
        if id(value) not in self._shapes:  # whose id is its own as long as it is held
            self._shapes[id(value)] = value, tuple(map(self.expression, value.shape))
        return self._shapes[id(value)][1]

    def has_tokens(self, expression: sympy.Expr) -> bool:
        """Whether a size depends on the number of tokens."""
        return self.tokens in expression.free_symbols

    @property
    def packed(self) -> sympy.Expr | None:
        """Batch × tokens; None when the batch is 1 (then a packed dimension is a row)."""
        return None if self.batch is None else sympy.expand(self.batch * self.tokens)

    def length(self, rows: Placed) -> sympy.Expr | None:
        """The size of the dimension of the tokens; None where there is no batch to pack."""
        length = self.packed if rows.packed else self.tokens
        return None if length is None else sympy.expand(length * entries_of(rows).times)

    def valid(self, rows: Placed, shape: Sequence[sympy.Expr]) -> bool:
        """Whether the sizes bear out that `rows` describes a value of this shape."""
        if not 0 <= rows.row < len(shape) or shape[rows.row] != self.length(rows):
            return False
        if rows.packed:
            return True
        if self.batch is None:
            return rows.batch is None
        heads = entries_of(rows).rows.heads
        return rows.batch is not None and shape[rows.batch] == self.batch * heads

    def rows(self, shape: Sequence[sympy.Expr]) -> Rows | None:
        """The only reading that the sizes allow, or None where there is none or several."""
        token_dims = [i for i, size in enumerate(shape) if self.has_tokens(size)]
        if len(token_dims) != 1:
            return None
        row = token_dims[0]
        if self.batch is None:
            found = Rows(row)
        elif shape[row] == self.packed:
            found = Rows(row, packed=True)
        else:
            batch_dims = [i for i, size in enumerate(shape) if size == self.batch]
            if len(batch_dims) != 1:
                return None
            found = Rows(row, batch_dims[0])
        return found if self.valid(found, shape) else None

    def compact(self, shape: Sequence[sympy.Expr], rows: Placed | None) -> tuple[sympy.Expr, ...]:
        """The shape when only the selected rows are there."""
        if rows is None:
            return tuple(shape)
        kept = KEPT * self.batch if rows.packed and self.batch is not None else KEPT
        kept = kept * entries_of(rows).times
        return tuple(kept if i == rows.row else size for i, size in enumerate(shape))


def _divided(size: Any) -> Any:
    """A size without divisions that leave no rest, such as ``tokens**2 // tokens``."""

    def quotient(division: Any) -> Any:
        of, by = division.args
        exact = sympy.cancel(of / by)
        symbols = exact.free_symbols
        whole = exact.is_polynomial(*symbols) and (
            exact.is_Integer or all(x.is_Integer for x in sympy.Poly(exact, *symbols).coeffs())
        )
        return exact if whole else division

    return size.replace(lambda x: type(x).__name__ == "FloorDiv", quotient)


def example(node: fx.Node) -> Any:
    """The example value that Dynamo recorded (fake tensors, numbers, tuples of them)."""
    return node.meta.get("example_value")


def value_of(call: fx.Node, *, recorded: bool = True) -> Any:
    """What a call makes of the example values of its operands; `recorded`: by autograd."""
    args, kwargs = map_arg((call.args, call.kwargs), example)  # type: ignore[misc]
    target: Any = call.target
    function = getattr(type(args[0]), target) if call.op == "call_method" else target
    # Whether it carries gradient is the graph's to say.
    with torch.set_grad_enabled(recorded), _torch.symbolic_sizes():
        return function(*args, **kwargs)


def made_call(
    graph: fx.Graph,
    origin: fx.Node,
    target: Any,
    /,
    *args: Any,
    example_value: Any = None,
    **kwargs: Any,
) -> fx.Node:
    """A new call for code of `origin`, with its example value: that given, or what it makes."""
    kind = "call_method" if isinstance(target, str) else "call_function"
    made = graph.create_node(kind, target, args, kwargs)
    value = value_of(made) if example_value is None else example_value
    made.meta = {**origin.meta, "example_value": value}
    return made


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever the caller put it."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(example(node), torch.Tensor)


def written_out(index: Any, rank: int) -> list[Any] | None:
    """What a subscript of a value holds for each dimension, and the None that add some.

    Answers None where it holds more than the value has dimensions.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    missing = rank - sum(item is not None and item is not ... for item in items)
    if missing < 0 or items.count(...) > 1:
        return None
    if ... not in items:
        items.append(...)
    at = items.index(...)
    return [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a (nested) example value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def needs_grad(node: fx.Node) -> bool:
    """Whether any tensor of the node's value requires grad, as Dynamo saw it."""
    return any(tensor.requires_grad for tensor in tensors_of(example(node)))


def enters_autocast(node: fx.Node) -> bool:
    """Whether a node opens an autocast region."""
    return getattr(node.target, "__name__", "") == "_enter_autocast"


def leaves_autocast(node: fx.Node) -> bool:
    """Whether a node closes an autocast region."""
    return getattr(node.target, "__name__", "") == "_exit_autocast"


def switches_grad(node: fx.Node) -> bool:
    """Whether a node switches the grad mode."""
    return getattr(node.target, "__name__", "") == "_set_grad_enabled"


def hooks_gradient(node: fx.Node) -> bool:
    """Whether a node is its operand with a hook on the operand's gradient."""
    return getattr(node.target, "__name__", "") == "register_hook"


def switches_mode(node: fx.Node) -> bool:
    """Whether a node has no value that counts, and decides how others are run."""
    return enters_autocast(node) or leaves_autocast(node) or switches_grad(node)


def listed(node: fx.Node) -> tuple[Any, ...]:
    """The arguments behind the first, which a caller may also give as one list: sizes, an order."""
    rest: Any = node.args[1:]
    return tuple(rest[0] if rest and isinstance(rest[0], (list, tuple)) else rest)


def where(node: fx.Node) -> str:
    """The user's own source line of a node, for messages: the innermost one outside torch."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return "source line unknown"
    own = [index for index in frames if _TORCH not in lines[index]]
    at = (own or frames)[-1]
    code = lines[at + 1] if at + 1 < len(lines) and at + 1 not in frames else ""
    return f"{lines[at]}: {code}" if code else lines[at]


_TORCH = str(Path(torch.__file__).parent)


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was captured in, or an empty string."""
    return next(reversed(module_paths(node)), "")


def module_paths(node: fx.Node) -> list[str]:
    """The paths of the modules that a node was captured in, outer ones first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [_CHILD.sub(r".\1", _MODEL.sub("", entry[0])).strip(".") for entry in stack.values()]


# How Dynamo names the captured model: by itself, or as the owner of the call that a step captures.
_MODEL = re.compile(r"L\['(self|call)'\](\.__self__)?\.?")

# How Dynamo names a child whose parent has a `__getattr__` of its own, as peft's models have.
_CHILD = re.compile(r"(?:^|\.)(?:__dict__\[')?_modules(?:'\])?\['(\w+)'\]")


PRIMARY_INPUTS = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values"),
)
"""Arguments by which transformers' models take their tokens, in order of preference."""

POSITIONS = "fxseek_positions"
"""The input that counts tokens where no argument does, Long[batch, tokens]: each token's place."""

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels")
"""Those that count the tokens of the decoder, in a model that has an encoder too."""


def user_tensors(graph: fx.Graph) -> list[fx.Node]:
    """The inputs that are tensors, parameters and buffers excepted."""
    return [
        node
        for node in graph.nodes
        if node.op == "placeholder" and is_tensor(node) and not _torch.is_module_state(node)
    ]


def primary(inputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of the inputs by which models take their tokens (`PRIMARY_INPUTS`)."""
    return [node for node in inputs if _torch.source_name(node) in PRIMARY_INPUTS]


@dataclass
class Facts:
    """All that later passes read of a captured graph; see `fxseek.passes.tokens`.

    `plans`: how a node acts on compact inputs; a node that is missing takes the general path.
    `rows`: where each value's tokens are; a value without an entry has none that is known.
    `stream`: nodes that carry gradient or are floating-point values made from the token input.
    `token_made`: the latter alone.
    `of_rows`: all that is made from inputs that have each row's own tokens.
    `general`: why a node takes the general path.
    `guesses`: where the tokens of a value without a plan are, as far as its sizes tell.
    `chosen`: values without gradient that follow from choices of tokens (the experts of a token, an
    order by them): they have plans, and are made anew of selected tokens.
    `disordered`: values of entries whose places nobody knows.
    """

    sizes: Sizes
    plans: dict[fx.Node, Any] = field(default_factory=dict)
    rows: dict[fx.Node, RowsLike] = field(default_factory=dict)
    stream: set[fx.Node] = field(default_factory=set)
    general: dict[fx.Node, str] = field(default_factory=dict)
    token_made: set[fx.Node] = field(default_factory=set)
    of_rows: set[fx.Node] = field(default_factory=set)
    guesses: dict[fx.Node, Rows | None] = field(default_factory=dict)
    chosen: set[fx.Node] = field(default_factory=set)
    disordered: set[fx.Node] = field(default_factory=set)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Size expressions of a tensor node."""
        return self.sizes.shape(example(node))

    def shapes(self, node: fx.Node) -> Iterator[tuple[sympy.Expr, ...]]:
        """Size expressions of each tensor of a node."""
        return (self.sizes.shape(tensor) for tensor in tensors_of(example(node)))

    def token_sized(self, node: fx.Node) -> bool:
        """Whether any dimension of any tensor of the node grows with the tokens."""
        return any(self.sizes.has_tokens(size) for shape in self.shapes(node) for size in shape)

    def first_token_dim(self, node: fx.Node) -> int:
        """Which dimension of a token-sized tensor is the first that grows with the tokens."""
        return [self.sizes.has_tokens(size) for size in self.shape(node)].index(True)

    def square(self, node: fx.Node) -> bool:
        """Whether the value has two token dimensions, as an attention map has."""
        return any(
            sum(self.sizes.has_tokens(size) for size in shape) > 1 for shape in self.shapes(node)
        )

    def shared(self, node: fx.Node) -> bool:
        """Whether all rows of a batch share the value (position tables, relative biases).

        It is made once, not once per row of the batch, so there is no selection to apply
        before a value with a batch reads it. Of a batch of 1, what no row's tokens are read for.
        """
        batch = self.sizes.batch
        if batch is None:
            return node not in self.of_rows
        return node not in self.token_made and not any(
            batch in size.free_symbols for shape in self.shapes(node) for size in shape
        )


def ancestors(
    nodes: Iterable[fx.Node], through: Callable[[fx.Node], bool] | None = None
) -> set[fx.Node]:
    """The nodes and all that they are computed from; those alone that `through` holds for."""
    return set(walk_up(nodes, through))


def walk_up(
    nodes: Iterable[fx.Node], through: Callable[[fx.Node], bool] | None = None
) -> Iterator[fx.Node]:
    """The `ancestors`, one by one: of what a node reads, the last goes first."""
    return _reached(nodes, lambda node: node.all_input_nodes, through)


def descendants(
    nodes: Iterable[fx.Node], through: Callable[[fx.Node], bool] | None = None
) -> set[fx.Node]:
    """The nodes and all that is computed from them; those alone that `through` holds for."""
    return set(_reached(nodes, lambda node: node.users, through))


def _reached(
    nodes: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]],
    through: Callable[[fx.Node], bool] | None,
) -> Iterator[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found and (through is None or through(node)):
            found.add(node)
            yield node
            queue.extend(step(node))


def numel(x: torch.Tensor) -> int:
    """How many elements an example has; sizes that are symbols count as in the example."""
    return math.prod(map(_torch.size_hint, x.shape))

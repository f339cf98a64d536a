"""Ditch: the graph replayed on the selected rows alone.

Before (all tokens)::

    h = linear(x, w)                     # [2, s, 64]
    k = linear(h, wk); c = cumsum(h, 1)  # no rule for a scan over tokens
    o = sdpa(q, k, v)

After (kept tokens; `_full` values come from the prefill)::

    x_rows = gather_rows(x_full, kept)             # where gradient starts
    h = linear(x_rows, w)                          # [2, kept, 64]
    c = gather_rows(cumsum(scatter_rows(h_full, h)), kept)
    k = scatter_rows(k_full, linear(h, wk), kept)  # read whole by attention
    o = attend_rows(q, k, v, kept)

Values that carry no gradient (or, in the score stage, lie before its start) are constants:
they come from the prefill, and are gathered where a compact operation reads them. What the inputs
of a token alone decide (its embedding) is made anew instead: no full value waits for that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from fxseek.errors import GraphError
from fxseek.ops.rows import gather_entries, gather_rows, scatter_entries, scatter_rows
from fxseek.passes.draws import of_other_values
from fxseek.passes.entries import Entries
from fxseek.passes.facts import (
    KEPT,
    Facts,
    Placed,
    Rows,
    ancestors,
    example,
    is_tensor,
    leaves_autocast,
    needs_grad,
    numel,
    tensors_of,
    where,
)
from fxseek.passes.ir import (
    Gathered,
    Given,
    Input,
    Piece,
    Prefilled,
    Selected,
    copy_origin,
    input_of,
    placeholder_of,
)
from fxseek.passes.modes import erase_unread, regions, without_grad
from fxseek.passes.rules import Full, Kept, Length, Plan, RowsOf, find_rule
from fxseek.passes.tokens import Element, follows_choices


def ditch(
    source: fx.Graph,
    facts: Facts,
    *,
    carrying: Iterable[fx.Node],
    outputs: Sequence[tuple[str, fx.Node]],
    given: Iterable[fx.Node] = (),
    constants: Iterable[fx.Node] = (),
) -> Piece:
    """Replay the nodes of `carrying` that `outputs` need, on selected rows.

    `outputs` are pairs: ``("rows", node)`` the compact value, ``("full", node)`` the value of
    all tokens with gradient at the selected ones, ``("value", node)`` whatever the node is.
    `given` are compact values that the caller provides. `constants` are made anew where rows of
    them are wanted, and come from the prefill where they are wanted whole. The result's outputs are
    in that order.
    """
    return _Ditch(source, facts, set(carrying), set(given), set(constants)).run(outputs)


def refuse_lost_gradient(piece: Piece) -> None:
    """Check that what has gradient is read from the prefill as the base of a scatter alone.

    Raises:
        GraphError: another operation reads it, and would be given no gradient.
    """
    for node, item in piece.placeholders().items():
        if not (isinstance(item, (Prefilled, Gathered)) and needs_grad(item.node)):
            continue
        for user in node.users:
            is_base = user.target in (scatter_rows, scatter_entries) and user.args[0] is node
            if not is_base or node in user.args[1:]:
                raise GraphError(
                    f"{user.name} would read {item.node.name} without its gradient "
                    f"({where(item.node)}). This is a defect of fxseek: please report it."
                )


class _Ditch:
    def __init__(
        self,
        source: fx.Graph,
        facts: Facts,
        carrying: set[fx.Node],
        given: set[fx.Node],
        constants: set[fx.Node],
    ) -> None:
        self.source = source
        self.facts = facts
        carrying = carrying | of_other_values(source, facts, carrying)
        self.carrying = carrying - constants - given
        self.replayed = (carrying | constants) - given
        self.replayed |= follows_choices(source, facts, self.replayed) - given
        self.given = given
        self.graph = fx.Graph(owning_module=source.owning_module)
        self.inputs: dict[Input, fx.Node] = {}
        self.anchor: fx.Node | None = None
        self.compact: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.gathered: dict[tuple[fx.Node, Placed, int], fx.Node] = {}
        self.lengths: dict[sympy.Expr, Any] = {}
        self.general: list[fx.Node] = []
        self.regions = regions(source)
        # Scoring asks for a gradient of values that had none when they were captured, where weights
        # are frozen: what the graph keeps from it is not seen in its operands then.
        self.unrecorded = without_grad(source) & carrying
        self.entered: dict[fx.Node, fx.Node] = {}

    # ---- the walk ------------------------------------------------------------------------

    def run(self, outputs: Sequence[tuple[str, fx.Node]]) -> Piece:
        needed = self._needed(node for _, node in outputs)
        self.anchor = self.graph.call_function(_marker)  # placeholders go in front of it
        inside = {region for node in needed for region in self.regions.get(node, ())}
        for node in self.source.nodes:
            if node in inside:
                self.entered[node] = self._copy(node)
            elif leaves_autocast(node) and node.args[0] in inside:
                self._emit(node, node.target, (self.entered[node.args[0]],), {})  # type: ignore[index]
            elif node in needed and node.op in ("call_function", "call_method"):
                self._replay(node)
        results = [self._output(kind, node) for kind, node in outputs]
        self.graph.output(tuple(results))
        self.graph.erase_node(self.anchor)
        erase_unread(self.graph)
        piece = Piece(self.graph, [], [node for _, node in outputs], self.general, self.compact)
        return piece.edited({node: item for item, node in self.inputs.items()})

    def _needed(self, outputs: Iterable[fx.Node]) -> set[fx.Node]:
        """What is replayed that the outputs are made of; constants come as they are."""
        return ancestors(outputs, self.replayed.__contains__)

    def _output(self, kind: str, node: fx.Node) -> fx.Node:
        if kind == "rows":
            rows = self.facts.rows.get(node)
            if isinstance(rows, (Rows, Entries)):
                return self._rows_of(node, rows, example(node).dim())
        if kind == "value" and node in self.compact:
            return self.compact[node]
        return self._full(node)

    def _replay(self, node: fx.Node) -> None:
        """Emit a node of the carrying set, compact where it has a plan."""
        plan = self.facts.plans.get(node)
        if plan is not None and self._follows(plan):
            made = self._emit(node, plan.target, self._place(plan.args), self._place(plan.kwargs))
            made = self._without_gradient(node, made)
            table = self.whole if plan.rows is None else self.compact
            table[node] = made
            return
        made = self._without_gradient(node, self._copy(node))
        rows = self.facts.rows.get(node)
        costly = self.facts.token_sized(node) or any(
            self.facts.token_sized(operand) and operand in self.carrying
            for operand in node.all_input_nodes
        )
        if costly and not self.facts.shared(node):
            self.general.append(node)
        if isinstance(rows, (Rows, Entries)):
            self.compact[node] = self._gather(node, made, rows)
        else:
            self.whole[node] = made

    def _without_gradient(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """The copy of a node that the graph kept from a gradient, as ``no_grad`` does, has none."""
        if is_tensor(node) and (_kept_from_gradient(node) or self._unrecorded(node)):
            return copy_origin(self.graph.call_method("detach", (made,)), node)
        return made

    def _unrecorded(self, node: fx.Node) -> bool:
        """Whether ``no_grad`` keeps a node from a gradient of what is given."""
        if not any(x.is_floating_point() for x in tensors_of(example(node))):
            return False
        return node in self.unrecorded or any(
            not is_tensor(x) and self._unrecorded(x) for x in node.all_input_nodes
        )

    def _follows(self, plan: Plan) -> bool:
        """Whether an element's tuple was itself made compact (always so for other plans)."""
        return all(item.node in self.compact for item in plan.args if isinstance(item, Element))

    # ---- operands ------------------------------------------------------------------------

    def _place(self, value: Any) -> Any:
        if isinstance(value, RowsOf):
            return self._rows_of(value.node, value.rows, value.rank)
        if isinstance(value, Full):
            return self._full(value.node)
        if isinstance(value, Kept):
            return self._kept(value.node)
        if isinstance(value, Length):
            return self._length(value.expression)
        if isinstance(value, Selected):
            return self._input(value)
        if isinstance(value, Element):
            return self.compact[value.node]
        if isinstance(value, (list, tuple)):
            return type(value)(self._place(item) for item in value)
        if isinstance(value, dict):
            return {key: self._place(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._place(x) for x in (value.start, value.stop, value.step)))
        if isinstance(value, fx.Node):
            return self._full(value)
        return value

    def _rows_of(self, node: fx.Node, rows: Placed, rank: int) -> fx.Node:
        own = example(node).dim()
        mine = rows.shift(own - rank)
        if node in self.given and node not in self.compact:
            self.compact[node] = self._input(Given(node))
        if node in self.compact and self.facts.rows.get(node) == mine:
            return self.compact[node]
        key = (node, rows, rank)
        if key not in self.gathered:
            value = self._full(node)
            if mine.batch is not None and mine.batch < 0:
                for _ in range(rank - own):
                    value = self._make(torch.unsqueeze, (value, 0), node)
                mine = rows
            self.gathered[key] = self._gather(node, value, mine)
        return self.gathered[key]

    def _full(self, node: fx.Node) -> fx.Node:
        if node in self.whole:
            return self.whole[node]
        self.whole[node] = made = self._make_full(node)
        return made

    def _make_full(self, node: fx.Node) -> fx.Node:
        if node in self.given:
            rows = self.facts.rows[node]
            if rows is None:
                return self._input(Given(node))
            assert isinstance(rows, Rows)
            self._rows_of(node, rows, example(node).dim())
            return self._scatter(node, rows)
        if node in self.carrying and node.op != "placeholder":
            rows = self.facts.rows.get(node)
            assert node in self.compact and isinstance(rows, (Rows, Entries)), node.format_node()
            if self._only_layout(node):
                return self._copy(node)
            return self._scatter(node, rows)
        if node.op != "placeholder":
            size = not is_tensor(node) and not list(tensors_of(example(node)))
            if size or self._recomputable(node):
                return self._copy(node)
        return self._input(input_of(node))

    def _recomputable(self, node: fx.Node) -> bool:
        """Constants without tokens (casts and transposes of frozen weights) are made anew.

        Not those of trained weights (made without grad, they would get one), nor, where there are
        autocast regions, an operation that a region would run in another precision.
        """
        if node.op == "placeholder":
            return not needs_grad(node)
        found = find_rule(node)
        return (
            found is not None
            and found.family != "random"
            and (not self.regions or found.layout or found.name == "to")
            and not needs_grad(node)
            and node not in self.regions
            and not self.facts.token_sized(node)
            and all(
                not list(tensors_of(example(x)))
                or (self._recomputable(x) and not self.facts.token_sized(x))
                for x in node.all_input_nodes
            )
        )

    def _only_layout(self, node: fx.Node) -> bool:
        """A view or repetition of one carried value: scatter that one, then apply it."""
        found = find_rule(node)
        source = node.args[0] if node.args else None
        if found is None or not (found.layout or found.name == "getitem"):
            return False
        if node not in self.facts.plans:
            return False  # tokens change places: a selected one may come from any other
        if not is_tensor(source) or source not in self.compact or found.name == "cat":
            return False
        assert isinstance(source, fx.Node)
        return numel(example(node)) >= numel(example(source))

    # ---- emission ------------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return copy_origin(self.graph.node_copy(node), node)
        args = map_arg(node.args, self._full)
        kwargs = map_arg(node.kwargs, self._full)
        return self._emit(node, node.target, args, kwargs)

    def _emit(self, origin: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        made = self.graph.create_node(kind, target, args, kwargs, name=origin.name)
        return copy_origin(made, origin)

    def _make(self, target: Callable[..., Any], args: tuple[Any, ...], origin: fx.Node) -> fx.Node:
        return copy_origin(self.graph.call_function(target, args), origin)

    def _gather(self, origin: fx.Node, value: fx.Node, rows: Placed) -> fx.Node:
        kept = self._input(Selected("kept"))
        if isinstance(rows, Entries):
            target: Callable[..., Any] = gather_entries
            args = (value, kept, rows.rows, rows.inner, rows.outer, *self._orders(rows))
        else:
            target, args = gather_rows, (value, kept, rows)
        made = self.graph.create_node("call_function", target, args, name=f"{origin.name}_rows")
        return copy_origin(made, origin)

    def _scatter(self, node: fx.Node, rows: Placed) -> fx.Node:
        base = self._input(Prefilled(node))
        given = (base, self.compact[node], self._input(Selected("kept")))
        filled = self._input(Selected("filled"))
        if isinstance(rows, Entries):
            target: Callable[..., Any] = scatter_entries
            args = (*given, rows.rows, filled, rows.inner, rows.outer, *self._orders(rows))
        else:
            target, args = scatter_rows, (*given, rows, filled)
        made = self.graph.create_node("call_function", target, args, name=f"{node.name}_all")
        return copy_origin(made, node)

    def _orders(self, entries: Entries) -> tuple[fx.Node, ...]:
        """The order of all entries and that of the selected ones, where there is one."""
        sort = entries.order
        if sort is None:
            return ()
        if is_tensor(sort):
            return self._full(sort), self._kept(sort)
        full = next(user for user in sort.users if user.args[1] == 1)
        return self._full(full), self._make(operator.getitem, (self._kept(sort), 1), full)

    def _kept(self, node: fx.Node) -> fx.Node:
        """What numbers entries, of the selected tokens; nothing that is replayed may need it."""
        if node not in self.compact:
            self._replay(node)
        return self.compact[node]

    def _input(self, item: Input) -> fx.Node:
        if item not in self.inputs:
            assert self.anchor is not None
            with self.graph.inserting_before(self.anchor):
                self.inputs[item] = placeholder_of(self.graph, item)
        return self.inputs[item]

    def _length(self, expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression in self.lengths:
            return self.lengths[expression]
        if isinstance(expression, sympy.Symbol):
            made: Any = self._symbol(expression)
        elif isinstance(expression, (sympy.Mul, sympy.Add)):
            combine = operator.mul if isinstance(expression, sympy.Mul) else operator.add
            made = self._combined(combine, expression.args)
        elif isinstance(expression, sympy.Pow) and expression.exp.is_Integer:
            made = self._combined(operator.mul, [expression.base] * int(expression.exp))  # type: ignore[call-overload]
        else:
            raise GraphError(f"the size {expression} cannot be computed from the inputs")
        self.lengths[expression] = made
        return made

    def _combined(self, combine: Callable[..., Any], parts: Iterable[Any]) -> Any:
        """The lengths that are the parts of another one, added up or multiplied."""
        made = map(self._length, parts)
        return reduce(lambda a, b: self.graph.call_function(combine, (a, b)), made)

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol == KEPT:
            kept = self._input(Selected("kept"))
            return self.graph.call_method("size", (kept, 1))
        sizes = self.facts.sizes
        if symbol == sizes.tokens and sizes.virtual:
            given = self._length_of_input(symbol - sizes.virtual)
            return self.graph.call_function(operator.add, (given, sizes.virtual))
        return self._length_of_input(symbol)

    def _length_of_input(self, length: sympy.Expr) -> fx.Node:
        sizes = self.facts.sizes
        for node in self.source.nodes:
            if node.op != "placeholder":
                continue
            value = example(node)
            if isinstance(value, torch.SymInt) and sizes.expression(value) == length:
                return self._full(node)
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(sizes.shape(value)):
                    if size == length:
                        return self.graph.call_method("size", (self._full(node), dim))
        raise GraphError(f"no input has the length {length}")


def _kept_from_gradient(node: fx.Node) -> bool:
    if needs_grad(node) or not any(x.is_floating_point() for x in tensors_of(example(node))):
        return False
    return any(
        needs_grad(x) or (not is_tensor(x) and _kept_from_gradient(x)) for x in node.all_input_nodes
    )


def _marker() -> None:
    """Stands before the first operation while a stage is built."""


__all__ = ["ditch", "refuse_lost_gradient"]

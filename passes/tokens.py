"""Token facts: for every value, which dimension is the token row, and how its
operation acts on selected rows.

Facts flow forward from the inputs. A node whose operation has a rule that accepts the call
gets that rule's plan; any other takes the general path, and its row is known only where the
sizes leave one reading.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from fxseek.passes.entries import Entries, Groups, Order
from fxseek.passes.facts import (
    KEPT,
    Facts,
    Rows,
    Sizes,
    descendants,
    example,
    is_tensor,
    needs_grad,
    primary,
    tensors_of,
    user_tensors,
)
from fxseek.passes.rules import Call, Full, Length, Plan, called, find_rule, wants_of


def find_tokens(graph: fx.Graph, sizes: Sizes) -> Facts:
    """Facts of a functional, normalised graph. See `Facts` for what they hold."""
    facts = Facts(sizes)
    _find_stream(graph, facts)
    nodes = list(graph.nodes)
    for index, node in enumerate(nodes):
        if node.op not in ("call_function", "call_method"):
            if node in facts.stream and is_tensor(node):
                shared = facts.shared(node)
                facts.rows[node] = None if shared else sizes.rows(facts.shape(node))
            continue
        if node not in facts.stream:
            _settle_choice(node, facts)
            continue
        if node in facts.rows:  # settled while a product before it was tried
            continue
        _settle(node, facts)
        if _is_chosen(node, facts):
            facts.chosen.add(node)
        if node in facts.plans and facts.square(node) and not _made_before(node, facts):
            settled = _try_rows(nodes[index + 1 :], node, facts)
            if settled is not None:
                for undone in settled:
                    facts.plans.pop(undone, None)
                    facts.rows.pop(undone, None)
                    facts.general.pop(undone, None)
                facts.guesses.clear()
                _general(node, facts, "which of its two token dimensions is the row is not clear")
    return facts


def settle_values(graph: fx.Graph, facts: Facts, values: set[fx.Node]) -> None:
    """Give values outside the stream that learn makes anew their plans and rows, in `facts`."""
    for node in graph.nodes:
        if node in values and node not in facts.stream and node not in facts.chosen:
            facts.stream.add(node)
            _settle(node, facts)


def _find_stream(graph: fx.Graph, facts: Facts) -> None:
    """Nodes that carry gradient, and floating-point values made from the token input."""
    counting = [node for node in user_tensors(graph) if facts.token_sized(node)]
    first = primary(counting) or counting[:1]
    reached = descendants(first, _has_tensors)
    place = min(map(facts.first_token_dim, first), default=0)
    rows = [node for node in counting if facts.first_token_dim(node) >= place]
    facts.of_rows |= descendants(rows, _has_tensors)
    for node in graph.nodes:
        if node.op == "placeholder" and not (node in reached or needs_grad(node)):
            continue
        tensors = list(tensors_of(example(node)))
        if not tensors or node.op == "output":
            continue
        floating = any(tensor.is_floating_point() for tensor in tensors)
        tokens = facts.token_sized(node)
        if node in reached and floating and (tokens or needs_grad(node)):
            facts.token_made.add(node)
        if needs_grad(node) or (node in reached and floating and tokens):
            facts.stream.add(node)


def _has_tensors(node: fx.Node) -> bool:
    """What is made of a size alone has none of a row's tokens."""
    return any(True for _ in tensors_of(example(node)))


def _settle(node: fx.Node, facts: Facts) -> None:
    """Give a node its plan and rows, or the general path."""
    if node.target is operator.getitem and not is_tensor(node.args[0]):
        _settle_element(node, facts)
        return
    if not is_tensor(node) and any(user.target is not operator.getitem for user in node.users):
        _general(node, facts, "its tuple is read whole")
        return
    if facts.sizes.batch is None and facts.token_sized(node) and facts.shared(node):
        _general(node, facts, "all rows of a batch would share it")
        return
    found = find_rule(node)
    if found is None:
        _general(node, facts, "no rule for this operation")
        return
    plan = found.function(Call(node, facts))
    if plan is None:
        _general(node, facts, f"not per-token as it is called here (rule {found.name!r})")
        return
    lengths = [want.expression for want in wants_of(plan) if isinstance(want, Length)]
    if not all(_computable(length, facts.sizes) for length in lengths):
        _general(node, facts, "a size argument that is no product of known lengths")
        return
    facts.plans[node] = plan
    facts.rows[node] = plan.rows


def _settle_element(node: fx.Node, facts: Facts) -> None:
    """An element of a tuple: it has what the operation gave it."""
    source, index = node.args
    rows = facts.rows.get(source) if isinstance(source, fx.Node) else None  # type: ignore[arg-type]
    if isinstance(rows, tuple) and not isinstance(rows, Rows) and isinstance(index, int):
        facts.rows[node] = rows[index]
        if rows[index] is not None:
            assert isinstance(source, fx.Node)
            facts.plans[node] = Plan(rows[index], operator.getitem, (Element(source), index))
            return
    facts.rows[node] = _guessed(node, facts) if is_tensor(node) else None


def _settle_choice(node: fx.Node, facts: Facts) -> None:
    """Give an index, a mask or the like its plan, where it follows from what tokens have chosen."""
    if not any(x in facts.plans for x in node.all_input_nodes):
        return
    before = dict(facts.guesses)
    _settle(node, facts)
    if _is_chosen(node, facts):
        facts.chosen.add(node)
        return
    facts.guesses = before
    facts.disordered.discard(node)
    for table in (facts.plans, facts.rows, facts.general):
        table.pop(node, None)


def _is_chosen(node: fx.Node, facts: Facts) -> bool:
    """Whether a node belongs to `Facts.chosen`."""
    plan, found = facts.plans.get(node), find_rule(node)
    if plan is None or found is None or found.family == "random" or needs_grad(node):
        return False
    if any(isinstance(want, Full) and facts.token_sized(want.node) for want in wants_of(plan)):
        return False
    if _always(node, facts) or found.family == "constant":
        return True
    if is_tensor(node) and example(node).dtype in (torch.int32, torch.int64):
        return True
    return _of_choices(node, facts, facts.chosen)


def _always(node: fx.Node, facts: Facts) -> bool:
    """Whether a node numbers entries, or is looked up by a choice in what has no tokens."""
    rows = facts.rows.get(node)
    parts = rows if isinstance(rows, tuple) else (rows,)
    return any(isinstance(x, (Order, Groups)) for x in parts) or (
        called(node) in ("getitem", "index_select")
        and any(x in facts.chosen for x in node.all_input_nodes)
    )


def _of_choices(node: fx.Node, facts: Facts, made: set[fx.Node]) -> bool:
    """Whether all that has tokens among the operands is made."""
    operands = [x for x in node.all_input_nodes if facts.token_sized(x)]
    return bool(operands) and all(x in made for x in operands)


def follows_choices(graph: fx.Graph, facts: Facts, replayed: set[fx.Node]) -> set[fx.Node]:
    """The choices of tokens that are made anew beside `replayed`: what they follow from is there.

    The others come from the prefill, as constants do.
    """
    made = set(replayed)
    for node in graph.nodes:
        if node in facts.chosen and (_always(node, facts) or _of_choices(node, facts, made)):
            made.add(node)
    return made & facts.chosen


def per_token(node: fx.Node, facts: Facts) -> bool:
    """Whether each token's part of a value is made of the same token's parts of the stream."""
    plan = facts.plans.get(node)
    if not isinstance(plan, Plan) or plan.rows is None:
        return False
    wholes = [want.node for want in wants_of(plan) if isinstance(want, Full)]
    return not any(x in facts.stream and facts.token_sized(x) for x in wholes)


def made_from_rows(graph: fx.Graph, facts: Facts) -> set[fx.Node]:
    """Constants of the stream that follow from the same tokens' inputs: embeddings, a first norm.

    Nothing random is among them, nor what the graph keeps from a gradient that it would have.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or node not in facts.stream or not facts.token_sized(node):
            continue
        rule = find_rule(node)
        operands = node.all_input_nodes
        if (
            not needs_grad(node)
            and not any(map(needs_grad, operands))
            and per_token(node, facts)
            and (rule is None or rule.family != "random")
            and all(
                x in found or x.op == "placeholder" or not facts.token_sized(x)
                for x in operands
                if x in facts.stream
            )
        ):
            found.add(node)
    return found


class Element:
    """The tuple operand of an element's plan: taken as its own plan makes it."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def _general(node: fx.Node, facts: Facts, reason: str) -> None:
    """No plan: full operands in, and the row is what the sizes alone allow."""
    facts.plans.pop(node, None)
    if is_tensor(node):
        facts.rows[node] = _guessed(node, facts)
    else:
        facts.rows[node] = None
        if any(_in_order(x, facts) for x in node.all_input_nodes):
            facts.disordered.add(node)
    operands = any(facts.token_sized(operand) for operand in node.all_input_nodes)
    if operands or facts.token_sized(node):
        facts.general[node] = reason


def _guessed(node: fx.Node, facts: Facts) -> Rows | None:
    """What the sizes say of a value without a plan.

    Nobody knows which token has which place in what is made of entries in an order, as long as its
    first dimension may be that of the entries.
    """
    rows = Call(node, facts).guessed(node)
    ordered = any(_in_order(x, facts) for x in node.all_input_nodes)
    if ordered and (rows is None or rows.row == 0):
        facts.disordered.add(node)
        return None
    return rows


def _in_order(node: fx.Node, facts: Facts) -> bool:
    rows = facts.rows.get(node)
    ordered = isinstance(rows, Order) or (isinstance(rows, Entries) and rows.order is not None)
    return ordered or node in facts.disordered


def _computable(expression: sympy.Expr, sizes: Sizes) -> bool:
    known = {KEPT, sizes.tokens, sizes.batch, *sizes.hints}
    return bool(
        expression.free_symbols <= known
        and (not expression.free_symbols or expression.is_polynomial(*expression.free_symbols))
    )


def _made_before(node: fx.Node, facts: Facts) -> bool:
    """Whether an operand of the stream has two token dimensions, and its row is settled."""
    return any(
        operand in facts.stream
        and isinstance(facts.rows.get(operand), Rows)
        and facts.square(operand)
        for operand in node.all_input_nodes
    )


def _try_rows(later: list[fx.Node], start: fx.Node, facts: Facts) -> list[fx.Node] | None:
    """Follow a product of tokens × tokens until its columns are gone.

    The reading of its row is borne out if every operation on the way is per-token under it.
    Answers None then, or the nodes to settle again where it is not.
    """
    region = {start}
    settled: list[fx.Node] = []
    for node in later:
        if node not in facts.stream or not any(x in region for x in node.all_input_nodes):
            continue
        if node.op not in ("call_function", "call_method"):
            settled.append(node)
            return settled
        _settle(node, facts)
        settled.append(node)
        plan = facts.plans.get(node)
        if plan is None or any(isinstance(x, Full) and x.node in region for x in wants_of(plan)):
            return settled
        if facts.square(node):
            region.add(node)
    return None


__all__ = [
    "Element",
    "find_tokens",
    "follows_choices",
    "made_from_rows",
    "per_token",
    "settle_values",
]

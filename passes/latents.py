"""Latents: keys and values that follow from something much smaller are kept as that.

Before (`up` is a linear layer, `k_full` and `v_full` are the prefill's)::

    y = up(latent_rows); k_rows = cat((y[..., :8], rotary_rows)); v_rows = y[..., 8:]
    k = scatter_rows(k_full, k_rows, kept); v = scatter_rows(v_full, v_rows, kept)

After::

    latent = scatter_rows(latent_full, latent_rows, kept); rotary = scatter_rows(...)
    y = up(latent)                                # of all tokens
    k = pass_kept(cat((y[..., :8], rotary)), kept); v = pass_kept(y[..., 8:], kept)

The prefill hands on `latent` and `rotary`. What they are expanded to is not kept for backward: it
belongs to a region that backward runs again (`rematerialise.py`). Gradient passes the rows of
selected tokens alone, so that weights learn from these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
from torch import fx

from fxseek.ops.rows import Rows, every_token, pass_kept, scatter_rows
from fxseek.passes.ditch import ditch
from fxseek.passes.facts import Facts, example, is_tensor, needs_grad, numel, tensors_of
from fxseek.passes.ir import (
    Gathered,
    Given,
    Input,
    Piece,
    Prefilled,
    Selected,
    origin,
    placeholder_of,
)
from fxseek.passes.modes import erase_unread, regions
from fxseek.passes.rules import find_rule
from fxseek.passes.tokens import per_token

__all__ = ["expand_latents", "is_expanded"]

_SMALLER = 4
"""How much smaller latents are at least: to expand them takes products of all tokens, again."""

_EXPANDED = "fxseek: expanded"


def is_expanded(node: fx.Node) -> bool:
    """Whether a node of a learn stage belongs to what expands latents."""
    return _EXPANDED in node.meta


def expand_latents(learn: Piece, graph: fx.Graph, facts: Facts) -> Piece:
    """Let a learn stage read latents in the place of what follows from them.

    `graph`: the captured one, of which `facts` are known. That of `learn` is not to be used
    afterwards.
    """
    items = learn.placeholders()
    gathered = {item.node for item in learn.inputs if isinstance(item, Gathered)}
    scattered: dict[fx.Node, list[fx.Node]] = {}
    for node, item in items.items():
        if isinstance(item, Prefilled) and item.node not in gathered:
            users = list(node.users)
            if users and all(
                user.target is scatter_rows and user.args[0] is node for user in users
            ):
                scattered[item.node] = users
    stage = _Stage(learn, facts, items)
    for wanted, latents, inside in _latents(graph, facts, scattered):
        rows = [("rows", node) for node in wanted]
        piece = ditch(graph, facts, carrying=inside, outputs=rows, given=latents)
        if piece.runs_on_rows():
            stage.expand(piece, scattered)
    return stage.done()


class _Stage:
    """A learn stage that is being changed."""

    def __init__(self, learn: Piece, facts: Facts, items: dict[fx.Node, Input]) -> None:
        self.learn = learn
        self.graph = learn.graph
        self.facts = facts
        self.items = items
        self.places = {item: node for node, item in items.items()}

    def expand(self, piece: Piece, scattered: dict[fx.Node, list[fx.Node]]) -> None:
        """Put what `piece` makes of latents in the place of scattered values.

        Not where no latent carries gradient, or one is made when the values have been read.
        """
        readers = {node for wanted in piece.outputs for node in scattered[wanted]}
        carried = {x for node in piece.given() if (x := self.learn.compact.get(node)) is not None}
        trained = self._trained(piece)
        if not carried or None in trained.values():
            return
        before = carried.union(trained.values())
        met = [node for node in self.graph.nodes if node in readers or node in before]
        first = next(node for node in met if node in readers)
        if not before.issuperset(met[: len(before)]):
            return
        with self.graph.inserting_before(first):
            made: dict[fx.Node, fx.Node] = {}
            given = piece.placeholders()
            whole = {x.node: self._whole(x.node) for x in given.values() if isinstance(x, Given)}
            for node, item in given.items():
                if isinstance(item, Given):
                    made[node] = whole[item.node]
                elif isinstance(item, Selected):
                    latent, value = next(iter(whole.items()))
                    made[node] = self._call(every_token, value, self.facts.rows[latent])
                elif item in trained:
                    made[node] = trained[item]
                else:
                    made[node] = self._input(item)
            for node in piece.graph.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                made[node] = self.graph.node_copy(node, made.__getitem__)
                if node.op != "get_attr":  # the body of an autograd function
                    made[node].meta[_EXPANDED] = True
            results: tuple[fx.Node, ...] = piece.graph.output_node().args[0]  # type: ignore[assignment]
            for wanted, result in zip(piece.outputs, results, strict=True):
                for reader in scattered[wanted]:
                    _, _, kept, at, filled = reader.args
                    passed = self._call(pass_kept, made[result], kept, at, filled)
                    passed.meta["origin"] = wanted
                    reader.replace_all_uses_with(passed)

    def _trained(self, piece: Piece) -> dict[Input, Any]:
        """Where the stage has what `piece` reads of what is made from trained parameters.

        The prefill's has no gradient. None where the stage has none.
        """
        wanted: dict[fx.Node | None, Input] = {
            item.node: item
            for item in piece.inputs
            if isinstance(item, Prefilled) and needs_grad(item.node)
        }
        found: dict[Input, Any] = dict.fromkeys(wanted.values())
        for node in self.graph.nodes:
            item = wanted.get(origin(node))
            if item is not None and node.op != "placeholder":
                found[item] = node  # its detached copy comes after it, if any
        return found

    def _whole(self, latent: fx.Node) -> fx.Node:
        """A latent of all tokens, with gradient at the selected ones if it carries any."""
        base = self._input(Prefilled(latent))
        rows = self.learn.compact.get(latent)
        if rows is None:
            return base
        kept, filled = (self._input(Selected(part)) for part in ("kept", "filled"))
        made = self._call(scatter_rows, base, rows, kept, self.facts.rows[latent], filled)
        made.meta["origin"] = latent
        return made

    def _call(self, target: object, *args: object) -> fx.Node:
        node = self.graph.create_node("call_function", target, args)  # type: ignore[arg-type]
        node.meta[_EXPANDED] = True
        return node

    def _input(self, item: Input) -> fx.Node:
        if item not in self.places:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = placeholder_of(self.graph, item)
            self.places[item], self.items[node] = node, item
        return self.places[item]

    def done(self) -> Piece:
        """The stage without what nothing reads any more."""
        erase_unread(self.graph)
        self.graph.lint()
        return self.learn.edited(self.items)


# ---- what follows from what ------------------------------------------------------------------


def _latents(
    graph: fx.Graph, facts: Facts, wanted: Iterable[fx.Node]
) -> Iterator[tuple[list[fx.Node], list[fx.Node], set[fx.Node]]]:
    """Wanted values, what they follow from that is much smaller, and the nodes in between.

    Of what nothing but the wanted values is made of, the smallest cut.
    """
    ends = set(wanted)
    inside = _made_for_them(graph, facts, ends)
    order = {node: index for index, node in enumerate(graph.nodes)}
    together = nx.Graph()
    together.add_nodes_from(inside)
    together.add_edges_from(
        (x, node) for node in inside for x in node.all_input_nodes if x in inside
    )
    for component in list(nx.connected_components(together)):
        found = sorted(component & ends, key=order.__getitem__)
        size, cut = _smallest_cut(component, found, facts)
        if cut.isdisjoint(found) and size * _SMALLER <= sum(map(_bytes, found)):
            yield found, sorted(cut, key=order.__getitem__), component


def _smallest_cut(
    component: set[fx.Node], ends: list[fx.Node], facts: Facts
) -> tuple[int, set[fx.Node]]:
    """The values from which all `ends` follow that take the fewest bytes, and how many."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(("start", "end"))
    for node in component:
        operands = [x for x in node.all_input_nodes if facts.token_sized(x)]
        for x in (node, *operands):
            flow.add_edge((x, "in"), (x, "out"), **_capacity(x, facts))
        flow.add_edges_from(((x, "out"), (node, "in")) for x in operands)
        flow.add_edges_from(("start", (x, "in")) for x in operands if x not in component)
    for node in ends:  # which can be kept in any case
        flow.add_edge((node, "in"), (node, "out"), capacity=_bytes(node))
        flow.add_edge((node, "out"), "end")
    size, (before, _) = nx.minimum_cut(flow, "start", "end")
    nodes = {node for node, _ in set(flow) - {"start", "end"}}
    return size, {x for x in nodes if (x, "in") in before and (x, "out") not in before}


def _made_for_them(graph: fx.Graph, facts: Facts, ends: set[fx.Node]) -> set[fx.Node]:
    """What follows from each token's own values, and serves nothing but `ends`; these too."""
    found: set[fx.Node] = set()
    in_autocast = regions(graph)  # which would have to be entered again
    for node in reversed(graph.nodes):
        if node in in_autocast or not _follows(node, facts):
            continue
        readers = [x for x in node.users if x.op == "output" or [*tensors_of(example(x))]]
        if node in ends or (readers and found.issuperset(readers)):
            found.add(node)
    return found


def _follows(node: fx.Node, facts: Facts) -> bool:
    """Whether each token's part of a value can be made again of that token's values."""
    rule = find_rule(node)
    if rule is None or rule.family == "random" or not per_token(node, facts):
        return False
    rows = facts.rows[node]
    parts = rows if type(rows) is tuple else (rows,)
    return all(isinstance(x, Rows) for x in parts)


def _capacity(node: fx.Node, facts: Facts) -> dict[str, int]:
    """What it takes to keep a value; nothing where it can't be kept by its tokens."""
    rows = facts.rows.get(node)
    if not is_tensor(node) or not isinstance(rows, Rows) or rows.packed or rows.heads > 1:
        return {}
    return {"capacity": _bytes(node)}


def _bytes(node: fx.Node) -> int:
    value = example(node)
    return value.element_size() * numel(value)

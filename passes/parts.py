"""Parts: the learn stage cut at the exit, so that kept tokens can be learned in parts.

Before (all kept tokens at once)::

    k = scatter_rows(k_full, k_rows, kept); o = attend_rows(q, k, v, kept, mask=mask_rows)
    h = add(x, o)                                # the exit
    loss = head(h, ...)

After::

    body:  k = join_rows(k_joint, k_rows); o = attend_rows(q, k, v, kept, mask=mask_rows)
           h = add(x, o); return h               # of one part, in backward
    tail:  loss = head(h, ...)                   # once, on the exits of all kept tokens

Of a model that isn't shown to be causal (`causality.py`) all kept tokens are learned in one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxseek.config import SeekConfig
from fxseek.ops.parts import join_rows, pass_joint
from fxseek.ops.rows import Rows, pass_kept, scatter_rows
from fxseek.passes.causality import Mixing, size_arguments
from fxseek.passes.draws import acts_on_gradient, draws_values
from fxseek.passes.facts import Facts, ancestors, descendants, walk_up, where
from fxseek.passes.head import Head
from fxseek.passes.ir import Gathered, Input, Joined, Piece, placeholder_of
from fxseek.passes.latents import is_expanded
from fxseek.passes.outputs import Outputs
from fxseek.passes.outside import Outside
from fxseek.passes.rules import called
from fxseek.passes.schedule import Schedule

__all__ = ["Exit", "Parts", "draws", "find_exit", "find_obstacle", "join_values"]


@dataclass(frozen=True)
class Exit:
    """Where a model can be cut: after the last attention.

    `entry`: what the rest is made of, whose tokens are at `rows`; `end`: the loss, or what a loss
    outside the model reads of each token.
    """

    entry: fx.Node
    rows: Rows
    end: fx.Node


@dataclass(frozen=True)
class Parts:
    """The learn stage up to the exit, to be run on a part of the kept tokens at a time.

    `body`: its result is the rows of `exit`, whose tokens are at `rows`; `schedule`: what of it is
    kept for a part's backward; `mixing`: how tokens read each other; `masks`: rows of constants
    that attentions alone read, as their masks; `draws`: the body is random (dropout), so that the
    exits are those of a first run of the body, and not the prefill's.
    """

    body: Piece
    schedule: Schedule
    exit: fx.Node
    rows: Rows
    mixing: Mixing
    masks: frozenset[Gathered]
    draws: bool


def find_exit(head: Head | None, ending: Head | None, outside: Outside | None) -> Exit | None:
    """Where the model can be cut, or None; `ending`: the head, where the loss is all of its use."""
    if head is None:
        return None
    if ending is not None:
        return Exit(head.entry, head.rows, head.loss.node)
    if outside is not None and outside.read is not None:
        return Exit(head.entry, head.rows, outside.read)
    return None


def find_obstacle(
    cut: Exit | None,
    outputs: Outputs,
    facts: Facts,
    carrying: Set[fx.Node],
    config: SeekConfig,
) -> str:
    """What of the configuration, the loss or the outputs forbids parts; empty if nothing does."""
    if config.backend != "eager":
        return f"backend={config.backend!r} compiles the learn stage as a whole"
    if cut is None:
        for kind, node in outputs.wanted if config.outputs != "loss" else ():
            if kind != "value" and node in carrying:
                return (
                    f"with outputs={config.outputs!r} {called(node)} at {where(node)} carries "
                    "gradient past the loss"
                )
        acting = next(filter(acts_on_gradient, carrying), None)
        return (
            "what follows the last attention is not per-token throughout, or the loss is no sum "
            "over tokens"
        ) + (f", or {called(acting)} at {where(acting)} acts on gradients" if acting else "")
    if cut.entry not in carrying:
        return "nothing is trained before the end of the last attention"
    after = descendants([cut.end])
    wanted = [node for _, node in outputs.wanted]
    for node in walk_up(wanted, lambda x: x is not cut.end and x.op != "placeholder"):
        if node in carrying and node not in after and _has_tokens(node, carrying, facts):
            return f"{called(node)} at {where(node)} carries gradient past the loss"
    for node in ancestors([cut.entry]) & carrying:
        if not facts.token_sized(node):
            if acts_on_gradient(node):
                return (
                    f"{called(node)} at {where(node)} acts on the gradient of what has no tokens, "
                    "which parts would give it piece by piece"
                )
            if draws_values(node):
                return f"{called(node)} at {where(node)} would draw anew in each part"
    return ""


def _has_tokens(node: fx.Node, carrying: Set[fx.Node], facts: Facts) -> bool:
    """Whether gradient of a value reaches values of tokens."""
    return any(facts.rows.get(x) is not None for x in ancestors([node]) if x in carrying)


def draws(piece: Piece) -> bool:
    """Whether a piece is random (dropout)."""
    return any(draws_values(node) for node in piece.graph.nodes)


def join_values(body: Piece, mixing: Mixing) -> Piece:
    """Let a body take values that parts share in the place of scattering rows into full ones.

    Views of those that are cut get as many tokens as these have.
    """
    graph = body.graph
    items: dict[fx.Node, Input] = dict(body.placeholders())
    start = next(iter(graph.nodes))
    joint: fx.Node | None = None
    for node in list(graph.nodes):
        if node.target is scatter_rows:
            _, rows, _, at, *_ = node.args
            assert isinstance(at, Rows)
            item = Joined(node.meta["origin"], at)
            with graph.inserting_before(start):
                joint = placeholder_of(graph, item)
            items[joint] = item
            node.target, node.args = join_rows, (joint, rows)
            if item.node in mixing.cuts:
                with graph.inserting_after(node):
                    tokens = graph.call_method("size", (node, at.row))
                _resize(node, tokens, mixing.views)
                if not tokens.users:
                    graph.erase_node(tokens)
        elif node.target is pass_kept:
            value, _, at, *_ = node.args
            assert isinstance(value, fx.Node)
            node.target, node.args = pass_joint, (value, _joint_of(value) or joint, at)
    graph.lint()
    return body.edited(items)


def _resize(value: fx.Node, tokens: fx.Node, views: Mapping[fx.Node, int]) -> None:
    """Give the views of a value so many tokens."""
    for view in list(value.users):
        if view in views:
            sizes = list(size_arguments(view))
            if sizes and isinstance(sizes[views[view]], fx.Node):
                sizes[views[view]] = tokens
                view.args = (value, tuple(sizes))
            _resize(view, tokens, views)


def _joint_of(expanded: fx.Node) -> Any:
    """A joint that a value is expanded from; None where all of its latents are constants."""
    made = ancestors([expanded], lambda node: node.target is join_rows or is_expanded(node))
    return next((node.args[0] for node in made if node.target is join_rows), None)

"""Parts: the learn stage cut at the exit, so that kept tokens can be learned in parts.

Before (all kept tokens at once)::

    k = scatter_rows(k_full, k_rows, kept); o = attend_rows(q, k, v, kept, mask=mask_rows)
    h = add(x, o)                                # the exit
    loss = head(h, ...)

After::

    body:  k = join_rows(k_joint, k_rows); o = attend_rows(q, k, v, kept, mask=mask_rows)
           h = add(x, o); return h               # of one part, in backward
    tail:  loss = head(h, ...)                   # once, on the exits of all kept tokens

A token of a causal model reads no later one, so that a part which is run after all later ones has
all the gradient that its keys and values will ever get. That a model is causal is shown, or it is
learned in one part: all that reads values of other tokens are attentions under a causal flag, or
under a mask whose values a step looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.ops.attention import attend_rows
from fxseek.ops.masks import HIDDEN
from fxseek.ops.parts import join_rows, pass_joint
from fxseek.ops.rows import Rows, pass_kept, scatter_entries, scatter_rows
from fxseek.passes.facts import Facts, ancestors, descendants, example, tensors_of, where
from fxseek.passes.hoist import mask_by_flags, masks_of_attentions, share_masks
from fxseek.passes.ir import (
    Gathered,
    Input,
    Joined,
    Piece,
    Prefilled,
    placeholder_of,
)
from fxseek.passes.latents import is_expanded
from fxseek.passes.outputs import Outputs
from fxseek.passes.rules import argument, called, find_rule, operation
from fxseek.passes.schedule import Schedule, schedule
from fxseek.passes.structure import Structure

__all__ = ["Exit", "Parts", "draws", "find_parts"]


class Hides(NamedTuple):
    """A mask of an attention, as `fxseek.ops.attention.Mask` has it."""

    mask: Gathered
    inverted: bool = False
    fused: bool = False


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
    kept for a part's backward; `must_hide`: the masks of each attention, which hide later tokens if
    the model is causal (a step looks at them); `masks`: rows of constants that attentions alone
    read, as their masks; `cuts`: values of which a part need not read the tokens behind its last
    query; `draws`: the body is random (dropout), so that the exits are those of a first run of the
    body, and not the prefill's.
    """

    body: Piece
    schedule: Schedule
    exit: fx.Node
    rows: Rows
    must_hide: tuple[tuple[Hides, ...], ...]
    masks: frozenset[Gathered]
    cuts: frozenset[fx.Node]
    draws: bool


def find_parts(
    body: Piece,
    facts: Facts,
    structure: Structure,
    cut: Exit | None,
    outputs: Outputs,
    carrying: Iterable[fx.Node],
    config: SeekConfig,
) -> Parts | str:
    """Let a body be run in parts; or the reason why all kept tokens are learned in one.

    `body` ends in the entry of `cut`, with the rows of constants gathered; it is not to be used
    afterwards.
    """
    reason = _not_cut(cut, outputs, facts, set(carrying), config)
    if reason is not None:
        return reason
    assert cut is not None
    found = _Mixing(body)
    reason = found.look()
    if reason is not None:
        return reason
    masks = masks_of_attentions(body)
    body = mask_by_flags(body)
    if config.recompute != "block":
        body = share_masks(body)
    cuts = found.cuts()
    body = _joined(body)
    return Parts(
        body,
        schedule(body, structure, config),
        cut.entry,
        cut.rows,
        tuple(found.masks),
        masks,
        frozenset(cuts),
        draws(body),
    )


def _not_cut(
    cut: Exit | None,
    outputs: Outputs,
    facts: Facts,
    carrying: set[fx.Node],
    config: SeekConfig,
) -> str | None:
    """What of the configuration, the loss or the outputs is in the way."""
    if config.backend != "eager":
        return f"backend={config.backend!r} compiles the learn stage as a whole"
    if cut is None:
        return (
            "what follows the last attention is not per-token throughout, or the loss is no sum "
            "over tokens"
        )
    if cut.entry not in carrying:
        return "nothing is trained before the end of the last attention"
    after = descendants([cut.end])
    queue = [node for _, node in outputs.wanted]
    seen = {cut.end}
    while queue:
        node = queue.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if node in carrying and node not in after and _has_tokens(node, carrying, facts):
            return f"{called(node)} at {where(node)} carries gradient past the loss"
        queue.extend(node.all_input_nodes)
    return None


def _has_tokens(node: fx.Node, carrying: set[fx.Node], facts: Facts) -> bool:
    """Whether gradient of a value reaches values of tokens."""
    return any(facts.rows.get(x) is not None for x in ancestors([node]) if x in carrying)


class _Mixing:
    """What reads values of other tokens in a body, and by which masks."""

    def __init__(self, body: Piece) -> None:
        self.body = body
        self.given = body.placeholders()
        self.masks: dict[tuple[Hides, ...], None] = {}
        self.read: dict[fx.Node, set[fx.Node]] = {}
        """What reads each scattered value, or what it is expanded to."""
        self.hidden: set[fx.Node] = set()
        """Softmaxes of products whose masks are known."""
        self.weighed: dict[fx.Node, fx.Node] = {}
        """Products of probabilities and values, and the softmax of each."""

    def look(self) -> str | None:
        """Why a part might read later tokens; None where it does not."""
        for node in self.body.graph.nodes:
            if node.target is scatter_entries:
                (reader, *_) = node.users
                return f"{called(reader)} at {where(reader)} reads values of other tokens"
            if node.target is scatter_rows:
                self.read[node] = set()
                reason = self._readers(node, node)
                if reason is not None:
                    return reason
        if not self.read:
            return "no keys or values carry gradient"
        for product, softmax in self.weighed.items():
            if softmax in self.hidden:
                continue
            for scores in _products_before(softmax):  # keys without gradient are scattered nowhere
                reason = self._masked_scores(scores)
                if reason is not None:
                    return reason
            if softmax not in self.hidden:
                return f"the mask of the attention at {where(product)} is not known"
        return None

    def _readers(self, scattered: fx.Node, value: fx.Node) -> str | None:
        for user in value.users:
            if is_expanded(user):
                reason: str | None = self._readers(scattered, user)
                if reason is not None:
                    return reason
                continue
            if value is scattered or is_expanded(value):
                self.read[scattered].add(user)
            if user.op == "output":
                reason = "a value of all tokens is returned"
            elif user.op == "call_method" and user.target in ("size", "dim"):
                reason = None
            elif user.target is attend_rows and value is not user.args[0]:
                reason = self._masked(user)
            elif _multiplies(user, value):
                softmax = _softmax_before(user)
                if softmax is not None:
                    self.weighed[user] = softmax
                reason = None if softmax is not None else self._masked_scores(user)
            elif _moves_only(user):
                reason = self._readers(scattered, user)
            else:
                reason = f"{called(user)} at {where(user)} reads values of other tokens"
            if reason is not None:
                return reason
        return None

    def _masked(self, attention: fx.Node) -> str | None:
        """Why an attention might read later tokens."""
        if attention.kwargs.get("is_causal") is True:
            return None
        mask: Any = attention.kwargs.get("mask")
        if mask is None:
            return f"the attention at {where(attention)} has no mask, and reads later tokens"
        item = self.given.get(mask)
        if not isinstance(item, Gathered):
            return f"the mask of the attention at {where(attention)} is no constant of each query"
        return self._hidden_by([Hides(item, fused=True)], attention)

    def _masked_scores(self, product: fx.Node) -> str | None:
        """The same of queries × keys, on the way to a softmax."""
        masks: dict[Hides, None] = {}
        queue, ended = [(product, False)], set[fx.Node]()
        while queue:
            node, masked = queue.pop()
            for user in node.users:
                if operation(user) in ("softmax", "_softmax"):
                    ended.add(user)
                elif operation(user) in _ENTRYWISE or _moves_only(user):
                    found = dict.fromkeys(self._hides(user, node))
                    masks |= found
                    queue.append((user, masked or bool(found)))
                elif masked and operation(user) in _GREATEST:
                    queue.append((user, masked))
                else:
                    return f"{called(user)} at {where(user)} reads products of other tokens"
        if operation(product) == "baddbmm":
            masks |= dict.fromkeys(self._hides(product, product))
        if not ended:
            return f"{called(product)} at {where(product)} reads values of other tokens"
        self.hidden |= ended
        return self._hidden_by([*masks], product)

    def _hides(self, node: fx.Node, scores: fx.Node) -> Iterator[Hides]:
        name = operation(node)
        if name == "masked_fill":
            mask = self.given.get(node.args[1])  # type: ignore[arg-type]
            if isinstance(mask, Gathered) and _is_low(argument(node, 2, "value")):
                yield Hides(mask, inverted=True)
        elif name == "where":
            mask = self.given.get(node.args[0])  # type: ignore[arg-type]
            shown = node.args[1] is scores
            if isinstance(mask, Gathered) and _is_low(node.args[2 if shown else 1]):
                yield Hides(mask, inverted=not shown)
        elif name in ("add", "baddbmm"):
            for operand in node.all_input_nodes:
                mask = self.given.get(operand)
                if isinstance(mask, Gathered):
                    yield Hides(mask)

    def _hidden_by(self, masks: Sequence[Hides], reader: fx.Node) -> str | None:
        if not any(_compares_positions(hides.mask.node) for hides in masks):
            return f"the attention at {where(reader)} reads later tokens"
        self.masks[tuple(masks)] = None
        return None

    def cuts(self) -> set[fx.Node]:
        """The captured nodes of keys and values that attentions read as they are, both of them."""
        whole = {
            node
            for node, users in self.read.items()
            if all(user.target is attend_rows for user in users) and _ends_in_tokens(node)
        }
        alone: set[Any] = {None}
        while alone:
            read = [self._sources(*user.args[1:3]) for node in whole for user in self.read[node]]
            alone = {x for found in read if not whole.issuperset(found) for x in found} & whole
            whole -= alone
        return {node.meta["origin"] for node in whole}

    def _sources(self, *values: Any) -> set[Any]:
        """What values are, or what they are expanded from that has tokens."""
        found: set[Any] = set()
        for value in values:
            if value in self.read or not is_expanded(value):
                found.add(value)
                continue
            for operand in value.all_input_nodes:
                whole = isinstance(self.given.get(operand), Prefilled)
                if whole or operand.op != "placeholder":
                    found |= self._sources(operand)
        return found


def _ends_in_tokens(scattered: fx.Node) -> bool:
    """Whether tokens are in the last dimension but one of a scattered value, and only they."""
    rows = scattered.args[3]
    assert isinstance(rows, Rows)
    rank = example(scattered.meta["origin"]).dim()
    return not rows.packed and rows.row == rank - 2


def _moves_only(node: fx.Node) -> bool:
    """Whether a node of a piece moves dimensions of a value, or joins it with others."""
    found = find_rule(node)
    return found is not None and (found.layout or found.name in ("getitem", "cat"))


_ENTRYWISE = ("add", "sub", "mul", "div", "tanh", "to", "where", "masked_fill", "clone")
"""What may be done to scores between the product and the softmax."""
_GREATEST = ("max", "amax")
"""What reads the scores of a query together: of masked ones none that is hidden counts."""
_PRODUCTS = {"matmul": 2, "bmm": 2, "baddbmm": 3}
"""Products of matrices, and how many operands each has."""


def _multiplies(node: fx.Node, value: fx.Node) -> bool:
    """Whether rows are multiplied by a value of all tokens."""
    operands = _PRODUCTS.get(operation(node) or "", 0)
    return len(node.args) == operands and node.args.index(value) == operands - 1


def _is_low(value: Any) -> bool:
    """Whether scores that are set to it count for nothing; a tensor is taken to be so."""
    return not isinstance(value, (int, float)) or value <= HIDDEN


def _products_before(softmax: fx.Node) -> Iterator[fx.Node]:
    """The products whose entries are a softmax's scores."""
    queue, seen = softmax.all_input_nodes[:1], set[fx.Node]()
    while queue:
        node = queue.pop()
        if operation(node) in _PRODUCTS:
            yield node
        elif node not in seen and (operation(node) in _ENTRYWISE or _moves_only(node)):
            seen.add(node)
            queue += node.all_input_nodes


def _softmax_before(product: fx.Node) -> fx.Node | None:
    """The softmax whose probabilities are multiplied by a value of all tokens."""
    node = product.args[-2]
    while isinstance(node, fx.Node) and node.args:
        if operation(node) in ("softmax", "_softmax"):
            return node
        if operation(node) not in (*_ENTRYWISE, "dropout") and not _moves_only(node):
            return None
        node = node.args[0]
    return None


def _compares_positions(mask: fx.Node) -> bool:
    """Whether a mask may hide later tokens: it compares positions of two kinds, or it is given."""
    for node in ancestors([mask]):
        if operation(node) in ("tril", "triu"):
            return True
        if operation(node) in ("le", "lt", "ge", "gt") and len(node.all_input_nodes) == 2:
            return True
        if node.op == "placeholder" and any(x.dim() > 2 for x in tensors_of(example(node))):
            return True
        if node.op == "placeholder" and _torch.is_module_state(node) and _is_square(node):
            return True  # a causal mask that is a buffer of the model
    return False


def _is_square(node: fx.Node) -> bool:
    return any(x.dim() == 2 and x.shape[0] == x.shape[1] for x in tensors_of(example(node)))


def draws(piece: Piece) -> bool:
    """Whether a piece is random (dropout)."""
    return any(_draws(node) for node in piece.graph.nodes)


def _draws(node: fx.Node) -> bool:
    if node.target is attend_rows:
        drops: Any = node.kwargs.get("dropout_p", 0.0)
        return drops != 0.0
    found = find_rule(node)
    if found is None or found.family != "random":
        return False
    if operation(node) != "dropout":
        return True
    drops = argument(node, 1, "p", 0.5)
    return drops != 0.0 and argument(node, 2, "training", True) is not False


def _joined(body: Piece) -> Piece:
    """Let a body take values that parts share in the place of scattering rows into full ones."""
    graph = body.graph
    items: dict[fx.Node, Input] = dict(body.placeholders())
    joint: fx.Node | None = None
    start = next(iter(graph.nodes))
    for node in list(graph.nodes):
        arguments: tuple[Any, ...] = node.args
        if node.target is pass_kept:
            node.target, node.args = pass_joint, (arguments[0], joint, arguments[2])
        if node.target is not scatter_rows:
            continue
        _, rows, _, at, *_ = arguments
        assert isinstance(at, Rows)
        item = Joined(node.meta["origin"], at)
        with graph.inserting_before(start):
            joint = placeholder_of(graph, item)
        items[joint] = item
        node.target, node.args = join_rows, (joint, rows)
    for node in list(items):
        if not node.users:
            graph.erase_node(node)
    inputs = [items[node] for node in graph.nodes if node.op == "placeholder"]
    graph.lint()
    return Piece(graph, inputs, body.outputs, body.general, body.compact, body.parts)

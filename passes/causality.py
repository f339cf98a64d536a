"""Whether a model is causal: what of it reads values of other tokens, and by which masks.

A part of the kept tokens is run after all later ones, so that it has all the gradient that its keys
and values will ever get. That holds where no token reads a later one, which is shown here: all that
reads values of other tokens are attentions under a causal flag, or under a mask whose values a step
looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import fx

from fxseek import _torch
from fxseek.ops.attention import attend_rows
from fxseek.ops.masks import HIDDEN
from fxseek.ops.rows import Rows, scatter_entries, scatter_rows
from fxseek.passes.facts import Facts, ancestors, example, listed, tensors_of, where
from fxseek.passes.ir import Gathered, Piece, Prefilled
from fxseek.passes.latents import is_expanded
from fxseek.passes.rules import argument, called, find_rule, operation

__all__ = ["Hides", "Mixing", "find_mixing", "size_arguments"]


class Hides(NamedTuple):
    """A mask of an attention, as `fxseek.ops.masks.Mask` has it."""

    mask: Gathered
    inverted: bool = False
    fused: bool = False


class Mixing(NamedTuple):
    """How tokens of a causal model read each other.

    `must_hide`: the masks of each attention, which hide later tokens if the model is causal (a step
    looks at them); `cuts`: captured values of which a part need not read the tokens behind its last
    query; `views`: of the body, what views such values on the way to an attention, and the
    dimension of the tokens in it.
    """

    must_hide: tuple[tuple[Hides, ...], ...]
    cuts: frozenset[fx.Node]
    views: Mapping[fx.Node, int]


def find_mixing(body: Piece, facts: Facts) -> Mixing | str:
    """How tokens read each other in a learn stage; or why a part of them might read later ones.

    `facts` are those of the captured graph.
    """
    found = _Reads(body)
    reason = found.look()
    if reason is not None:
        return reason
    cuts, views = _Cuts(body, facts, found).find()
    return Mixing(tuple(found.masks), cuts, views)


class _Reads:
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
        if operation(product) == "baddbmm":
            masks |= dict.fromkeys(self._hides(product, product))
        queue, ended = [(product, bool(masks))], set[fx.Node]()
        while queue:
            node, masked = queue.pop()
            for user in node.users:
                if operation(user) in ("softmax", "_softmax"):
                    if not masked:
                        return f"the attention at {where(user)} has no mask, and reads later tokens"
                    ended.add(user)
                elif operation(user) in _ENTRYWISE or _moves_only(user):
                    found = dict.fromkeys(self._hides(user, node))
                    masks |= found
                    queue.append((user, masked or bool(found)))
                elif masked and operation(user) in _GREATEST:
                    queue.append((user, masked))
                else:
                    return f"{called(user)} at {where(user)} reads products of other tokens"
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


class _Cuts:
    """Which values need not be whole: keys and values that attentions read as they are."""

    def __init__(self, body: Piece, facts: Facts, found: _Reads) -> None:
        self.facts = facts
        self.given = found.given
        self.read = found.read
        self.attentions = [node for node in body.graph.nodes if node.target is attend_rows]
        self.views: dict[fx.Node, tuple[fx.Node, int]] = {}
        """Of each view, the value that it views, and where its tokens are."""

    def find(self) -> tuple[frozenset[fx.Node], dict[fx.Node, int]]:
        """As `Mixing` has them."""
        readers = {node: found for node in self.read if (found := self._readers(node)) is not None}
        cut = set(readers)
        alone: set[Any] = {None}
        while alone:  # an attention has as many keys as values
            read = [self._sources(*user.args[1:3]) for node in cut for user in readers[node]]
            alone = {x for found in read if not cut.issuperset(found) for x in found} & cut
            cut -= alone
        if any(self._lengthen(some, cut) for some in self._alike()):
            cut.clear()
        views = {view: row for view, (viewed, row) in self.views.items() if viewed in cut}
        return frozenset(node.meta["origin"] for node in cut), views

    def _alike(self) -> Iterable[list[fx.Node]]:
        """The attentions that share a mask."""
        found: dict[Any, list[fx.Node]] = {}
        for node in self.attentions:
            mask = node.kwargs.get("mask"), node.kwargs.get("is_causal")
            found.setdefault(mask, []).append(node)
        return found.values()

    def _lengthen(self, attentions: Iterable[fx.Node], cut: Set[fx.Node]) -> bool:
        """Whether one has more keys than an earlier one, for which their mask is made."""
        shorter = [not cut.isdisjoint(self._sources(*node.args[1:3])) for node in attentions]
        return shorter != sorted(shorter)

    def _readers(self, scattered: fx.Node) -> set[fx.Node] | None:
        """The attentions that read a value; None where something else reads it, or may."""
        rows = scattered.args[3]
        assert isinstance(rows, Rows)
        if rows.packed:
            return None
        expanded = any(is_expanded(user) for user in scattered.users)
        if not expanded:
            return self._through_views(scattered, scattered, rows.row)
        ends = rows.row == _rank(scattered) - 2
        users = self.read[scattered]
        return users if ends and all(user.target is attend_rows for user in users) else None

    def _through_views(self, scattered: fx.Node, value: fx.Node, row: int) -> set[fx.Node] | None:
        found: set[fx.Node] = set()
        for user in value.users:
            if user.target is attend_rows:
                if row != _rank(value) - 2:
                    return None
                found.add(user)
                continue
            after = self._row_of_view(user)
            more = None if after is None else self._through_views(scattered, user, after)
            if more is None or after is None:
                return None
            self.views[user] = scattered, after
            found |= more
        return found

    def _row_of_view(self, node: fx.Node) -> int | None:
        """Where the tokens are in a view, if it can be one of fewer tokens; else None."""
        if operation(node) not in _VIEWS:
            return None
        plan = self.facts.plans.get(node.meta["origin"])
        if plan is None or not isinstance(plan.rows, Rows) or plan.rows.packed:
            return None
        row, sizes = plan.rows.row, size_arguments(node)
        if not sizes:
            return row
        fixed = len(sizes) != _rank(node) or (isinstance(sizes[row], int) and sizes[row] >= 0)
        return None if fixed else row

    def _sources(self, *values: Any) -> set[Any]:
        """What values are, or what they are views of, or expanded from, that has tokens."""
        found: set[Any] = set()
        for value in values:
            if value in self.views:
                found.add(self.views[value][0])
                continue
            if value in self.read or not is_expanded(value):
                found.add(value)
                continue
            for operand in value.all_input_nodes:
                whole = isinstance(self.given.get(operand), Prefilled)
                if whole or operand.op != "placeholder":
                    found |= self._sources(operand)
        return found


def size_arguments(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a view is given, one of each of its dimensions; () where it is given none."""
    if operation(node) not in ("view", "reshape"):
        return ()
    return listed(node)


def _rank(node: fx.Node) -> int:
    return example(node.meta["origin"]).dim()


def _moves_only(node: fx.Node) -> bool:
    """Whether a node of a piece moves dimensions of a value, or joins it with others."""
    found = find_rule(node)
    return found is not None and (found.layout or found.name in ("getitem", "cat"))


_VIEWS = ("view", "reshape", "transpose", "permute")
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

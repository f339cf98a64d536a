"""Masks: no attention mask of tokens × tokens is ever whole.

Before::

    le = arange_keys <= arange_queries           # [1, 1, tokens, tokens]
    mask = le & padding                          # [batch, 1, tokens, tokens]
    o = sdpa(q, k, v, attn_mask=mask)

After::

    mask = mask_rows(arange_keys, arange_queries, padding)     # makes rows of it when asked
    o = attend_all(q, k, v, attn_mask=mask)      # by the causal flag, or on chunks of queries

A boolean mask is elementwise in values of one token dimension. Its rows for some queries follow
from those values at these queries. Whether it is more than the causal flag says (padding, packing,
a window) is not known before the batch is: `fxseek.ops.masks.MaskRows` finds out, in chunks.
Fused kernels skip half of the work under the causal flag and none under a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxseek.ops.attention import attend_all
from fxseek.ops.masks import MaskMaker, queries_of
from fxseek.ops.rows import Rows
from fxseek.passes.facts import Sizes, example, is_tensor, listed
from fxseek.passes.head import Head
from fxseek.passes.ir import Gathered, Piece, Prefilled, origin
from fxseek.passes.modes import erase_unread
from fxseek.passes.rules import find_rule, operation
from fxseek.passes.rules.pointwise import binary, convert, unary
from fxseek.passes.score_plan import ScorePlan, SpelledMap

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


def use_mask_rows(stage: Piece, sizes: Sizes, whole: Iterable[fx.Node] = ()) -> Piece:
    """Let the attentions of a stage that runs on all tokens take masks by rows.

    Masks leave the stage in that form too, but for those of `whole`, captured masks that a later
    stage reads otherwise.
    """
    keep = set(whole)
    masks: dict[fx.Node, list[fx.Node]] = {}
    for node in stage.graph.nodes:
        if operation(node) != "scaled_dot_product_attention":
            continue
        given = _arguments(node)
        mask = given.get("attn_mask")
        if _square(mask, sizes):
            assert isinstance(mask, fx.Node)
            masks.setdefault(mask, []).append(node)
            node.target, node.args, node.kwargs = attend_all, (), given
    output = stage.graph.output_node()
    for captured, made in zip(stage.outputs, output.args[0], strict=True):  # type: ignore[arg-type]
        if isinstance(made, fx.Node) and _masks_attention(captured, sizes):
            masks.setdefault(made, [])  # of an attention that only later stages run
    inputs = stage.placeholders()
    for mask, users in masks.items():
        if mask in inputs and isinstance(inputs[mask], Prefilled):  # made elsewhere
            continue
        rows = _Rows(mask, sizes)
        name = f"mask_rows_{len(stage.parts)}"
        square = sizes.shape(example(mask))[-1] == sizes.tokens
        stage.parts[name] = MaskMaker(rows.module(), square)
        with stage.graph.inserting_after(list(inputs)[-1] if mask in inputs else mask):
            made = stage.graph.create_node("call_module", name, tuple(rows.leaves))
        made.meta["origin"] = captured = origin(mask)
        for user in (*users, *(() if captured in keep else (output,))):
            user.replace_input_with(mask, made)
    erase_unread(stage.graph)
    return stage


def read_whole(learned: Sequence[Piece], score: ScorePlan, head: Head | None) -> Iterator[fx.Node]:
    """Values that a later stage reads otherwise than as an attention's mask, or as its rows."""
    pieces = [*learned]
    if score.gradient is not None:
        pieces += score.gradient.pieces()
    if head is not None:
        pieces.append(head.stage)
    for piece in pieces:
        for node, item in piece.placeholders().items():
            masks = all(user.target is attend_all for user in node.users)
            if isinstance(item, Prefilled) and not (node.users and masks):
                yield item.node
    if isinstance(score.context, SpelledMap):
        yield from score.context.reads
    for item in [item for piece in learned for item in piece.inputs]:
        if isinstance(item, Gathered):
            value = example(item.node)
            rank = value.dim() if isinstance(value, torch.Tensor) else 0
            if (item.unsqueezed, item.rows) not in ((0, Rows(rank - 2, 0)), (0, Rows(rank - 2))):
                yield item.node


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _masks_attention(node: fx.Node, sizes: Sizes) -> bool:
    return _square(node, sizes) and any(
        operation(user) == "scaled_dot_product_attention"
        and _arguments(user).get("attn_mask") is node
        for user in node.users
    )


def _square(mask: Any, sizes: Sizes) -> bool:
    if not is_tensor(mask) or example(mask).dtype != torch.bool:
        return False
    shape = sizes.shape(example(mask))
    return len(shape) == 4 and shape[-2] == sizes.tokens and sizes.has_tokens(shape[-1])


class _Rows:
    """The graph that makes rows of one mask from `leaves` and from query positions.

    Where a value of tokens × tokens is not made element by element, it is a leaf itself.
    """

    def __init__(self, mask: fx.Node, sizes: Sizes) -> None:
        self.sizes = sizes
        self.graph = fx.Graph()
        self.kept = self.graph.placeholder("kept")
        self.leaves: dict[fx.Node, fx.Node] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self.graph.output(self._rows(mask))

    def module(self) -> fx.GraphModule:
        """``(kept, *leaves) → rows``."""
        return fx.GraphModule(torch.nn.Module(), self.graph, class_name="MaskRows")

    def _rows(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            self.made[node] = self._make(node)
        return self.made[node]

    def _make(self, node: fx.Node) -> fx.Node:
        shape = self.sizes.shape(example(node)) if is_tensor(node) else ()
        if len(shape) < 2 or shape[-2] != self.sizes.tokens:
            return self._leaf(node)
        found = find_rule(node)
        if found is not None and self.sizes.has_tokens(shape[-1]):
            if found.function in (unary, binary, convert):
                args = map_arg(node.args, self._rows)
                kwargs = map_arg(node.kwargs, self._rows)
                return self.graph.create_node(node.op, node.target, args, kwargs)
            if found.name == "expand" and len(shape) == 4:
                return self._expanded(node)
        return self.graph.call_function(queries_of, (self._leaf(node), self.kept))

    def _expanded(self, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        sizes = [self._leaf(size) if isinstance(size, fx.Node) else size for size in listed(node)]
        sizes[-2] = self.graph.call_method("size", (self.kept, 1))
        return self.graph.call_method("expand", (self._rows(source), *sizes))

    def _leaf(self, node: fx.Node) -> fx.Node:
        if node not in self.leaves:
            last = [self.kept, *self.leaves.values()][-1]
            with self.graph.inserting_after(last):
                self.leaves[node] = self.graph.placeholder(node.name)
        return self.leaves[node]


__all__ = ["read_whole", "use_mask_rows"]

"""Sizes: which symbols count tokens and the batch, and which inputs must agree on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

import sympy
import torch
from torch import fx

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.passes.facts import (
    POSITIONS,
    Sizes,
    example,
    is_tensor,
    needs_grad,
    primary,
    user_tensors,
)
from fxseek.passes.uncounted import UncountedTokens, find_uncounted, refuse_bypass

__all__ = ["find_sizes", "may_batch", "may_count"]


def find_sizes(
    graph: fx.Graph, token_dim: int = 1, token_inputs: Sequence[str] | None = None
) -> Sizes:
    """Find the token and batch symbols among the inputs of a captured graph.

    The first user input of at least `token_dim` + 1 dimensions decides; other inputs whose
    token or batch dimension had the same length at capture are unified with it, and guarded to
    stay equal. With `token_inputs` only inputs of these names count tokens: a
    model with an encoder and a decoder has two lengths, which may be equal by chance.

    Raises:
        GraphError: there is no user tensor, its token dimension is a constant, or one symbol
            stands for both batch and tokens.
    """
    inputs = user_tensors(graph)
    candidates = [node for node in inputs if example(node).dim() > token_dim]
    if not candidates:
        raise GraphError(
            f"no input has a token dimension: fxseek looks for tokens in dimension {token_dim} "
            "of the first tensor argument, and no tensor argument has that many dimensions. "
            "Pass token_dim= if tokens are elsewhere; a model without tokens has nothing to "
            "select."
        )
    counting = candidates
    if token_inputs is not None:
        counting = [node for node in candidates if _torch.source_name(node) in token_inputs]
    first = (primary(counting) or counting or candidates)[0]
    shape = example(first).shape
    tokens = _torch.size_expression(shape[token_dim])
    name = _torch.source_name(first) or first.name
    if not isinstance(tokens, sympy.Symbol):
        _refuse_constant(graph, first, name, token_dim)
    if name == POSITIONS:
        refuse_bypass(graph, [node for node in inputs if node is not first])
    hints: dict[sympy.Symbol, int] = {}
    for node in inputs:
        for size in example(node).shape:
            if isinstance(size, torch.SymInt):
                hints.update(_torch.symbol_hints(size))
    batch: sympy.Symbol | None = None
    if token_dim > 0:
        size = _torch.size_expression(shape[0])
        if isinstance(size, sympy.Symbol):
            batch = size
        elif size != 1:
            raise GraphError(
                f"the batch dimension of {name!r} was captured as the constant {size}, so it "
                "cannot be told from other dimensions of that length. With torch.compile pass "
                "dynamic=True; otherwise the model's code compares or unpacks the batch size."
            )
    if batch == tokens:
        raise GraphError(
            f"the batch and the token dimension of {name!r} share one symbol ({tokens}), since "
            "both had one length at capture (duck shaping). Capture with fxseek.compile, or "
            "with a batch size that differs from the sequence length."
        )
    equal: dict[sympy.Symbol, int] = {}
    for node in inputs:
        counts = node in counting or token_inputs is None
        sizes = [_torch.size_expression(size) for size in example(node).shape]
        for dim, size in enumerate(sizes):
            if not isinstance(size, sympy.Symbol) or size in (tokens, batch):
                continue
            value, hint = example(node), hints[size]
            of_tokens = counts and hint == hints[tokens] and may_count(value, dim, token_dim)
            of_batch = batch is not None and hint == hints[batch] and may_batch(value, dim)
            if dim > 0 and _torch.size_hint(value.shape[0]) == hint:
                of_batch = False  # the first dimension is the batch, and this one counts tokens
            if of_batch or of_tokens:
                equal[size] = 0 if of_batch else token_dim
                _guard_equal(value.shape[dim], shape[equal[size]])
    tokens = _symbol(shape[token_dim])  # a guard may have put another symbol there
    batch = None if batch is None else _symbol(shape[0])
    same: dict[sympy.Symbol, sympy.Expr] = {
        old: _symbol(shape[dim]) for old, dim in equal.items() if old not in (tokens, batch)
    }
    virtual = _virtual_tokens(graph, Sizes(tokens, batch, same, hints))
    if virtual:
        inside = sympy.Symbol(f"{tokens}_and_{virtual}", integer=True, positive=True)
        given = {tokens: inside - virtual}
        same = {symbol: to.xreplace(given) for symbol, to in same.items()} | given
        hints = hints | {inside: hints[tokens] + virtual}
        tokens = inside
    return Sizes(tokens, batch, same, hints, virtual)


def _refuse_constant(graph: fx.Graph, first: fx.Node, name: str, token_dim: int) -> NoReturn:
    """Say why the tokens are a constant of the graph, or where they begin that no input counts."""
    size = example(first).shape[token_dim]
    found = f"no token dimension: dimension {token_dim} of {name!r} was captured as the constant"
    if name == POSITIONS:
        raise GraphError(
            f"the model's code fixes the number of its patches to {size}: it cuts them up into "
            "windows, merges some, or adds what has a row for each of so many. fxseek needs "
            "patches that go on through all layers as the tokens of one sequence."
        )
    image = example(first).is_floating_point() and token_dim == 1
    place = find_uncounted(graph, first) if image else None
    if place is not None and place.tokens != size:
        raise UncountedTokens(
            f"{found} {size}, and the model makes its tokens itself. fxseek.compile(model) counts "
            'them; torch.compile(backend="fxseek") does not.',
            place,
        )
    if name == "pixel_values":
        raise GraphError(
            "no token dimension: no input counts the patches of an image, and no module is given "
            "all of them as the one sequence [batch, patches, width] that the model's first "
            "attention reads (not windows of it, nor fewer keys than patches)."
        )
    raise GraphError(
        f"{found} {size}. Either the model's code fixes the length (a Python loop or a comparison "
        "over it), or the input was not marked dynamic: with torch.compile pass dynamic=True or "
        "call torch._dynamo.mark_dynamic(input, dim); fxseek.compile marks it by itself."
    )


def may_count(value: torch.Tensor, dim: int, token_dim: int) -> bool:
    """Whether a dimension as long as the tokens counts them.

    In ids, positions and masks any dimension but the batch does; in activations and images only
    the token dimension, and the last two of a mask [batch, 1, tokens, tokens].
    """
    if dim == token_dim:
        return True
    if value.is_floating_point():
        return value.dim() == 4 and dim >= 2 and value.shape[1] == 1
    return dim > 0 or value.dim() == 1


def may_batch(value: torch.Tensor, dim: int) -> bool:
    """Whether a dimension as long as the batch counts its rows: the first, or one of positions'.

    Multimodal models take positions [3, batch, tokens].
    """
    return dim == 0 or (not value.is_floating_point() and 0 < dim < value.dim() - 1)


def _guard_equal(size: int | torch.SymInt, like: int | torch.SymInt) -> None:
    """Guard the captured graph to batches where two lengths are equal, as they are in this one.

    They may be so by chance. Asking is what makes it a guard; either symbol may go on for both.
    """
    if not bool(size == like):
        raise GraphError(f"the lengths {size} and {like} of two inputs differ and must be equal")


def _symbol(size: int | torch.SymInt) -> sympy.Symbol:
    found = _torch.size_expression(size)
    if not isinstance(found, sympy.Symbol):
        raise GraphError(f"the model's code fixes a length to {found}: it must not be a constant")
    return found


def _virtual_tokens(graph: fx.Graph, sizes: Sizes) -> int:
    """How many tokens most values with gradient have beyond those of the input."""
    valued = (node for node in graph.nodes if is_tensor(node) and needs_grad(node))
    met = Counter(size for node in valued for size in sizes.shape(example(node)))
    counts: Counter[int] = Counter()
    for size, times in met.items():
        beyond = size - sizes.tokens
        if beyond.is_Integer and beyond >= 0:
            counts[int(beyond)] += times
    return counts.most_common(1)[0][0] if counts else 0

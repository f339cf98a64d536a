"""What graphs call for mixtures of experts: entries are a token's choices of an expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_entries", "count_keys", "grouped_linear"]


@torch.compiler.allow_in_graph
def count_keys(keys: Tensor, count: int) -> Tensor:
    """How many entries have each of the keys 0 … `count` - 1; others count nowhere.

    Shapes: keys, whole numbers from 0, [...] → LongTensor[count].
    """
    keys = keys.reshape(-1).long().clamp(max=count)
    return keys.new_zeros(count + 1).index_add(0, keys, torch.ones_like(keys))[:count]


def add_entries(length: int, rows: Tensor, entries: Tensor) -> Tensor:
    """The sum of each row's entries.

    Shapes: rows LongTensor[n], from 0 to `length` - 1; entries [n, ...] → [length, ...].
    """
    zeros = entries.new_zeros(length, *entries.shape[1:])
    return zeros.index_add(0, rows, entries)


@torch.library.custom_op("fxseek::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Linear layers, each on the next of `x`'s rows: as many as it has in `counts`.

    Shapes: x [rows, in]; weight [groups, out, in]; counts LongTensor[groups], whose sum is rows →
    [rows, out]. An operation of its own, since nothing but a run tells how many rows a group has.
    """
    parts = zip(x.split(counts.tolist()), weight, strict=True)
    return torch.cat([F.linear(part, own) for part, own in parts])


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("fxseek::grouped_outer", mutates_args=())
def _grouped_outer(slope: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """The gradient of `grouped_linear`'s weights, [groups, out, in]."""
    sizes = counts.tolist()
    parts = zip(slope.split(sizes), x.split(sizes), strict=True)
    return torch.stack([own.mT @ part for own, part in parts])


@_grouped_outer.register_fake
def _(slope: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], slope.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, counts = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, counts)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    to_x = None if weight is None else grouped_linear(slope, weight.mT, counts)
    to_weight = None if x is None else _grouped_outer(slope, x, counts)
    return to_x, to_weight, None


grouped_linear.register_autograd(_backward, setup_context=_setup)

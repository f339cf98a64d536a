"""What scores are made of: how much a token is attended to, how much the loss depends on it.

Pure tensor functions, under ``no_grad``, on any device and for any floating dtype. Nothing here
knows a model or a graph, and nothing waits for the device.

Sizes: batch, tokens, keys (tokens attended to), heads, width.

Source: TokenSeek (arXiv 2601.19739), section 3: ``I1(t_j) = sum_i A_ij`` (context), ``G = dL/dz``
at the input of the last block and ``I2(t_j) = sum_k |G_jk|`` (gradient).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxseek.ops.autocast import no_autocast
from fxseek.ops.masks import MaskRows
from fxseek.ops.sweep import few, slices_of

__all__ = ["accumulate_columns", "attention_column_sums", "gradient_magnitude", "wide"]

# Fewer query rows than this in a chunk make thin products: batch and heads are split first.
_FEWEST_ROWS = 64
# More rows than this gain nothing; with the causal flag a chunk reads keys that it needn't.
_MOST_ROWS = 128


@torch.no_grad()
def attention_column_sums(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | MaskRows | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_valid: Tensor | None = None,
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """How much attention every token receives, without building the tokens × keys map.

    ``I1_j = mean over heads of sum over valid i of softmax(scale · Q Kᵀ + mask)_ij``.

    Rows that may attend to nothing contribute 0: those where every entry is False, ``-inf``, or the
    most negative number of the mask's dtype. ``is_causal`` means what it means in
    ``scaled_dot_product_attention`` (query i attends to keys 0..i), and combines with ``mask``.

    Shapes: query [batch, heads, tokens, width]; key [batch, kv_heads, keys, width], kv_heads
    dividing heads (grouped query: head h reads key head ``h // (heads / kv_heads)``; keys are
    never repeated); mask broadcastable to [batch, heads, tokens, keys], bool (True = attend) or
    additive, or made by rows; query_valid Bool [batch, tokens]. Returns [batch, keys], float32, or
    float64 for float64 inputs.

    Units: ``chunk_bytes`` bounds what exists at once of the map, down to one row of one key head's
    group. Copies of size tokens × width in the accumulation dtype come on top.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key heads don't divide {heads} query heads")
    groups = heads // kv_heads
    dtype = wide(query)
    scale = 1.0 / math.sqrt(width) if scale is None else scale

    # Invalid queries may hold anything, NaN included: nothing of them must reach a product.
    if query_valid is not None:
        query = query.masked_fill(~query_valid[:, None, :, None], 0.0)
    query = (query.to(dtype) * scale).unflatten(1, (kv_heads, groups))
    transposed = key.to(dtype).transpose(-1, -2)
    whole = mask[(None,) * (4 - mask.dim())] if isinstance(mask, Tensor) else None
    masked_below = -math.inf  # the highest logit from which on a row counts as masked altogether
    if whole is not None and whole.is_floating_point():
        masked_below = max(torch.finfo(whole.dtype).min, torch.finfo(dtype).min) / 2

    entry_bytes = dtype.itemsize
    if mask is not None and (whole is None or whole.dtype == torch.bool):
        entry_bytes += 1
    sums = query.new_zeros(batch, keys)
    index = torch.arange(tokens, device=query.device)
    with no_autocast(query.device.type):
        for b, h, rows in _chunks(
            batch, kv_heads, groups, tokens, keys, chunk_bytes // entry_bytes, query
        ):
            reach = min(rows.stop, keys) if is_causal else keys
            part = query[b, h, :, rows]
            logits = part.flatten(2, 3) @ transposed[b, h, :, :reach]
            # [batch, heads, rows, reach], the same memory
            logits = logits.unflatten(2, part.shape[2:4]).flatten(1, 2)
            if isinstance(mask, MaskRows):
                given = mask.part(rows, query.device)
                _apply_mask(logits, given, b, h, groups, slice(None), reach)
            elif whole is not None:
                _apply_mask(logits, whole, b, h, groups, rows, reach)
            if is_causal:
                logits.masked_fill_(index[:reach] > index[rows, None], -math.inf)

            highest = logits.amax(-1, keepdim=True)
            exponentials = logits.sub_(highest.clamp_min(torch.finfo(dtype).min)).exp_()
            dead = highest <= masked_below
            if query_valid is not None:
                dead = dead | ~query_valid[b, None, rows, None]
            shares = (1.0 / exponentials.sum(-1, keepdim=True)).masked_fill_(dead, 0.0)
            # sum_i shares_i · exponentials_ij over heads and rows, as one product per batch row
            shares = shares.flatten(1).unsqueeze(1)
            sums[b, :reach] += (shares @ exponentials.flatten(1, 2)).squeeze(1)
            del logits, exponentials  # the next chunk's take their place
    return sums / heads


def _chunks(
    batch: int,
    kv_heads: int,
    groups: int,
    tokens: int,
    keys: int,
    entries: int,
    like: Tensor,
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of (batch, key heads, queries): at most ``entries`` of the map, or one row."""
    wanted = min(tokens, _FEWEST_ROWS)
    batch_step, head_step, row_step = batch, kv_heads, 0
    for batch_step, head_step in ((batch, kv_heads), (1, kv_heads), (1, 1)):
        row_step = entries // max(1, batch_step * head_step * groups * keys)
        if row_step >= wanted:
            break
    row_step = max(1, min(row_step, _MOST_ROWS))
    for b, _ in few(slices_of(batch, batch_step), like):
        for h, _ in few(slices_of(kv_heads, head_step), like):
            for rows, _ in few(slices_of(tokens, row_step), like):
                yield b, h, rows


def _apply_mask(
    logits: Tensor, mask: Tensor, b: slice, h: slice, groups: int, rows: slice, reach: int
) -> None:
    """By the part of a four-dimensional mask that a chunk reads; dimensions of 1 stay."""
    every = slice(None)
    mask = mask[
        every if mask.shape[0] == 1 else b,
        every if mask.shape[1] == 1 else slice(h.start * groups, h.stop * groups),
        every if mask.shape[2] == 1 else rows,
        every if mask.shape[3] == 1 else slice(reach),
    ]
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -math.inf)
    else:
        logits.add_(mask)


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def accumulate_columns(rows: Tensor, query_valid: Tensor) -> Tensor:
    """The context score of attention probabilities that exist already, or of some rows of them.

    Shapes: rows [batch, heads, some tokens, keys]; query_valid Bool [batch, some tokens], False
    for rows that count for nothing (they may hold NaN). Returns [batch, keys], float32 or
    float64: add up the results of all rows.
    """
    received = rows.sum(1, dtype=wide(rows)).masked_fill(~query_valid[:, :, None], 0.0)
    return received.sum(1) / rows.shape[1]


@torch.no_grad()
def gradient_magnitude(gradient: Tensor, norm: str = "l1") -> Tensor:
    """How much the loss depends on each token: ``I2_j``, the norm over the width.

    ``l1`` is the paper's ``sum_k |G_jk|``; ``l2`` the Euclidean norm; ``sum`` the signed sum of the
    paper's poster, which may be negative. A model may have several streams for a token
    (hyper-connections): all of them count.

    Shapes: gradient [batch, tokens, ..., width] -> [batch, tokens], float32 or float64.
    """
    dtype, gradient = wide(gradient), gradient.flatten(2)
    if norm == "sum":
        return gradient.sum(-1, dtype=dtype)
    order = {"l1": 1, "l2": 2}[norm]
    return torch.linalg.vector_norm(gradient, ord=order, dim=-1, dtype=dtype)

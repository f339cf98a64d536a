"""Scores of tokens: how much each one is attended to, how much the loss depends on it.

Pure tensor functions, under ``no_grad``, on any device and for any floating dtype. Nothing here
knows a model or a graph, and nothing waits for the device except where a docstring says so.

Sizes: batch, tokens, keys (tokens attended to), heads, width.

Source: TokenSeek (arXiv 2601.19739), section 3: ``I1(t_j) = sum_i A_ij`` (context), ``G = dL/dz``
at the input of the last block and ``I2(t_j) = sum_k |G_jk|`` (gradient), ``I = alpha log I1 +
beta minmax I2``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torch import few
from .errors import ScoreError
from .masks import MaskRows

__all__ = [
    "ScoreInputs",
    "accumulate_columns",
    "attention_column_sums",
    "check_scores",
    "combine",
    "gradient_magnitude",
    "mass",
    "random_scores",
    "step_generator",
]

# Fewer query rows than this in a chunk make thin products: batch and heads are split first.
_FEWEST_ROWS = 64
# More rows than this gain nothing; with the causal flag a chunk reads keys that it needn't.
_MOST_ROWS = 128


@dataclass(frozen=True)
class ScoreInputs:
    """What a caller's own score function is given. It returns one score per token, best highest.

    Shapes: ``input_ids`` [batch, tokens] (None where the model was given embeddings); ``valid``
    Bool [batch, tokens], False at padding; ``supervised`` Bool [batch, tokens], True where the
    prediction made at that position has a label; ``targets`` Long [batch, tokens], that label,
    already shifted; ``hidden`` [batch, tokens, width], the input of the last block, without grad.
    ``generator`` lives on the CPU and is seeded from the run's seed and ``step``.
    """

    input_ids: Tensor | None
    valid: Tensor
    supervised: Tensor | None
    targets: Tensor | None
    hidden: Tensor | None
    step: int
    generator: torch.Generator


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
    dtype = _accumulation_dtype(query)
    scale = 1.0 / math.sqrt(width) if scale is None else scale

    # Invalid queries may hold anything, NaN included: nothing of them must reach a product.
    if query_valid is not None:
        query = query.masked_fill(~query_valid[:, None, :, None], 0.0)
    query = (query.to(dtype) * scale).unflatten(1, (kv_heads, groups))
    transposed = key.to(dtype).transpose(-1, -2)
    whole = mask[(None,) * (4 - mask.dim())] if isinstance(mask, Tensor) else None
    masked_below = _masked_below(whole, dtype)

    entry_bytes = dtype.itemsize
    if mask is not None and (whole is None or whole.dtype == torch.bool):
        entry_bytes += 1
    sums = query.new_zeros(batch, keys)
    index = torch.arange(tokens, device=query.device)
    with _no_autocast(query.device.type):
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
                _apply_mask(logits, _mask_part(given, b, h, groups, slice(None), reach))
            elif whole is not None:
                _apply_mask(logits, _mask_part(whole, b, h, groups, rows, reach))
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
    like: Tensor | None = None,
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of (batch, key heads, queries): at most ``entries`` of the map, or one row."""
    wanted = min(tokens, _FEWEST_ROWS)
    batch_step, head_step, row_step = batch, kv_heads, 0
    for batch_step, head_step in ((batch, kv_heads), (1, kv_heads), (1, 1)):
        row_step = entries // max(1, batch_step * head_step * groups * keys)
        if row_step >= wanted:
            break
    row_step = max(1, min(row_step, _MOST_ROWS))
    for b in few(range(0, batch, batch_step), like):
        for h in few(range(0, kv_heads, head_step), like):
            for row in few(range(0, tokens, row_step), like):
                yield (
                    slice(b, min(b + batch_step, batch)),
                    slice(h, min(h + head_step, kv_heads)),
                    slice(row, min(row + row_step, tokens)),
                )


def _mask_part(mask: Tensor, b: slice, h: slice, groups: int, rows: slice, reach: int) -> Tensor:
    """The part of a four-dimensional mask that a chunk reads; dimensions of 1 stay as they are."""
    every = slice(None)
    return mask[
        every if mask.shape[0] == 1 else b,
        every if mask.shape[1] == 1 else slice(h.start * groups, h.stop * groups),
        every if mask.shape[2] == 1 else rows,
        every if mask.shape[3] == 1 else slice(reach),
    ]


def _apply_mask(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -math.inf)
    else:
        logits.add_(mask)


def _masked_below(mask: Tensor | None, dtype: torch.dtype) -> float:
    """The highest logit of a row from which on the row counts as masked altogether."""
    if mask is None or not mask.dtype.is_floating_point:
        return -math.inf
    return max(torch.finfo(mask.dtype).min, torch.finfo(dtype).min) / 2


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would run the products in half precision, whatever dtype they are given."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.no_grad()
def accumulate_columns(rows: Tensor, query_valid: Tensor | None = None) -> Tensor:
    """The context score of attention probabilities that exist already, or of some rows of them.

    Shapes: rows [batch, heads, some tokens, keys]; query_valid Bool [batch, some tokens], False
    for rows that count for nothing (they may hold NaN). Returns [batch, keys], float32 or
    float64: add up the results of all rows.
    """
    received = rows.sum(1, dtype=_accumulation_dtype(rows))
    if query_valid is not None:
        received = received.masked_fill(~query_valid[:, :, None], 0.0)
    return received.sum(1) / rows.shape[1]


@torch.no_grad()
def gradient_magnitude(gradient: Tensor, norm: str = "l1") -> Tensor:
    """How much the loss depends on each token: ``I2_j``, the norm over the width.

    ``l1`` is the paper's ``sum_k |G_jk|``; ``l2`` the Euclidean norm; ``sum`` the signed sum of the
    paper's poster, which may be negative.

    Shapes: gradient [batch, tokens, width] -> [batch, tokens], float32 or float64.
    """
    dtype = _accumulation_dtype(gradient)
    if norm == "sum":
        return gradient.sum(-1, dtype=dtype)
    if norm not in ("l1", "l2"):
        raise ValueError(f"the norm is {norm!r}; it must be 'l1', 'l2' or 'sum'")
    order = 1 if norm == "l1" else 2
    return torch.linalg.vector_norm(gradient, ord=order, dim=-1, dtype=dtype)


@torch.no_grad()
def combine(
    context: Tensor | None,
    gradient: Tensor | None,
    valid: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """``I = alpha · log(I1) + beta · minmax(I2)``, row by row over the valid tokens.

    Either part may be None; the other then counts by itself, and its factor, which can't change
    the order, is left out. ``minmax`` maps a row's valid values onto [0, 1]; a row whose values
    are all equal becomes 0. An ``I1`` of zero counts as the smallest normal number of its dtype.
    Invalid positions score ``-inf``, whatever they hold.

    Shapes: context, gradient, valid [batch, tokens] -> [batch, tokens], float32 or float64.
    """
    if context is not None and gradient is not None:
        total = alpha * _log(context) + beta * _minmax(gradient, valid)
    elif context is not None:
        total = _log(context)
    elif gradient is not None:
        total = _minmax(gradient, valid)
    else:
        raise ValueError("nothing to combine: both the context and the gradient are None")
    return total.masked_fill(~valid, -math.inf)


def _log(values: Tensor) -> Tensor:
    dtype = _accumulation_dtype(values)
    return values.to(dtype).clamp_min(torch.finfo(dtype).tiny).log()


def _minmax(values: Tensor, valid: Tensor) -> Tensor:
    values = values.to(_accumulation_dtype(values))
    lowest = values.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
    highest = values.masked_fill(~valid, -math.inf).amax(-1, keepdim=True)
    span = highest - lowest
    return ((values - lowest) / span).masked_fill(span <= 0, 0.0)


@torch.no_grad()
def mass(
    context: Tensor | None, gradient: Tensor | None, scores: Tensor | None, valid: Tensor
) -> Tensor:
    """What ``select="sample"`` draws by, and what a ratio such as ``"mass:0.9"`` adds up.

    Nonnegative, and never less where the score is better.

    With context and gradient it is ``exp(I - max I)`` of the combined ``scores``; with one of
    them it is that one itself (negative values of the signed gradient sum count as 0); with
    neither, the caller's own ``scores``, where ``-inf`` counts as 0. Invalid positions have mass
    0.

    Only the last case waits for the device, to refuse negative scores.

    Shapes: all [batch, tokens] -> [batch, tokens], float32 or float64.

    Raises:
        ScoreError: the caller's own scores are negative. Return nonnegative ones (``exp`` keeps
        their
            order), or use ``select="topk"`` and a number as ratio.
    """
    if context is not None and gradient is not None:
        if scores is None:
            raise ValueError("with a context and a gradient the mass is made of their scores")
        scores = scores.to(_accumulation_dtype(scores)).masked_fill(~valid, -math.inf)
        highest = scores.amax(-1, keepdim=True)
        drawn_by = (scores - highest.clamp_min(torch.finfo(scores.dtype).min)).exp()
    elif context is not None or gradient is not None:
        part = context if context is not None else gradient
        assert part is not None
        drawn_by = part.to(_accumulation_dtype(part)).clamp_min(0.0)
    elif scores is not None:
        drawn_by = scores.to(_accumulation_dtype(scores))
        drawn_by = drawn_by.masked_fill(drawn_by == -math.inf, 0.0)
        negative = (drawn_by < 0) & valid
        if bool(negative.any()):
            row, token = negative.nonzero()[0].tolist()
            raise ScoreError(
                f"select='sample' and ratio='mass:...' weigh tokens by their scores, so they can't "
                f"be negative: {int(negative.sum())} of {int(valid.sum())} are, the first "
                f"{float(drawn_by[row, token]):.6g} at row {row}, token {token}. Return "
                f"nonnegative scores (scores.exp() keeps their order), or use select='topk' "
                f"and a number as ratio, such as 0.1."
            )
    else:
        raise ValueError("no scores to make a mass of")
    return drawn_by.masked_fill(~valid, 0.0)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator of its own for one step: the same for the same (seed, step, stream) always.

    Streams are unrelated draws of one step: 0 is for selecting and callers, 1 for random scores.
    """
    # Torch's CPU generator reads 32 bits of its seed: hashing keeps (0, 1) and (1, 0) apart.
    digest = hashlib.blake2b(f"{seed},{step},{stream}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def random_scores(
    shape: tuple[int, ...] | torch.Size,
    *,
    seed: int = 0,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform scores in [0, 1) (TokenTune's), float32: a function of ``seed`` and ``step`` alone.

    The global generators are neither read nor moved, and every device gets the same numbers.
    """
    scores = torch.rand(shape, generator=step_generator(seed, step, stream=1))
    return scores.to(device, non_blocking=True)


@torch.no_grad()
def check_scores(scores: object, batch: int, tokens: int, *, valid: Tensor | None = None) -> Tensor:
    """A score function's result as [batch, tokens] float32 or float64, or what is wrong with it.

    Integers and booleans are converted. ``-inf`` means "keep anything else first"; NaN and ``+inf``
    are refused. With ``valid`` only valid positions are judged, the others become ``-inf``.

    Waits for the device once.

    Raises:
        ScoreError: not a tensor, not real numbers, another shape, NaN or ``+inf``.
    """
    if not isinstance(scores, Tensor):
        raise ScoreError(
            f"the score function returned {type(scores).__name__}; expected a float tensor of "
            f"shape [batch, tokens] = [{batch}, {tokens}]. Return one score per token as a "
            f"torch.Tensor."
        )
    if scores.is_complex():
        raise ScoreError(
            f"the score function returned {scores.dtype}; complex scores have no order. Return "
            f"real ones, such as scores.abs()."
        )
    if tuple(scores.shape) != (batch, tokens):
        raise ScoreError(
            f"the score function returned shape {list(scores.shape)}; expected [batch, tokens] = "
            f"[{batch}, {tokens}]. {_shape_remedy(tuple(scores.shape), batch, tokens)}"
        )
    scores = scores.detach().to(_accumulation_dtype(scores))
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    wrong = scores.isnan() | (scores == math.inf)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ScoreError(
            f"{int(scores.isnan().sum())} of {batch * tokens} scores are NaN and "
            f"{int((scores == math.inf).sum())} are +inf, the first at row {row}, token {token}. "
            f"Scores must be finite, or -inf for tokens to keep last. Look for overflow in half "
            f"precision, log or division of zero, and NaN in the model's weights."
        )
    return scores


def _shape_remedy(shape: tuple[int, ...], batch: int, tokens: int) -> str:
    if shape[:2] == (batch, tokens):
        return "Reduce the trailing dimensions, for example with .sum(-1)."
    if shape == (tokens, batch):
        return "Transpose it with .mT."
    if shape == (tokens,):
        return "Give every row its scores, for example with .expand(batch, -1)."
    if shape == (batch, tokens - 1):
        return (
            "The targets in ScoreInputs are shifted already and as long as the input: don't shift "
            "again."
        )
    return "Return one score per token of the input, padding included."

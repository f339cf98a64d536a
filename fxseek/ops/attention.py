"""Attention of some tokens or all.

Shapes: `kept` is LongTensor[batch or 1, rows], query positions; rows of a mask are
Bool[batch or 1, heads or 1, rows, keys].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention, flash_sdp_enabled
from torch.utils.checkpoint import checkpoint

from fxseek import _torch
from fxseek.ops import masks
from fxseek.ops.aligned import attend_aligned, fold, unfold
from fxseek.ops.masks import MaskRows
from fxseek.ops.sweep import Cat, slices_of, sweep

__all__ = [
    "CausalRows",
    "aligns_on_cpu",
    "aligns_on_cuda",
    "attend",
    "attend_all",
    "attend_folded",
    "attend_in_chunks",
    "attend_last",
    "attend_rows",
    "kernel",
    "shared_mask",
]


class CausalRows(NamedTuple):
    """The rows of the causal mask at positions `kept`.

    `consecutive`: these positions where they are consecutive, and the same in all rows; `whole`:
    the mask where it is one of the model's, and not a flag.
    """

    kept: Tensor
    consecutive: range | None
    whole: MaskRows | None = None

    @property
    def may_be_flag(self) -> bool:
        """Whether an attention may need no mask."""
        at = self.consecutive
        return at is not None and (at.start == 0 or self.kept.device.type in _aligned)

    def made(self, keys: int) -> Tensor | MaskRows:
        """The rows for so many keys: Bool[batch or 1, heads or 1, rows, keys]; large ones later."""

        def make(kept: Tensor) -> Tensor:
            return kept[:, None, :, None] >= torch.arange(keys, device=kept.device)

        kept = self.kept if self.consecutive is None else self.kept[:1]
        mask = self.whole or MaskRows(make, (), square=False)
        return mask if mask.large(kept) else mask.rows(kept)

    def is_flag(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool
    ) -> bool:
        """Whether an attention needs no mask.

        Given the keys up to the last query only, that of the first tokens needs torch's causal flag
        alone; that of others a kernel that aligns the flag with the last key.
        """
        if self.consecutive is None or key.shape[-2] < self.consecutive.stop:
            return False
        first = self.consecutive.start == 0
        return first or _takes_flag(query, key, value, dropout_p, enable_gqa)


Aligns = Callable[[Tensor, Tensor, Tensor, float], bool]
"""Whether a kernel takes query, key, value and dropout, and aligns a flag with the last key."""


def aligns_on_cuda(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Whether flash attention or cuDNN is taken."""
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and width % 8 == 0 and width == value.shape[-1] and width <= 256


def aligns_on_cpu(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Whether the fused kernel takes two blocks of keys.

    Its operator checks none of this, and is not one of those that autocast knows.
    """
    operands = (query, key, value)
    return (
        not dropout_p
        and flash_sdp_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(x.dim() == 4 and x.stride(-1) == 1 and x.dtype == query.dtype for x in operands)
        and len({x.shape[0] for x in operands}) == len({x.shape[-1] for x in operands}) == 1
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[1] % key.shape[1] == 0
    )


_attend: Callable[..., Tensor] | None = None
_grouped: tuple[str, ...] = ("cpu",)
_aligned: dict[str, Aligns] = {"cuda": aligns_on_cuda, "cpu": aligns_on_cpu}


@contextlib.contextmanager
def kernel(
    attend: Callable[..., Tensor], grouped: tuple[str, ...], aligned: dict[str, Aligns]
) -> Iterator[None]:
    """Attention by another function meanwhile, for tensors that stand for those of a device.

    `grouped`: devices with a fused kernel for a mask together with grouped heads; `aligned`: those
    with one that aligns a causal flag with the last key, and for what.
    """
    global _attend, _grouped, _aligned
    before = _attend, _grouped, _aligned
    _attend, _grouped, _aligned = attend, (*_grouped, *grouped), {**_aligned, **aligned}
    try:
        yield
    finally:
        _attend, _grouped, _aligned = before


def _takes_flag(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool
) -> bool:
    """Whether a kernel aligns a causal flag with the last key, and is taken for such operands."""
    aligns = _aligned.get(query.device.type)
    if aligns is None or not aligns(query, key, value, dropout_p):
        return False
    return not query.is_cuda or can_use_flash_attention(
        SDPAParams(query, key, value, None, dropout_p, False, enable_gqa)
    )


def _stand_in(query: Tensor) -> Callable[..., Tensor] | None:
    """The `kernel` in force, for a tensor without values."""
    return None if _attend is None or _torch.has_values(query) else _attend


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` as it is at each call, or the `kernel` in its place."""
    return (_stand_in(query) or F.scaled_dot_product_attention)(query, key, value, **options)


def attend_last(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Causal attention whose last query has the last key's position."""
    if _stand_in(query) or query.shape[-2] == key.shape[-2]:
        return attend(query, key, value, is_causal=True, **options)
    return attend_aligned(query, key, value, options["dropout_p"], options["scale"])


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | MaskRows,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention` of all tokens under a mask.

    A mask that is causal becomes the flag; any other is made and used on chunks of queries, in
    backward anew.
    """
    if isinstance(attn_mask, Tensor):
        attn_mask = MaskRows.of(attn_mask)
    if attn_mask.causal(query.device):
        return attend(query, key, value, **{**options, "is_causal": True})
    at = torch.arange(query.shape[-2], device=query.device)[None]
    return attend_in_chunks(attend, query, key, value, at, attn_mask, **options)


def attend_in_chunks(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    mask: MaskRows,
    **options: Any,
) -> Tensor:
    """`attention` with queries at positions `kept` and its `attn_mask` on chunks of them.

    The mask of a chunk is made for it, and in backward anew, with the attention.
    """
    count = kept.shape[1]
    most = max(1, masks.CHUNK_BYTES // (4 * key.shape[-2] * max(1, query.shape[0])))

    def part(query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        rows = _cut_to(mask.rows(kept), key)
        return attention(query, key, value, attn_mask=rows, **options)

    if count <= most:
        return part(query, key, value, kept)

    def run(chunk: slice) -> tuple[Tensor]:
        given = (query[..., chunk, :], key, value, kept[:, chunk])
        if torch.is_grad_enabled():
            return (checkpoint(part, *given, use_reentrant=False),)
        return (part(*given),)

    (found,) = sweep(slices_of(count, most), run, (Cat(-2),), query)
    return found


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    mask: Tensor | MaskRows | CausalRows | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    batch_dim: int | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` of selected queries over all keys.

    Shapes: query [..., kept, width]; key, value [..., keys, width]; mask broadcastable to
    [..., kept, keys], or made by rows, on chunks of queries. The causal flag becomes the kept rows
    of the causal mask (aligned at the top left, as torch's own flag is). Of consecutive queries
    these become the flag again, where a kernel takes it for them.
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    if isinstance(mask, CausalRows):
        if mask.consecutive and mask.is_flag(query, key, value, dropout_p, enable_gqa):
            end = mask.consecutive.stop
            key, value = (x if x.shape[-2] == end else x[..., :end, :] for x in (key, value))
            return attend_last(query, key, value, **options)
        mask = mask.made(key.shape[-2])
    if is_causal:
        causal = kept.unsqueeze(-1) >= torch.arange(key.shape[-2], device=key.device)
        if batch_dim is None:
            mask = causal[0]
        else:
            shape = [1] * query.dim()
            shape[batch_dim] = causal.shape[0]
            mask = causal.view(*shape[:-2], *causal.shape[-2:])
    attention: Callable[..., Tensor] = attend
    if mask is not None and _folds(query, enable_gqa):
        attention = attend_folded
        del options["enable_gqa"]
    if isinstance(mask, MaskRows):
        return attend_in_chunks(attention, query, key, value, kept, mask, **options)
    if mask is not None:
        mask = _cut_to(mask, key)
        if mask.dtype not in (torch.bool, query.dtype):
            mask = mask.to(query.dtype)  # shared by layers of other precision
    return attention(query, key, value, attn_mask=mask, **options)


def _cut_to(mask: Tensor, key: Tensor) -> Tensor:
    """A mask [..., keys or more] for as many keys as there are."""
    keys = key.shape[-2]
    return mask[..., :keys] if mask.shape[-1] > keys else mask


def _folds(query: Tensor, enable_gqa: bool) -> bool:
    """Whether grouped heads become further queries.

    Of the fused kernels only the CPU's takes a mask and grouped heads; elsewhere keys and values
    would be repeated, and a map of kept × keys made for each head.
    """
    return enable_gqa and query.dim() == 4 and query.device.type not in _grouped


def shared_mask(
    mask: Tensor | MaskRows | CausalRows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor | MaskRows | CausalRows:
    """A boolean mask as the kernels of all layers want it.

    They make an additive one of their own in each call, and autograd keeps every one of them. Each
    makes its own of one by rows.
    """
    if isinstance(mask, CausalRows):
        if mask.is_flag(query, key, value, dropout_p, enable_gqa):
            return mask
        mask = mask.made(key.shape[-2])
    if isinstance(mask, MaskRows):
        return mask
    mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return _folded(mask, query, key.shape[1]) if _folds(query, enable_gqa) else mask


def _folded(mask: Tensor, query: Tensor, kv_heads: int) -> Tensor:
    """A mask for queries of which each key head has its whole group."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(-1, -1, query.shape[2], -1)
    if mask.shape[1] == 1:
        groups = query.shape[1] // kv_heads
        return mask.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)
    return fold(mask, kv_heads)


def attend_folded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
) -> Tensor:
    """Grouped-query attention whose groups are further queries of their key head.

    Shapes: query [batch, heads, kept, width]; key, value [batch, kv_heads, keys, width]; attn_mask
    broadcastable to [batch, heads, kept, keys], or folded already → [batch, heads, kept, width].
    """
    (heads, kept), kv_heads = query.shape[1:3], key.shape[1]
    groups = heads // kv_heads
    if attn_mask.dim() < 4 or attn_mask.shape[2] != groups * kept:
        attn_mask = _folded(attn_mask, query, kv_heads)
    found = attend(fold(query, kv_heads), key, value, attn_mask=attn_mask, **options)
    return unfold(found, groups)

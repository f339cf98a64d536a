"""Causal attention of a row's last queries on CUDA, under a flag aligned with the last key.

`scaled_dot_product_attention` aligns its flag with the first key. Flash attention's own operator
aligns it with the last. Torch's operator for cuDNN, which is faster where torch prefers it, does
not; but keys before those of the queries need no flag at all. So the queries attend to these keys
and to their own apart, and the results are merged by their log-sum-exp. Backward gives each block
of keys the merged result and the merged log-sum-exp, as ring attention does (arXiv 2310.01889).

Shapes: query [batch, heads, rows, width]; key and value [batch, kv_heads, rows or more, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxseek import _torch

__all__ = ["attend_aligned", "attend_in_blocks"]


def attend_aligned(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
) -> Tensor:
    """By cuDNN where torch takes it for such operands, else by flash."""
    if not dropout_p and all(
        _torch.takes_cudnn(query, block.key, block.value, block.causal)
        for block in _blocks(query, key, value)
    ):
        return attend_in_blocks(query, key, value, scale)
    # `causal_lower_right`, which leads to this operator, is a tensor subclass that cannot be made
    # under a `TorchDispatchMode`.
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, True, scale=scale
    )[0]


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """By cuDNN, which is given the keys before those of the queries, and these."""
    return _InBlocks.apply(query, key, value, scale)  # type: ignore[return-value]


class _Block(NamedTuple):
    """Some keys; `causal`: the queries read those up to their own alone."""

    key: Tensor
    value: Tensor
    causal: bool


def _blocks(query: Tensor, key: Tensor, value: Tensor) -> tuple[_Block, _Block]:
    own = query.shape[-2]
    sizes = [key.shape[-2] - own, own]
    (keys, own_keys), (values, own_values) = key.split(sizes, -2), value.split(sizes, -2)
    return _Block(keys, values, False), _Block(own_keys, own_values, True)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        before, own = (_attend(query, block, scale) for block in _blocks(query, key, value))
        (out, logs), (own_out, own_logs) = before[:2], own[:2]
        share = torch.sigmoid(own_logs - logs).view(*query.shape[:-1], 1)
        out = torch.lerp(out.to(share), own_out.to(share), share).to(query.dtype)
        logs = torch.logaddexp(logs, own_logs)
        ctx.save_for_backward(query, key, value, out, logs, *own[2:])
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *merged = ctx.saved_tensors
        before, own = (
            _slopes(slope, query, block, merged, ctx.scale) for block in _blocks(query, key, value)
        )
        keys, values = (torch.cat(both, -2) for both in zip(before[1:], own[1:], strict=True))
        return before[0] + own[0], keys, values, None


def _attend(query: Tensor, block: _Block, scale: float | None) -> list[Tensor]:
    """The result, its log-sum-exp, and the state of a generator that has drawn nothing."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, block.key, block.value, None, True, 0.0, block.causal, scale=scale
    )
    return [found[0], found[1], found[6], found[7]]


def _slopes(
    slope: Tensor, query: Tensor, block: _Block, merged: Sequence[Tensor], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values by what a block has in the merged result."""
    rows, keys = query.shape[-2], block.key.shape[-2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        slope, query, block.key, block.value, *merged, None, None, None, rows, keys, 0.0,
        block.causal, scale=scale,
    )  # fmt: skip

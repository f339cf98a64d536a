"""Causal attention of a row's last queries, under a flag aligned with the last key.

`scaled_dot_product_attention` aligns its flag with the first key. Flash attention's own operator on
CUDA aligns it with the last. Neither cuDNN's, which is faster where torch prefers it, nor the CPU's
does; but keys before those of the queries need no flag at all. So the queries attend to these keys
and to their own apart, and the results are merged by their log-sum-exp. Backward gives each block
of keys the merged result and the merged log-sum-exp, as ring attention does (arXiv 2310.01889).

Shapes: query [batch, heads, rows, width]; key and value [batch, kv_heads, rows or more, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.ops.once import once_in_parts

__all__ = [
    "CUDNN",
    "ON_CPU",
    "BlockKernels",
    "attend_aligned",
    "attend_in_blocks",
    "fold",
    "unfold",
]


def attend_aligned(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
) -> Tensor:
    """On CUDA by cuDNN where torch takes it for such operands, else by flash."""
    if query.device.type == "cpu":
        assert not dropout_p  # which the kernel does not have
        return attend_in_blocks(query, key, value, scale, ON_CPU)
    if not dropout_p and all(
        _torch.takes_cudnn(query, block.key, block.value, block.causal)
        for block in _blocks(query, key, value)
    ):
        return attend_in_blocks(query, key, value, scale, CUDNN)
    # `causal_lower_right`, which leads to this operator, is a tensor subclass that cannot be made
    # under a `TorchDispatchMode`.
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, True, scale=scale
    )[0]


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, kernels: BlockKernels
) -> Tensor:
    """By kernels that are given the keys before those of the queries, and these."""
    return _InBlocks.apply(query, key, value, scale, kernels)  # type: ignore[return-value]


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


class BlockKernels(NamedTuple):
    """Attention to a block of keys.

    `attend`: the result, its log-sum-exp, and what else `slopes` takes; `slopes`: the gradients of
    queries, keys and values by what a block has in the merged result.
    """

    attend: Callable[[Tensor, _Block, float | None], list[Tensor]]
    slopes: Callable[
        [Tensor, Tensor, _Block, Sequence[Tensor], float | None], tuple[Tensor, Tensor, Tensor]
    ]


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        kernels: BlockKernels,
    ) -> Tensor:
        before, own = (kernels.attend(query, x, scale) for x in _blocks(query, key, value))
        (out, logs), (own_out, own_logs) = before[:2], own[:2]
        share = torch.sigmoid(own_logs - logs).view(*query.shape[:-1], 1)
        out = torch.lerp(out.to(share), own_out.to(share), share).to(query.dtype)
        logs = torch.logaddexp(logs, own_logs)
        ctx.save_for_backward(query, key, value, out, logs, *own[2:])
        ctx.scale, ctx.kernels = scale, kernels
        return out

    @staticmethod
    @once_in_parts
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *merged = ctx.saved_tensors
        before, own = (
            ctx.kernels.slopes(slope, query, block, merged, ctx.scale)
            for block in _blocks(query, key, value)
        )
        keys, values = (torch.cat(both, -2) for both in zip(before[1:], own[1:], strict=True))
        return before[0] + own[0], keys, values, None, None


def _attend_cudnn(query: Tensor, block: _Block, scale: float | None) -> list[Tensor]:
    """The result, its log-sum-exp, and the state of a generator that has drawn nothing."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, block.key, block.value, None, True, 0.0, block.causal, scale=scale
    )
    return [found[0], found[1], found[6], found[7]]


def _slopes_cudnn(
    slope: Tensor, query: Tensor, block: _Block, merged: Sequence[Tensor], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = query.shape[-2], block.key.shape[-2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        slope, query, block.key, block.value, *merged, None, None, None, rows, keys, 0.0,
        block.causal, scale=scale,
    )  # fmt: skip


CUDNN = BlockKernels(_attend_cudnn, _slopes_cudnn)


def _attend_on_cpu(query: Tensor, block: _Block, scale: float | None) -> list[Tensor]:
    """Without a flag, a group's queries become further queries of their key head."""
    kv_heads, groups = block.key.shape[1], query.shape[1] // block.key.shape[1]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if block.causal:
        key, value = (x.repeat_interleave(groups, 1) for x in block[:2])
        return list(attend(query, key, value, 0.0, True, scale=scale))
    found = attend(fold(query, kv_heads), block.key, block.value, 0.0, False, scale=scale)
    return [unfold(x, groups) for x in found]


def _slopes_on_cpu(
    slope: Tensor, query: Tensor, block: _Block, merged: Sequence[Tensor], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, groups = block.key.shape[1], query.shape[1] // block.key.shape[1]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if block.causal:
        key, value = (x.repeat_interleave(groups, 1) for x in block[:2])
        queries, *rest = backward(slope, query, key, value, *merged, 0.0, True, scale=scale)
        keys, values = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in rest)
        return queries, keys, values
    slope, query, out, logs = (fold(x, kv_heads) for x in (slope, query, *merged))
    queries, keys, values = backward(
        slope, query, block.key, block.value, out, logs, 0.0, False, scale=scale
    )
    return unfold(queries, groups), keys, values


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, rows, ...] → [batch, kv_heads, heads / kv_heads · rows, ...]."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def unfold(x: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, groups · rows, ...] → [batch, kv_heads · groups, rows, ...]."""
    return x.unflatten(2, (groups, -1)).flatten(1, 2)


ON_CPU = BlockKernels(_attend_on_cpu, _slopes_on_cpu)

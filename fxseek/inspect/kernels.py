"""The attention kernels of devices on tensors without memory, and what they allocate inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from fxseek import _torch
from fxseek.ops.aligned import CUDNN, ON_CPU, attend_in_blocks
from fxseek.ops.attention import aligns_on_cpu

__all__ = ["WORKSPACES", "Kernels"]


def _flash_workspace(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """The float32 gradient of the queries; and those of keys and values for each query head."""
    repeated = 0 if query.shape[1] == key.shape[1] else 2 * key[:, :1].numel() * query.shape[1]
    return 4 * query.numel() + repeated * query.element_size()


def _efficient_workspace(grad: Tensor, query: Tensor, *_: Any) -> int:
    """The float32 gradient of the queries."""
    return 0 if query.dtype is torch.float32 else 4 * query.numel()


WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_workspace,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_workspace,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default: _efficient_workspace,
}
"""Bytes that kernels allocate inside, where they are not small beside their operands."""


class Kernels(TorchFunctionMode):
    """`scaled_dot_product_attention` by the kernel that a device takes, on meta tensors.

    Torch itself would choose the plain one for the meta device, with a map of tokens × tokens.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.attend = {"cuda": _attend_cuda, "hopper": _attend_hopper, "cpu": _attend_cpu}[device]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is Tensor.backward:
            with _replacing_attention(self.attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _replacing_attention(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Torch's function is another one meanwhile, for blocks that a model checkpoints itself.

    They run again in backward, where torch switches function modes off.
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _attend_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash without a mask in half precision, else the memory-efficient kernel where it can.

    Flash wants values as wide as keys.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    plain = query.dim() == 4 and query.dtype is not torch.float64
    even = query.shape[-1] == value.shape[-1]
    if plain and half and even and attn_mask is None and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if plain and not grouped:
        mask = _additive(attn_mask, query)
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, _needs_grad(query, key, value), dropout_p, is_causal,
            scale=scale,
        )[0]  # fmt: skip
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attend_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Half precision by cuDNN: with a mask, and with keys and values for groups of heads.

    A causal flag for more keys than queries is aligned with the last key (`attend_aligned`).
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    aligned = is_causal and query.shape[-2] < key.shape[-2]
    fits = query.dim() == 4 and half and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    if fits and aligned and not dropout_p:
        return attend_in_blocks(query, key, value, scale, CUDNN)
    if not fits or aligned:
        return _attend_cuda(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    mask = _additive(attn_mask, query)
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, _needs_grad(query, key, value), dropout_p, is_causal, scale=scale
    )[0]


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Whichever kernel torch takes for such tensors on the CPU."""
    aligned = is_causal and query.shape[-2] < key.shape[-2]
    if aligned and aligns_on_cpu(query, key, value, dropout_p):
        return attend_in_blocks(query, key, value, scale, ON_CPU)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    chosen = _torch.sdpa_backend(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
    )
    if chosen == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=_additive(attn_mask, query),
            scale=scale,
        )[0]  # fmt: skip
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )[0]


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as the fused kernels want it; torch makes one in each call."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned(mask: Tensor) -> Tensor:
    """A mask whose rows begin at multiples of 16 elements, as the kernel wants them."""
    keys = mask.shape[-1]
    if keys % 16 == 0:
        return mask
    return torch.nn.functional.pad(mask, (0, 16 - keys % 16))[..., :keys]

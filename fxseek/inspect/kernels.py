"""The attention kernels of devices on tensors without memory, and what they allocate inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class _Call(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def half(self) -> bool:
        return self.query.dtype in (torch.float16, torch.bfloat16)

    @property
    def aligned(self) -> bool:
        """Whether a causal flag is for more keys than queries."""
        return self.is_causal and self.query.shape[-2] < self.key.shape[-2]

    @property
    def needs_grad(self) -> bool:
        operands = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(x.requires_grad for x in operands)

    def additive(self) -> Tensor | None:
        """The mask, a boolean one as the fused kernels want it; torch makes one in each call."""
        mask = self.attn_mask
        if mask is None or mask.dtype is not torch.bool:
            return mask
        zeros = torch.zeros_like(mask, dtype=self.query.dtype)
        return zeros.masked_fill_(mask.logical_not(), -torch.inf)


class Kernels(TorchFunctionMode):
    """`scaled_dot_product_attention` by the kernel that a device takes, on meta tensors.

    Torch itself would choose the plain one for the meta device, with a map of tokens × tokens.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        attend = {"cuda": _attend_cuda, "hopper": _attend_hopper, "cpu": _attend_cpu}[device]
        self.attend = lambda *args, **kwargs: attend(_Call(*args, **kwargs))

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


def _attend_cuda(call: _Call) -> Tensor:
    """Flash without a mask in half precision, else the memory-efficient kernel where it can.

    Flash wants values as wide as keys.
    """
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    plain = query.dim() == 4 and query.dtype is not torch.float64
    even = query.shape[-1] == value.shape[-1]
    if plain and call.half and even and attn_mask is None and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if plain and not grouped:
        mask = call.additive()
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, call.needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attend_hopper(call: _Call) -> Tensor:
    """Half precision by cuDNN: with a mask, and with keys and values for groups of heads.

    A causal flag for more keys than queries is aligned with the last key (`attend_aligned`).
    """
    query, key, value, _, dropout_p, is_causal, scale, _ = call
    width = query.shape[-1]
    fits = query.dim() == 4 and call.half and width <= 256 and width % 8 == 0
    if fits and call.aligned and not dropout_p:
        return attend_in_blocks(query, key, value, scale, CUDNN)
    if not fits or call.aligned:
        return _attend_cuda(call)
    mask = call.additive()
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, call.needs_grad, dropout_p, is_causal, scale=scale
    )[0]


def _attend_cpu(call: _Call) -> Tensor:
    """Whichever kernel torch takes for such tensors on the CPU."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    if call.aligned and aligns_on_cpu(query, key, value, dropout_p):
        return attend_in_blocks(query, key, value, scale, ON_CPU)
    if _torch.sdpa_backend(**call._asdict()) == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=call.additive(), scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _aligned(mask: Tensor) -> Tensor:
    """A mask whose rows begin at multiples of 16 elements, as the kernel wants them."""
    keys = mask.shape[-1]
    if keys % 16 == 0:
        return mask
    return torch.nn.functional.pad(mask, (0, 16 - keys % 16))[..., :keys]

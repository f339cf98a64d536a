"""Causal attention of a row's last queries, merged of two blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxseek.ops import aligned
from fxseek.ops.aligned import BlockKernels

SHAPES = (2, 6, 5, 8), (2, 2, 13, 8), (2, 2, 13, 8)


def operands(
    device: str = "cpu", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    query, key, value = (x.to(device, dtype).requires_grad_() for x in made)
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    """Attention spelled out under a flag that the first key is aligned with, and log-sum-exps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    products = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(products.shape[-2:], dtype=torch.bool).triu(1)
        products = products.masked_fill(hidden, -torch.inf)
    return products.softmax(-1) @ value, products.logsumexp(-1)


def wanted(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    rows, keys = query.shape[-2], key.shape[-2]
    mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def spelled() -> BlockKernels:
    """Such kernels, spelled out."""

    def attend(query: Tensor, block: Any, scale: float | None) -> list[Tensor]:
        out, logs = plain(query, block.key, block.value, block.causal, scale)
        return [out, logs.unsqueeze(-1), torch.zeros(()), torch.zeros(())]

    def slopes(
        slope: Tensor, query: Tensor, block: Any, merged: Sequence[Tensor], scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As such kernels do it, from the merged result `out` and log-sum-exp `logs`."""
        out, logs = merged[:2]
        kv_heads, groups = block.key.shape[1], query.shape[1] // block.key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (block.key, block.value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        share = (query @ key.mT * factor - logs).exp()
        if block.causal:
            share = share.tril()
        products = share * (slope @ value.mT - (slope * out).sum(-1, keepdim=True)) * factor
        of_keys, of_values = products.mT @ query, share.mT @ slope
        keys, values = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in (of_keys, of_values))
        return products @ key, keys, values

    return BlockKernels(attend, slopes)


KERNELS = {"spelled": spelled(), "cpu": aligned.ON_CPU}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocks_are_merged(scale: float | None, kernels: str):
    given = operands()
    pairs = aligned.attend_in_blocks(*given, scale, KERNELS[kernels]), wanted(*given, scale)
    torch.testing.assert_close(*pairs, rtol=1e-13, atol=1e-13)
    slope = torch.randn_like(pairs[0])
    found = (torch.autograd.grad(x, given, slope) for x in pairs)
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_block_may_outweigh_the_other(kernels: str):
    """Log-sum-exps far apart merge without overflow."""
    query, key, value = operands()
    with torch.no_grad():
        key[:, :, :8] *= 400
    given = query, key, value
    pairs = aligned.attend_in_blocks(*given, None, KERNELS[kernels]), wanted(*given, None)
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad(x.square().sum(), given) for x in pairs]
    assert all(bool(x.isfinite().all()) for x in found[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_less_precision_on_the_cpu(dtype: torch.dtype):
    given, exact = operands(dtype=dtype), operands()
    out, right = aligned.attend_aligned(*given, 0.0, None), wanted(*exact, None)
    slope = torch.randn_like(right)
    found = [out.detach(), *torch.autograd.grad(out, given, slope.to(dtype))]
    exactly = [right.detach(), *torch.autograd.grad(right, exact, slope)]
    for x, y in zip(found, exactly, strict=True):
        assert x.dtype == dtype
        assert float((x - y).norm() / y.norm()) < (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, blocks: bool, monkeypatch: pytest.MonkeyPatch):
    """Results and gradients are as near to float64's as half precision gets."""
    monkeypatch.setattr("fxseek._torch.takes_cudnn", lambda *_: blocks)
    given, exact = operands("cuda", dtype), operands("cuda")
    out, right = aligned.attend_aligned(*given, 0.0, None), wanted(*exact, None)
    slope = torch.randn_like(right)
    found = [out.detach(), *torch.autograd.grad(out, given, slope.to(dtype))]
    exactly = [right.detach(), *torch.autograd.grad(right, exact, slope)]
    for x, y in zip(found, exactly, strict=True):
        assert float((x - y).norm() / y.norm()) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_chosen_kernel_is_respected():
    query, key, value = (x.detach() for x in operands("cuda", torch.bfloat16))
    kernels = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(kernels.FLASH_ATTENTION):
        found = aligned.attend_aligned(query, key, value, 0.0, None)
    raw = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    assert torch.equal(found, raw)

"""Linear layers with low-rank adapters, where nothing but their result is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_merged"]


def linear_merged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[tuple[Tensor, Tensor, float], ...],
) -> Tensor:
    """``linear(x, weight, bias)``, plus ``scale * linear(linear(x, down), up)`` of each adapter.

    The adapters are added to a copy of the weight where that is no larger than what one of them
    would make for the tokens, and so cheaper than to read and write these.

    Shapes: x [..., in]; weight [out, in]; down [rank, in]; up [out, rank] → [..., out].

    Source: the merge of LoRA, arXiv 2106.09685, section 4.1.
    """
    if x.numel() < x.shape[-1] * x.shape[-1]:
        out = F.linear(x, weight, bias)
        for down, up, scale in adapters:
            out = out + scale * F.linear(F.linear(x, down), up)
        return out
    for down, up, scale in adapters:
        weight = torch.addmm(weight, up, down, alpha=scale)
    return F.linear(x, weight, bias)

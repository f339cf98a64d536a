"""Hypothesis strategies: small decoders, batches for them, and selections of positions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from models import (
    ACTIVATIONS,
    ATTENTIONS,
    LABELS,
    NORMS,
    PADDINGS,
    POSITIONS,
    REPEATS,
    TinyConfig,
    batch,
)
from torch import Tensor

# Rows of head sizes: (heads, kv_heads). One head, equal heads, grouped heads, one key head.
HEADS = ((1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (3, 1))

# Token counts: primes, and numbers that are also head counts, batch sizes, or widths above.
TOKENS = (2, 3, 5, 7, 11, 13, 17, 6, 4)


@st.composite
def tiny_configs(draw: st.DrawFn, **fixed: Any) -> TinyConfig:
    """Any ``TinyDecoder`` of up to three blocks; ``fixed`` fields are taken as given."""
    heads, kv_heads = draw(st.sampled_from(HEADS))
    attention = draw(st.sampled_from(ATTENTIONS))
    # enable_gqa is SDPA's own; eager attention has to repeat.
    repeats = REPEATS if attention != "eager" else REPEATS[:2]
    values: dict[str, Any] = {
        "vocab": draw(st.sampled_from((19, 37))),
        "depth": draw(st.integers(1, 3)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from((2, 4, 6, 10))),
        "width": draw(st.sampled_from((7, 11, 17))),
        "ffn": draw(st.sampled_from((5, 13, 23))),
        "norm": draw(st.sampled_from(NORMS)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "positions": draw(st.sampled_from(POSITIONS)),
        "attention": attention,
        "repeat": draw(st.sampled_from(repeats)),
        "seed": draw(st.integers(0, 5)),
    }
    return TinyConfig(**(values | fixed))


@st.composite
def batches(draw: st.DrawFn, config: TinyConfig, **fixed: Any) -> dict[str, Tensor]:
    """Any batch for ``config`` of up to three rows; ``fixed`` arguments of ``models.batch``."""
    values: dict[str, Any] = {
        "batch": draw(st.integers(1, 3)),
        "tokens": draw(st.sampled_from(TOKENS)),
        "padding": draw(st.sampled_from(PADDINGS)),
        "labels": draw(st.sampled_from(LABELS[:-1])),
        "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    return batch(config.vocab, **(values | fixed))


def ratios() -> st.SearchStrategy[float]:
    """Shares of the tokens: one token, some, all."""
    return st.sampled_from((0.01, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0))


@st.composite
def selections(
    draw: st.DrawFn, batch: int, tokens: int, *, unused: bool = False
) -> tuple[Tensor, Tensor]:
    """Kept positions and their loss weights, both ``[batch, kept]``, positions ascending.

    With ``unused``, some slots may be -1, and come last.
    """
    kept = draw(st.integers(1, tokens))
    rows = []
    for _ in range(batch):
        count = draw(st.integers(0, kept)) if unused else kept
        row = draw(st.permutations(range(tokens)))[:count]
        rows.append(sorted(row) + [-1] * (kept - count))
    weight = st.sampled_from((1.0, 0.5, 2.0, 3.25))
    weights = [draw(st.lists(weight, min_size=kept, max_size=kept)) for _ in range(batch)]
    return torch.tensor(rows), torch.tensor(weights, dtype=torch.float64)

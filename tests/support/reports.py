"""Reports of steps that nobody ran, and a tokenizer of given words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fxseek

__all__ = ["Words", "report"]


class Words:
    """A tokenizer whose id i is the i-th word."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


def report(ids: Tensor, keep: int = 2, **options: Any) -> fxseek.StepReport:
    """A step that keeps the `keep` best tokens of each row by two scores, with labels throughout.

    The context falls from 1.0 at the first token, the gradient rises from 0.
    """
    batch, tokens = ids.shape
    rising = torch.arange(tokens, dtype=torch.float32).expand(batch, -1) / tokens
    context, gradient = 1.0 - rising, rising.clone()
    scores = context.log() + gradient
    valid = options.pop("valid", torch.ones(batch, tokens, dtype=torch.bool))
    ranked = scores.masked_fill(~valid, -torch.inf)
    selected = ranked.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(-1).values
    given: dict[str, Any] = {
        "selected": selected,
        "weights": torch.ones(selected.shape),
        "valid": valid,
        "scores": ranked,
        "parts": {"context": context, "gradient": gradient},
        "full_loss": torch.tensor(2.5),
        "saved_bytes": 3 << 20,
        "tokens": tokens,
        "step": 7,
        "ratio": 0.25,
        "input_ids": ids,
        "labels": torch.cat((ids[:, 1:], ids.new_full((batch, 1), -100)), 1),
        "supervised": valid & (torch.arange(tokens) < tokens - 1),
        "score": "tokenseek",
    }
    return fxseek.StepReport(**(given | options))

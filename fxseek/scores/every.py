"""The score where nothing is ranked: every token is kept, or every one that has a label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxseek.scores.base import ScoreInputs, Scorer

__all__ = ["Every"]


class Every(Scorer):
    """The same for all tokens."""

    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """Zeros."""
        zeros = torch.zeros(given.valid.shape, device=given.valid.device)
        return zeros.masked_fill(~given.valid, -torch.inf)

    def mass(self, scores: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """The same for all tokens."""
        return valid.to(torch.float32)

"""Random scores, TokenTune's: every token is as likely as any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxseek.scores.base import ScoreInputs, Stream, Uniform, scorer, step_generator

__all__ = ["random_scores"]


@scorer("random")
class Random(Uniform):
    """Uniform scores."""

    draws = True
    equal = True

    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """Drawn from the seed and the step alone."""
        valid = given.valid
        scores = random_scores(
            valid.shape, seed=self.config.seed, step=given.step, device=valid.device
        )
        return scores.masked_fill(~valid, -torch.inf)


@torch.no_grad()
def random_scores(
    shape: tuple[int, ...] | torch.Size,
    *,
    seed: int = 0,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform scores in [0, 1) (TokenTune's), float32: a function of ``seed`` and ``step`` alone.

    The global generators are neither read nor moved, and every device gets the same numbers.
    """
    generator = step_generator(seed, step, Stream.RANDOM_SCORE)
    scores = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return scores.to(device, non_blocking=True)

"""Selecting: from scores to the kept positions of every row and their weights in the loss.

Pure tensor functions, under ``no_grad``. Selecting never waits for the device: how many positions
are kept follows from the shape, and all cases (rows with few labels, much padding) are orders,
not branches.

Sizes: batch, tokens, kept (k, the same for all rows of a batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, InputError

__all__ = ["Selection", "count_kept", "select_sample", "select_topk"]


@dataclass(frozen=True)
class Selection:
    """The kept positions of every row and what each weighs in the loss.

    Shapes: ``kept`` Long [batch, k], ascending and without repetition in each row; ``weights``
    float32 [batch, k], meant for ``sum(weight · loss) / number of kept positions with a label``.
    """

    kept: Tensor
    weights: Tensor


def count_kept(ratio: float, tokens: int) -> int:
    """``ceil(ratio · tokens)``, at least 1 and at most ``tokens``, free of rounding errors.

    A product within one part in 10⁹ of an integer is that integer: 0.1 of 1000 is 100, and 0.3 of
    10 is 3 even if the ratio was computed as 0.1 + 0.2.

    Raises:
        ConfigError: ratio is outside (0, 1].
        InputError: there are no tokens.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio!r}; it must be above 0 and at most 1, such as 0.1")
    if tokens < 1:
        raise InputError(f"there are {tokens} tokens to select from; give the model at least one")
    product = ratio * tokens
    nearest = round(product)
    whole = nearest if math.isclose(product, nearest, rel_tol=1e-9) else math.ceil(product)
    return max(1, min(whole, tokens))


@torch.no_grad()
def select_topk(
    scores: Tensor,
    k: int,
    *,
    valid: Tensor,
    supervised: Tensor | None = None,
    supervised_only: bool = False,
) -> Selection:
    """The ``k`` best-scoring positions of each row, all with weight 1.

    Valid positions come before invalid ones; with ``supervised_only`` labelled ones come first of
    all, and unlabelled ones only fill up rows that have fewer than ``k``. Equal scores go to the
    lower position, on every device. If none of a row's chosen positions has a label although the
    row has one, the row's best labelled position replaces the worst chosen. Labels at invalid
    positions don't count.

    Shapes: scores [batch, tokens], without NaN; valid, supervised Bool [batch, tokens].

    Raises:
        ValueError: k is below 1 or above tokens; supervised_only without supervised.
    """
    _check_count(k, scores.shape[-1])
    labelled = valid if supervised is None else supervised & valid
    tier = valid.long()
    if supervised_only:
        if supervised is None:
            raise ValueError("supervised_only needs to know which positions have a label")
        tier = tier + labelled
    ranking = _ranking(scores, tier)
    chosen = ranking[:, :k]

    if supervised is not None and not supervised_only:
        tokens = ranking.shape[-1]
        rank = torch.arange(tokens, device=ranking.device)
        first = torch.where(labelled.gather(-1, ranking), rank, tokens).amin(-1, keepdim=True)
        replaces = (first >= k) & (first < tokens)
        best = ranking.gather(-1, first.clamp_max(tokens - 1))
        last = torch.where(replaces, best, chosen[:, -1:])
        chosen = torch.cat([chosen[:, :-1], last], dim=-1)
    kept = chosen.sort(dim=-1).values
    return Selection(kept, torch.ones_like(kept, dtype=torch.float32))


@torch.no_grad()
def select_sample(
    mass: Tensor,
    k: int,
    *,
    valid: Tensor,
    supervised: Tensor | None,
    generator: torch.Generator,
    uniform: float = 0.5,
) -> Selection:
    """``k`` labelled positions of each row, drawn by mass, weighted so that the loss is unbiased.

    Priority sampling without replacement: position i with share ``s_i`` gets the priority ``s_i /
    u_i``, ``u_i`` uniform in (0, 1]; the k highest are kept; with τ the next one, each kept
    position weighs ``max(1, τ / s_i)``, and the expectation of ``Σ weight · loss`` over the kept
    positions is the sum of all losses, whatever the losses are. The shares mix the row's mass
    with a uniform floor, ``s = (1 - uniform) · mass / Σ mass + uniform / labelled``, so that no
    weight explodes.

    The weights returned are those times ``kept positions with a label / positions with a label``,
    both counted over the whole batch: ``Σ weight · loss / kept positions with a label`` estimates
    the batch's mean loss over all labelled positions without bias.

    A row with at most ``k`` labelled positions keeps them all; unlabelled valid positions fill it
    up by mass, then invalid ones, with weight 1 (they have no label). Labels at invalid positions
    don't count. ``supervised=None`` takes every valid position as labelled.

    The draws come from ``generator``, on the CPU, so that all devices select alike.

    Shapes: mass [batch, tokens], finite and nonnegative; valid, supervised Bool [batch, tokens].

    Source: Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
    JACM 54(6), 2007.

    Raises:
        ConfigError: uniform is outside (0, 1].
        ValueError: k is below 1 or above tokens.
    """
    tokens = mass.shape[-1]
    _check_count(k, tokens)
    if not 0 < uniform <= 1:
        raise ConfigError(
            f"uniform is {uniform!r}; it must be above 0 (a token that is never drawn would bias "
            f"the loss) and at most 1, such as 0.5"
        )
    labelled = valid if supervised is None else supervised & valid
    # MPS has no float64.
    dtype = torch.float32 if mass.device.type == "mps" else torch.float64
    mass = mass.to(dtype)
    labelled_mass = mass.masked_fill(~labelled, 0.0)
    total = labelled_mass.sum(-1, keepdim=True)
    count = labelled.sum(-1, keepdim=True)
    floor = 1.0 / count.clamp_min(1).to(dtype)
    # A row whose labelled positions have no mass at all is drawn uniformly.
    by_mass = torch.where(total > 0, labelled_mass / total, floor)
    share = ((1.0 - uniform) * by_mass + uniform * floor).masked_fill(~labelled, 0.0)

    # 1 - [0, 1) = (0, 1]: no division by zero
    uniforms = 1.0 - torch.rand(mass.shape, generator=generator, dtype=dtype)
    priority = share / uniforms.to(mass.device, non_blocking=True)
    ranking = _ranking(torch.where(labelled, priority, mass), valid.long() + labelled)
    kept = ranking[:, :k].sort(dim=-1).values

    # Unlabelled positions have priority 0, so that τ = 0 in rows that keep all their labels.
    if k < tokens:
        threshold = priority.gather(-1, ranking[:, k : k + 1])
    else:
        threshold = torch.zeros_like(total)
    kept_labelled = labelled.gather(-1, kept)
    weights = (threshold / share.gather(-1, kept)).clamp_min(1.0)
    weights = weights * kept_labelled.sum() / labelled.sum().clamp_min(1)
    weights = weights.masked_fill(~kept_labelled, 1.0)
    return Selection(kept, weights.to(torch.float32))


def _ranking(scores: Tensor, tier: Tensor) -> Tensor:
    """Positions of each row, higher tiers first, then higher scores, then lower positions."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_tier = tier.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(-1, by_tier)


def _check_count(k: int, tokens: int) -> None:
    if not 1 <= k <= tokens:
        raise ValueError(f"{k} positions of {tokens} can't be kept; k must be 1 to {tokens}")

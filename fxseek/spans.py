"""Spans: runs of consecutive tokens that are selected together.

Sizes: batch, tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["drawn_scores", "means_of_spans", "over_spans", "spans_of"]


@torch.no_grad()
def spans_of(
    size: Tensor,
    *,
    valid: Tensor,
    generator: torch.Generator,
    labelled: Tensor | None = None,
    begins: Tensor | None = None,
    required: Tensor | None = None,
) -> Tensor:
    """The number of each position's span; equal numbers are a span, and they ascend in a row.

    A span lies within a stretch: positions in a row that are all valid or all not, all `labelled`
    or all not, and of one document (which `begins` where it is True). A required position is one of
    its own. Each stretch is cut into runs of ``size`` tokens after a first one of a random length
    from 1 to ``size``, which one draw per row decides.

    The draws come from ``generator``, on the CPU, so that all devices cut alike.

    Shapes: size Long [batch, 1], at least 1; valid, labelled, begins Bool [batch, tokens]; required
    Long [batch, any] → Long [batch, tokens].
    """
    batch, tokens = valid.shape
    cut = torch.zeros_like(valid) if begins is None else begins.clone()
    cut[:, 0] = True
    for kind in (valid, labelled):
        if kind is not None:
            cut[:, 1:] |= kind[:, 1:] != kind[:, :-1]
    if required is not None:
        alone = torch.zeros_like(valid).scatter(-1, required, True)
        cut |= alone
        cut[:, 1:] |= alone[:, :-1]
    position = torch.arange(tokens, device=valid.device)
    within = position - torch.where(cut, position, 0).cummax(-1).values
    draws = torch.rand((batch, 1), generator=generator, dtype=torch.float32, device="cpu")
    cut |= (within + (draws.to(size.device, non_blocking=True) * size).long()) % size == 0
    return cut.long().cumsum(-1) - 1


@torch.no_grad()
def over_spans(values: Tensor, spans: Tensor) -> Tensor:
    """Each position's sum over its span, added up in the order of the positions.

    Shapes: values, spans [batch, tokens] → [batch, tokens].
    """
    lengths = torch.zeros_like(spans).scatter_add(-1, spans, torch.ones_like(spans))
    # Numbers that no span has are at the end of a row, and are not read.
    found = torch.segment_reduce(values, "sum", lengths=lengths, axis=1, unsafe=True)
    return found.gather(-1, spans)


@torch.no_grad()
def means_of_spans(scores: Tensor, spans: Tensor) -> Tensor:
    """Each position's score as the mean over its span; a score of ``-inf`` stays, and is left out.

    Shapes: scores, spans [batch, tokens] → [batch, tokens].
    """
    last = scores == -torch.inf
    sums = over_spans(scores.masked_fill(last, 0.0), spans)
    counts = over_spans((~last).to(scores.dtype), spans)
    return (sums / counts.clamp_min(1)).masked_fill(last, -torch.inf)


@torch.no_grad()
def drawn_scores(
    draws: Tensor, spans: Tensor, tiers: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Scores whose best, any number of a tier's, have each of its positions equally often.

    The tier's positions stand on a circle, span by span in a random order; the best are those from
    a random place on. So they are whole spans, but for the first and the last, which may be cut. A
    mean, or one draw, for each span would prefer short ones.

    Shapes: draws [batch, tokens], of which a span's first decides its place; spans Long [batch,
    tokens]; each tier Bool [batch, tokens], none overlapping → Long [batch, tokens], 0 or less.
    """
    order = draws.gather(-1, _first_of(spans)).argsort(dim=-1, stable=True)
    scores = torch.zeros_like(spans)
    for tier in tiers:
        inside = tier.gather(-1, order)
        count = inside.sum(-1, keepdim=True).clamp_min(1)
        start = torch.rand((len(spans), 1), generator=generator, dtype=torch.float32, device="cpu")
        start = (start.to(spans.device, non_blocking=True) * count).long()
        place = (inside.cumsum(-1) - 1 - start) % count
        scores = torch.where(tier, scores.scatter(-1, order, -place), scores)
    return scores


def _first_of(spans: Tensor) -> Tensor:
    """The first position of each position's span."""
    begins = torch.ones_like(spans, dtype=torch.bool)
    begins[:, 1:] = spans[:, 1:] != spans[:, :-1]
    position = torch.arange(spans.shape[-1], device=spans.device)
    return torch.where(begins, position, 0).cummax(-1).values

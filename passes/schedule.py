"""Schedule: what of the learn stage is kept for backward, and what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxseek.config import SeekConfig
from fxseek.passes.ir import Piece
from fxseek.passes.rematerialise import Region, cheap_regions
from fxseek.passes.segments import place_segments
from fxseek.passes.structure import Structure


@dataclass(frozen=True)
class Schedule:
    """How a learn stage is to be run: as a whole, by cheap regions, or in segments.

    `regions`: what backward may recompute, None where nothing is chosen by region; `segments`: the
    segment of each node, None where the graph stays in one.
    """

    regions: list[Region] | None = None
    segments: dict[fx.Node, int] | None = None


def schedule(learn: Piece, structure: Structure, config: SeekConfig) -> Schedule:
    """The schedule that `backend` and `recompute` of the configuration ask for."""
    if config.backend != "eager" or config.recompute == "block":
        return Schedule(segments=place_segments(learn, structure))
    if config.recompute == "none":
        return Schedule()
    ends, attentions = (
        [learn.compact[node] for node in nodes if node in learn.compact]
        for nodes in (structure.stream_cuts, structure.attentions)
    )
    return Schedule(regions=cheap_regions(learn.graph, learn.inputs, ends, attentions))


__all__ = ["Schedule", "schedule"]

"""Segments: a stage cut where the residual stream is all that goes on.

Before::

    x1 = block0(x0, k0, v0); x2 = block1(x1, k1, v1); loss = head(x2)

After, each a graph module of its own::

    x1 = submod_0(x0, k0, v0)
    x2 = submod_1(x1, k1, v1)
    ...

A segment can be run again in backward from its inputs, is given its own layer's keys and values
and no other's, and is compiled once for all layers that look alike.
"""

from __future__ import annotations

from torch import fx

from fxseek.passes.facts import ancestors
from fxseek.passes.ir import Piece
from fxseek.passes.structure import Structure


def block_inputs(structure: Structure) -> list[fx.Node]:
    """The value of the residual stream in front of each attention, in order."""
    found: dict[fx.Node, None] = {}
    for attention in structure.attentions:
        above = ancestors([attention]) - {attention}
        cuts = [node for node in structure.stream_cuts if node in above]
        if cuts:
            found[cuts[-1]] = None
    return list(found)


def place_segments(piece: Piece, structure: Structure) -> dict[fx.Node, int]:
    """The segment that each node of a learn stage belongs to; a cut ends one.

    A part that the graph calls by name stays alone in its segment.
    """
    cuts = block_inputs(structure)
    ends = {piece.compact[cut] for cut in cuts if cut in piece.compact}
    place: dict[fx.Node, int] = {}
    index, alone = 0, False
    for node in piece.graph.nodes:
        called = node.op == "call_module"
        if (called or alone) and place:
            index += 1
        place[node] = index
        alone = called
        if node in ends:
            index += 1
    return place


__all__ = ["block_inputs", "place_segments"]

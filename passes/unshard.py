"""Unshard: sharded parameters are made whole where a segment first reads one of them.

Before (`w0`, `w1` are this process's shards of the parameters of FSDP)::

    h = linear(x0, w0); x1 = add(x0, linear(h, w1)); ...

After::

    w0_whole, w1_whole = unshard_0(w0, w1)        # one all-gather for the segment
    h = linear(x0, w0_whole); x1 = add(x0, linear(h, w1_whole)); ...

Where the backend can overlap, `unshard_0` also begins the gather of `unshard_1`, whose shards it is
given for that. A whole parameter is let go after its last reader, as any value. Where a segment is
run again in backward, so is its all-gather, and nothing whole is kept in between. A parameter that
several segments read is gathered in each; autograd adds up what their backward has reduced.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import fx

from fxseek.ops.shards import Chain, Sharding, Unshard, in_buckets
from fxseek.passes.ir import Input, Parameter, Piece, origin
from fxseek.passes.segments import block_inputs
from fxseek.passes.structure import Structure

_SHARDING = "fxseek: sharding"


def mark_sharded(node: fx.Node, sharding: Sharding) -> None:
    """Note on an input of the captured graph that it is a shard when the step runs."""
    node.meta[_SHARDING] = sharding


def sharding_of(item: Input | fx.Node) -> Sharding | None:
    """How an input of the captured graph is sharded; None where it is not."""
    if isinstance(item, fx.Node):
        return item.meta.get(_SHARDING) if item.op == "placeholder" else None
    return sharding_of(item.node) if isinstance(item, Parameter) else None


def unshard(piece: Piece, place: dict[fx.Node, int]) -> Piece:
    """Let each segment of a piece gather the parameters that it reads (in place).

    `place`: the segment of each node, to which the new nodes are added. A head, which the graph
    calls by name, sees to itself.
    """
    shardings = {
        node: found
        for node, item in piece.placeholders().items()
        if (found := sharding_of(item)) is not None
    }
    readers: dict[int, dict[fx.Node, list[fx.Node]]] = {}
    for node in piece.graph.nodes:
        if node.op in ("placeholder", "output") or node.target == "head":
            continue
        for read in dict.fromkeys(x for x in node.all_input_nodes if x in shardings):
            readers.setdefault(place[node], {}).setdefault(read, []).append(node)
    parts, chain = dict(piece.parts), Chain()
    calls: list[fx.Node] = []
    for segment, read in readers.items():
        for bucket in in_buckets({node: shardings[node] for node in read}):
            name = f"unshard_{len(parts)}"
            parts[name] = Unshard(list(bucket.values()), chain)
            call, *values = _gather(piece.graph, name, {node: read[node] for node in bucket})
            calls.append(call)
            place.update(dict.fromkeys((call, *values), segment))
    for call, following in pairwise(calls):
        own, after = call.args, following.args
        call.kwargs = {**call.kwargs, "after": after}
        following.kwargs = {"before": own}
    piece.parts = parts
    return piece


def _gather(graph: fx.Graph, name: str, read: Mapping[fx.Node, list[fx.Node]]) -> Iterable[fx.Node]:
    """Call `name` in front of the first reader, and let all read what it gives."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    first = min((node for nodes in read.values() for node in nodes), key=order.__getitem__)
    with graph.inserting_before(first):
        called = graph.create_node("call_module", name, tuple(read), name=name)
        yield called
        wholes = [graph.call_function(operator.getitem, (called, i)) for i in range(len(read))]
    for (shard, nodes), made in zip(read.items(), wholes, strict=True):
        made.meta |= {key: x for key, x in shard.meta.items() if key != "origin"}
        for node in nodes:
            node.replace_input_with(shard, made)
        yield made


def place_by_blocks(piece: Piece, structure: Structure) -> dict[fx.Node, int]:
    """The segment of each node of a piece that runs captured nodes as they are, on all tokens."""
    cuts = set(block_inputs(structure))
    place: dict[fx.Node, int] = {}
    index = 0
    for node in piece.graph.nodes:
        place[node] = index
        if origin(node) in cuts:
            index += 1
    return place


__all__ = ["mark_sharded", "place_by_blocks", "sharding_of", "unshard"]

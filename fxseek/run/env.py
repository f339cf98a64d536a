"""The values of a step, by the captured node that each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx

from fxseek.ops.shards import begin, in_buckets
from fxseek.passes.ir import Gathered, Given, Input, Joined, Prefilled, Selected
from fxseek.passes.unshard import sharding_of
from fxseek.selecting import Selection

__all__ = ["Env"]


class Env:
    """What the pieces of a step read.

    `arguments`: the inputs of the captured graph; `places`: where each placeholder's is among them;
    `values`: values of all tokens, which the prefill has made; `rows`: gathered rows of constants,
    and values that parts share; `whole`: parameters whose shards are gathered at the moment.
    """

    def __init__(self, arguments: Sequence[Any], places: Mapping[fx.Node, int]) -> None:
        self.arguments = arguments
        self.places = places
        self.values: dict[fx.Node, Any] = {}
        self.rows: dict[Gathered | Joined, Any] = {}
        self.whole: dict[fx.Node, Tensor] = {}

    def read(self, node: fx.Node) -> Any:
        """An input of the captured graph, or a value of all tokens.

        A sharded parameter is this process's shard, unless it is gathered at the moment.
        """
        if node in self.whole:
            return self.whole[node]
        return self.arguments[self.places[node]] if node in self.places else self.values[node]

    def constant(self, node: fx.Node) -> Any:
        """The same without gradient."""
        value = self.read(node)
        return value.detach() if isinstance(value, Tensor) else value

    @contextmanager
    def unsharded(self, nodes: Iterable[fx.Node]) -> Iterator[None]:
        """Sharded parameters among these inputs are whole meanwhile, and without gradient."""
        found = {node: x for node in nodes if (x := sharding_of(node)) is not None}
        for bucket in in_buckets(found):
            given = begin(list(bucket.values()), [self.read(node) for node in bucket]).finish()
            self.whole.update(zip(bucket, given, strict=True))
            del given
        try:
            yield
        finally:
            self.whole.clear()

    def constants(
        self, inputs: Iterable[Input], given: Mapping[fx.Node, Any], selection: Selection | None
    ) -> list[Any]:
        """What a piece reads, without gradient but for the values that are `given`."""
        return [
            getattr(selection, item.part)
            if isinstance(item, Selected)
            else given[item.node]
            if isinstance(item, (Given, Prefilled)) and item.node in given
            else self.constant(item.node)
            for item in inputs
        ]

    def take(self, inputs: Iterable[Input], selection: Selection) -> list[Any]:
        """What the last piece of a step, or of a part of it, reads.

        All other values are let go: nobody else keeps a layer's keys and values alive then.
        """
        taken: list[Any] = []
        for item in inputs:
            match item:
                case Selected(part):
                    taken.append(getattr(selection, part))
                case Gathered() | Joined():
                    taken.append(self.rows[item])
                case _:
                    taken.append(self.read(item.node))
        self.values.clear()
        self.rows.clear()
        return taken

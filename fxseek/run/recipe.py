"""Notes of saved tensors, and how backward makes the tensors again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.run.boxed import unpack_list
from fxseek.run.saved import Held

__all__ = ["Layout", "Note", "Recipe"]


class Layout(NamedTuple):
    """Type and memory layout of a tensor."""

    dtype: torch.dtype
    nbytes: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The layout of a tensor."""
        nbytes = x.untyped_storage().nbytes()
        return cls(x.dtype, nbytes, x.shape, x.stride(), x.storage_offset())

    def copies_alike(self) -> bool:
        """Whether a copy of such a tensor lies in memory as the tensor does."""
        count = 1  # of the elements that lie without a gap
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != count:
                return False
            count *= size
        return self.offset == 0 and self.nbytes == count * self.dtype.itemsize


class Note(Held):
    """A saved tensor that a region has made: the tensor itself, until the region is settled."""

    __slots__ = ("layout", "owner", "recipe", "settled")

    def __init__(self, tensor: Tensor) -> None:
        layout = Layout.of(tensor)
        super().__init__(_torch.storage_key(tensor), layout.nbytes, tensor.detach())
        self.layout = layout
        self.owner: fx.Node | None = None
        self.recipe: Recipe | None = None
        self.settled = False


class Remake:
    """Some nodes of a region as a function of what they read.

    `read`: nodes whose values it is given; `nodes`: what runs, in order.
    """

    def __init__(self, read: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> None:
        self.read = tuple(read)
        self.nodes = tuple(nodes)
        self._functions: dict[tuple[fx.Node, ...], Callable[[list[Any]], tuple[Any, ...]]] = {}

    def __call__(self, values: list[Any], wanted: Container[fx.Node]) -> dict[fx.Node, Any]:
        """The values of those of `nodes` that are wanted; the list is emptied."""
        made = tuple(node for node in self.nodes if node in wanted)
        if made not in self._functions:
            self._functions[made] = self._function(made)
        return dict(zip(made, self._functions[made](values), strict=True))

    def _function(self, made: Sequence[fx.Node]) -> Callable[[list[Any]], tuple[Any, ...]]:
        graph = fx.Graph()
        copies = unpack_list(graph, self.read)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in made))
        return fx.GraphModule(torch.nn.Module(), graph, class_name="Remake").forward


@dataclass(eq=False)
class Recipe:
    """Makes the saved tensors of a region when backward asks for them."""

    remake: Remake
    sources: Sequence[Callable[[], Any]]
    layouts: dict[fx.Node, Layout]
    precision: Callable[[], AbstractContextManager[Any]]
    notes: weakref.WeakSet[Note] = field(default_factory=weakref.WeakSet)
    made: dict[fx.Node, Tensor] = field(default_factory=dict)
    waiting: dict[fx.Node, set[int]] = field(default_factory=dict)
    # Two threads may run one backward. Fetching a source may run the step again (a checkpoint
    # around the model does), and so come back to this recipe.
    lock: AbstractContextManager[Any] = field(default_factory=threading.RLock)

    def tensor(self, note: Note) -> Tensor:
        """The saved tensor. The first call makes all those of the region."""
        owner, layout = note.owner, note.layout
        assert owner is not None
        with self.lock:
            if owner not in self.made:
                self._make()
            value = self.made[owner]
            waiting = self.waiting[owner]
            waiting.discard(id(note))
            if not waiting:
                del self.made[owner], self.waiting[owner]
        return value.as_strided(layout.size, layout.stride, layout.offset)

    def _make(self) -> None:
        waiting: dict[fx.Node, set[int]] = {}
        for note in self.notes:
            assert note.owner is not None
            waiting.setdefault(note.owner, set()).add(id(note))
        values = [given() for given in self.sources]  # hooks of the caller: not in our autocast
        with torch.no_grad(), self.precision():
            self.made = self.remake(values, waiting)
        self.waiting = waiting
        for node, value in self.made.items():
            if Layout.of(value) != self.layouts[node]:
                raise GraphError(
                    f"recompute='selective' made {node.name} again in another layout than before. "
                    "This is a defect of fxseek: please report it with the model's configuration, "
                    "and use recompute='none' or 'block' meanwhile."
                )

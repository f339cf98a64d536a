"""Notes of saved tensors, and how backward makes the tensors again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.errors import GraphError
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


class Recipe:
    """Makes the saved tensors of a region when backward asks for them."""

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        sources: dict[fx.Node, Callable[[], Any]],
        layouts: dict[fx.Node, Layout],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.nodes = nodes
        self.sources = sources
        self.layouts = layouts
        self.precision = precision
        self.notes: weakref.WeakSet[Note] = weakref.WeakSet()
        self.made: dict[fx.Node, Tensor] = {}
        self.waiting: dict[fx.Node, set[int]] = {}
        # Two threads may go back through one graph; a source may be asked for by running the
        # step again, as a checkpoint around the model does, which goes back through it too.
        self.lock = threading.RLock()
        self.done: dict[fx.Node, list[fx.Node]] = {}
        """Which values a node is the last to read."""
        last = {x: node for node in nodes for x in node.all_input_nodes}
        for x, node in last.items():
            self.done.setdefault(node, []).append(x)

    def tensor(self, note: Note) -> Tensor:
        """The saved tensor, made with all others of the region where it is the first."""
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
        values = {node: given() for node, given in self.sources.items()}
        waiting: dict[fx.Node, set[int]] = {}
        for note in self.notes:
            assert note.owner is not None
            waiting.setdefault(note.owner, set()).add(id(note))
        made: dict[fx.Node, Tensor] = {}
        with torch.no_grad(), self.precision():
            for node in self.nodes:
                values[node] = self._run(node, values)
                if node in waiting:
                    made[node] = values[node]
                for x in self.done.get(node, ()):
                    del values[x]
        self.made, self.waiting = made, waiting
        for node, value in self.made.items():
            if Layout.of(value) != self.layouts[node]:
                raise GraphError(
                    f"recompute='selective' made {node.name} again in another layout than before. "
                    "This is a defect of fxseek: please report it with the model's configuration, "
                    "and use recompute='none' or 'block' meanwhile."
                )

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_method":
            target, args = getattr(args[0], str(node.target)), args[1:]
        return target(*args, **kwargs)

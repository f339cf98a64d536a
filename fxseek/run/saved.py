"""Counting what autograd saves for backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.passes.facts import tensors_of

__all__ = ["Held", "Known", "SavedBytes", "functions_of"]


def functions_of(values: Any) -> Iterator[Any]:
    """The nodes of autograd's graph behind the tensors in a (nested) value, each once."""
    queue: list[Any] = [x.grad_fn for x in tensors_of(values) if x.grad_fn is not None]
    seen: set[Any] = set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        queue.extend(following for following, _ in node.next_functions if following is not None)


class Held:
    """What autograd keeps in the place of a tensor; it dies when autograd lets go of it."""

    __slots__ = ("__weakref__", "nbytes", "packed", "storage", "version")

    def __init__(self, storage: int, nbytes: int, packed: Any) -> None:
        self.storage = storage
        self.nbytes = nbytes
        self.packed = packed
        self.version = 0


class Known(NamedTuple):
    """Memory that is there whatever autograd saves, by `storage_key`.

    `counts`: whether memory that is not among it is counted.
    """

    storages: frozenset[int] = frozenset()
    counts: bool = True

    @classmethod
    def of(cls, values: Iterable[Any], *, counts: bool = True) -> Known:
        """The memory of the tensors among the values."""
        return cls(
            frozenset(_torch.storage_key(x) for x in values if isinstance(x, Tensor)), counts
        )


class SavedBytes:
    """Context manager that counts the bytes which autograd saves in it and still keeps.

    Memory of `exclude` (parameters, buffers, inputs) is not counted, memory that several saved
    tensors share is counted once; with ``Known(counts=False)`` nothing is counted. Hooks that the
    caller has set (offloading, other meters) go on working: each tensor passes through them too.
    """

    def __init__(self, exclude: Iterable[Any] | Known = ()) -> None:
        known = exclude if isinstance(exclude, Known) else Known.of(exclude)
        self._known, self._counts = known.storages, known.counts
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()
        self._outer: Any = None
        self._hooks: Any = None

    @property
    def total(self) -> int:
        """Bytes kept now."""
        return sum({held.storage: held.nbytes for held in self._held}.values())

    def count(self, tensor: Tensor, packed: Any = None) -> Held:
        """Count one saved tensor's memory for as long as the result lives."""
        key = _torch.storage_key(tensor)
        if not self._counts or key in self._known:
            return Held(key, 0, packed)
        held = Held(key, tensor.untyped_storage().nbytes(), packed)
        self._held.add(held)
        return held

    def _pack(self, tensor: Tensor) -> Held:
        # Detached: an operation that saves its own output would keep itself alive otherwise.
        packed = tensor.detach() if self._outer is None else self._outer[0](tensor)
        held = self.count(tensor, packed)
        held.version = _torch.version(tensor)  # a detached tensor shares the counter
        return held

    def _unpack(self, held: Held) -> Tensor:
        if self._outer is not None:
            return self._outer[1](held.packed)
        return self._unchanged(held)

    def _unchanged(self, held: Held) -> Tensor:
        """What is held, if nobody wrote to it: autograd leaves this check to the hooks."""
        if _torch.version(held.packed) != held.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {list(held.packed.shape)} that the fxseek "
                "step saved for backward. Call backward before the optimiser's step, or before "
                "whatever else writes to it."
            )
        return held.packed

    def __enter__(self) -> Self:
        self._outer = _torch.outer_saved_tensor_hooks()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        hooks, self._hooks = self._hooks, None  # they hold this object
        hooks.__exit__(*error)

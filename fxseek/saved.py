"""Counting what autograd saves for backward."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SavedBytes"]


class SavedBytes:
    """Context manager that counts the bytes which autograd saves in it.

    Memory of `exclude` (parameters, buffers, inputs) is not counted, memory that several saved
    tensors share is counted once. `total` is in bytes.
    """

    def __init__(self, exclude: Iterable[Any] = ()) -> None:
        self._known = {
            tensor.untyped_storage()._cdata for tensor in exclude if isinstance(tensor, Tensor)
        }
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        self.count(tensor)
        return tensor

    def count(self, tensor: Tensor) -> None:
        """Count one saved tensor's memory, unless it is known."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.total += storage.nbytes()

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, value, trace)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor

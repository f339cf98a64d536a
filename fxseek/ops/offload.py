"""Keys and values that wait in host memory.

The prefill sends a layer's keys and values to the host after their last use; the learn stage and
its recomputation in backward take them back block by block. On an accelerator the copies come on a
stream of their own, and the neighbours of what is taken are fetched ahead of their use.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.ops.rows import owned

__all__ = ["HostTensor", "link", "to_device", "to_host"]

_AHEAD = 2
"""Values that are fetched ahead: a block's keys and values."""


class HostTensor:
    """A constant in host memory; on the host it is the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.order: Sequence[weakref.ref[HostTensor]] = ()
        self.place = 0
        self._taken_in: set[bool] = set()
        self._fetched: tuple[Tensor, torch.Event] | None = None
        self._written: torch.Event | None = None
        if _torch.is_fake(tensor):
            self._host = tensor.to("cpu")
        elif self.device.type == "cpu":
            self._host = owned(tensor)
        else:
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._written = torch.Event(self.device)
            self._written.record(torch.accelerator.current_stream(self.device))

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self._host.shape

    def fetch(self, backward: bool) -> Tensor:
        """The tensor on its device; those that will be asked for next start to come too."""
        if self._written is None:
            return self._host.to(self.device)
        self._taken_in.add(backward)
        self._start()
        assert self._fetched is not None
        tensor, event = self._fetched
        self._fetched = None
        stream = torch.accelerator.current_stream(self.device)
        stream.wait_event(event)
        tensor.record_stream(stream)  # its memory is the other stream's
        for value in self.next(backward):
            value._start()
        return tensor

    def store(self, tensor: Tensor) -> None:
        """Let the host have other values."""
        if self._written is None:
            self._host = owned(tensor)
            return
        self._host.copy_(tensor, non_blocking=True)
        self._fetched = None
        self._written.record(torch.accelerator.current_stream(self.device))

    def rewind(self) -> None:
        """Forget that it was fetched, in both directions."""
        self._taken_in.clear()

    def next(self, backward: bool) -> list[HostTensor]:
        """Those that will be asked for next and have not been, as far as they are still wanted."""
        step = -1 if backward else 1
        places = range(self.place + step, self.place + step * (_AHEAD + 1), step)
        values = [self.order[place]() for place in places if 0 <= place < len(self.order)]
        return [x for x in values if x is not None and backward not in x._taken_in]

    def _start(self) -> None:
        if self._fetched is not None or self._written is None:
            return
        stream = _side_stream(self.device)
        with stream:
            stream.wait_event(self._written)
            tensor = self._host.to(self.device, non_blocking=True)
            event = torch.Event(self.device)
            event.record(stream)
        self._fetched = (tensor, event)


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


def to_host(tensor: Tensor) -> HostTensor:
    """Send a tensor to the host."""
    return HostTensor(tensor)


def link(values: Sequence[HostTensor]) -> None:
    """Tell each value the order in which the learn stage takes them."""
    order = [weakref.ref(value) for value in values]  # each lives for as long as it is wanted
    for place, value in enumerate(values):
        value.order, value.place = order, place


def to_device(value: HostTensor | Tensor) -> Tensor:
    """Take a tensor back, in the learn stage or in the backward that runs it again.

    One that the score stage reads too has stayed on the device.
    """
    return value if isinstance(value, Tensor) else value.fetch(_torch.in_backward())

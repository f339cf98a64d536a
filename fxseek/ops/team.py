"""The processes that share a sharded model: their collectives, and the errors that they tell.

A process that fails while others wait for it in a collective can't take part in another one. It
leaves a note of its error in the store of the process group. The others fail when its connections
close, or at the timeout; they look for the note then, and raise that error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxseek import _fsdp, errors
from fxseek.errors import FxseekError, lacks_memory

__all__ = ["Team", "as_message", "error_of", "step_begins", "steps_begun", "tell", "telling"]

_ECHO = "Raised by a collective of fxseek: another process has failed, or does not answer."


@dataclass(frozen=True)
class Team:
    """The processes that share a model: `shards` hold its parts, `replicas` the same part.

    `device`: where they communicate.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    device: torch.device

    @property
    def count(self) -> int:
        """How many shards a parameter has."""
        return self.shards.size()

    @property
    def rank(self) -> int:
        """Which of them is this process's."""
        return self.shards.rank()

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.count * (1 if self.replicas is None else self.replicas.size())

    @property
    def overlaps(self) -> bool:
        """Whether a gather runs beside what is computed: on a CPU both would share its cores."""
        return self.device.type != "cpu"

    def gather(self, sent: Tensor, *, later: bool = False) -> tuple[Tensor, Any]:
        """What all send, one after the other: [n] → [count · n].

        With `later` it is there when the work that comes with it has been waited for.
        """
        received = sent.new_empty(self.count * len(sent))
        with _hearing():
            work = _fsdp.all_gather(received, sent, group=self.shards, async_op=later)
        return received, work

    def wait(self, work: Any) -> None:
        """Until a collective has ended; a device waits, and not the host."""
        with _hearing():
            work.wait()

    def reduce(self, sent: Tensor) -> Tensor:
        """The sum of the row that is this process's over all processes: [count, n] → [n]."""
        received = sent.new_empty(sent.shape[1])
        with _hearing():
            _fsdp.reduce_scatter(received, sent.view(-1), group=self.shards)
            if self.replicas is not None:
                dist.all_reduce(received, group=self.replicas)
        return received

    def follow(self, wholes: Sequence[Tensor]) -> None:
        """Bytes of whole parameters are there from now on; whoever predicts memory notes it."""

    def largest(self, own: Tensor) -> Tensor:
        """The largest of each number over all processes; waits for them and for the device."""
        found = own.to(self.device, copy=True)
        with _hearing():
            for group in (self.shards, self.replicas):
                if group is not None:
                    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            return found.cpu()


# ---- errors --------------------------------------------------------------------------------------


_begun = 0


def step_begins() -> None:
    """All processes begin a step."""
    global _begun
    _begun += 1


def steps_begun() -> int:
    """How many steps of sharded models have begun; the same number in all processes."""
    return _begun


def as_message(error: BaseException) -> str:
    """An error as text."""
    return f"{type(error).__name__}\n{error}"


def error_of(rank: int, failed: str, message: str) -> FxseekError:
    """The error of another process, of its class where that is one of fxseek's.

    `failed`: at what, such as "could not begin its step".
    """
    name, _, text = message.partition("\n")
    kind = getattr(errors, name, None)
    told = text if kind is not None else f"{name}: {text}"
    return (kind or FxseekError)(f"process {rank} {failed}: {told}")


def tell(error: Exception) -> None:
    """Note an error for the processes that wait for this one, unless it is another one's."""
    if _ECHO in getattr(error, "__notes__", ()) or not dist.is_initialized():
        return
    note = f"{dist.get_rank()}\n{as_message(error)}"
    with contextlib.suppress(RuntimeError):  # of a store that has gone
        _store().compare_set(_key(), "", note)  # the first one stays


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """An error in here is told."""
    try:
        yield
    except Exception as error:
        tell(error)
        raise


@contextlib.contextmanager
def _hearing() -> Iterator[None]:
    """A collective that fails raises the error of the process that has left it, where known."""
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise  # this process's own
        error.add_note(_ECHO)
        told = _told()
        if told is None:
            raise
        told.add_note(_ECHO)
        raise told from error


def _told() -> FxseekError | None:
    with contextlib.suppress(RuntimeError):
        if _store().check([_key()]):
            rank, _, message = _store().get(_key()).decode(errors="ignore").partition("\n")
            return error_of(int(rank), "failed in its step", message)
    return None


def _key() -> str:
    return f"fxseek: error of step {_begun}"


def _store() -> Any:
    """The store that all processes share; it has `check`, `get` and `compare_set`."""
    group: Any = dist.group.WORLD
    return group.get_group_store()

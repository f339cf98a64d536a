"""Parameters that are sharded over processes: gathered before they are read, reduced backward.

`torch.distributed.fsdp.fully_shard` leaves each process a shard of every parameter. Here several
are made whole by one all-gather of their bytes. Backward reduces the gradients by one
reduce-scatter, and averages them as FSDP does (over all processes of the mesh).

Where collectives run beside what is computed, the all-gather of the next segment begins ahead of
this segment's work, and is waited for where the next segment begins: two segments' parameters are
there then, and never more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxseek import _torch
from fxseek.ops.once import once_differentiable
from fxseek.ops.team import Team, steps_begun, tell

__all__ = ["Chain", "Gathering", "Sharding", "Unshard", "begin", "in_buckets"]

_K = TypeVar("_K")

_ALIGNED = 16
"""Bytes at whose multiples a shard begins in a buffer: no number is longer."""


@dataclass(frozen=True)
class Sharding:
    """How a parameter is sharded, and what it is when it is whole.

    `shape`, `dtype`: of the whole; `dim`: which of its dimensions is cut, in pieces of one length
    but for the last ones; `reduced`: the type in which gradients are added up, None for their own;
    `divisor`: what their sum is divided by.
    """

    name: str
    team: Team
    shape: torch.Size
    dim: int
    dtype: torch.dtype
    reduced: torch.dtype | None
    divisor: float

    @property
    def longest(self) -> int:
        """The length of the longest piece."""
        return -(-self.shape[self.dim] // self.team.count)

    @property
    def piece(self) -> list[int]:
        """The shape of a piece, shorter ones filled up."""
        return [self.longest if i == self.dim else n for i, n in enumerate(self.shape)]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape.numel() * self.dtype.itemsize


def in_buckets(shardings: Mapping[_K, Sharding]) -> list[dict[_K, Sharding]]:
    """Those that one collective serves; in order."""
    buckets: dict[Team, dict[_K, Sharding]] = {}
    for key, sharding in shardings.items():
        buckets.setdefault(sharding.team, {})[key] = sharding
    return list(buckets.values())


@dataclass
class Gathering:
    """An all-gather that has begun.

    `starts`: where the piece of each parameter begins in a row of `received`, [count, bytes];
    `work`: what to wait for, None where it has ended.
    """

    shardings: Sequence[Sharding]
    starts: Sequence[int]
    received: Tensor
    work: Any

    def wait(self) -> None:
        """Until it has ended; a device waits, and not the host."""
        if self.work is not None:
            self.shardings[0].team.wait(self.work)
            self.work = None

    def finish(self) -> list[Tensor]:
        """The whole parameters, without gradient. What was received is let go."""
        self.wait()
        found = [
            self._joined(sharding, start)
            for sharding, start in zip(self.shardings, self.starts, strict=True)
        ]
        del self.received
        self.shardings[0].team.follow(found)
        return found

    def _joined(self, sharding: Sharding, start: int) -> Tensor:
        """The pieces of a parameter as one."""
        piece, dim = sharding.piece, sharding.dim
        nbytes = math.prod(piece) * sharding.dtype.itemsize
        pieces = self.received[:, start : start + nbytes].view(sharding.dtype).view(-1, *piece)
        if dim:
            full = torch.cat(pieces.unbind(0), dim)
        else:
            if len(self.starts) > 1:  # a view would keep all that was received
                pieces = pieces.clone(memory_format=torch.contiguous_format)
            full = pieces.flatten(0, 1)
        return full.narrow(dim, 0, sharding.shape[dim])


def begin(
    shardings: Sequence[Sharding], shards: Sequence[Tensor], *, later: bool = False
) -> Gathering:
    """Begin one all-gather of parameters that are all of one team.

    With `later`, one that runs beside what is computed until it is finished.
    """
    team = shardings[0].team
    own: list[Tensor] = []
    starts: list[int] = []
    length = 0
    for sharding, shard in zip(shardings, shards, strict=True):
        held = shard.detach().to(team.device, sharding.dtype)
        held = _filled_up(held, sharding.dim, sharding.longest)
        held = held.contiguous().view(-1).view(torch.uint8)
        starts.append(length)
        gap = -len(held) % _ALIGNED
        own += [held, held.new_empty(gap)] if gap else [held]
        length += len(held) + gap
    sent = torch.cat(own)
    del own
    received, work = team.gather(sent, later=later)
    if later:
        team.follow([received])
    return Gathering(shardings, starts, received.view(team.count, length), work)


def _filled_up(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    behind = x.dim() - 1 - dim  # F.pad begins with the last dimension
    return F.pad(x, [0, 0] * behind + [0, missing])


def _reduced(shardings: Sequence[Sharding], slopes: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pieces of the averages over the team that are this process's, by one reduce-scatter."""
    team, divisor = shardings[0].team, shardings[0].divisor
    count = team.count
    # float16 would leave its range by a sum, or by the whole division ahead of it
    before = 2.0 ** (int(math.log2(divisor)) // 2) if divisor >= 1 else 1.0
    rows = []
    for sharding, slope in zip(shardings, slopes, strict=True):
        slope = _filled_up(slope, sharding.dim, sharding.longest * count)
        pieces = slope.unflatten(sharding.dim, (count, -1)).movedim(sharding.dim, 0)
        rows.append(pieces.reshape(count, -1))
    sent = torch.cat(rows, dim=1)
    del rows, slopes
    sent.div_(before)
    received = team.reduce(sent)
    del sent
    received.div_(divisor / before)
    start, rank = 0, team.rank
    for sharding in shardings:
        size, dim = math.prod(sharding.piece), sharding.dim
        piece = received[start : start + size].view(sharding.piece)
        begin = min(rank * sharding.longest, sharding.shape[dim])
        yield piece.narrow(dim, 0, min(sharding.longest, sharding.shape[dim] - begin))
        start += size


class _Unshard(torch.autograd.Function):
    """Shards → whole parameters; nothing is saved for backward."""

    @staticmethod
    def forward(ctx: Any, gathering: Gathering, *shards: Tensor) -> tuple[Tensor, ...]:
        found = gathering.finish()
        ctx.shardings = gathering.shardings
        ctx.stored = [(shard.device, shard.dtype) for shard in shards]
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*[x for x, n in zip(found, needed, strict=True) if not n])
        return tuple(found)

    @staticmethod
    @once_differentiable("a step of a sharded model")
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shardings, needed = ctx.shardings, ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * len(slopes)
        kinds: dict[tuple[torch.dtype, float], list[int]] = {}
        for place, sharding in enumerate(shardings):
            if needed[place]:
                kind = (sharding.reduced or sharding.dtype, sharding.divisor)
                kinds.setdefault(kind, []).append(place)
        given = list(slopes)
        del slopes
        for (dtype, _), places in kinds.items():
            wanted = []
            for place in places:  # where nothing has arrived here, it may have elsewhere
                slope, given[place] = given[place], None
                if slope is None:
                    sharding = shardings[place]
                    slope = torch.zeros(sharding.shape, device=sharding.team.device, dtype=dtype)
                wanted.append(slope.to(dtype))
            of = [shardings[place] for place in places]
            for place, piece in zip(places, _reduced(of, wanted), strict=True):
                device, stored = ctx.stored[place]
                found[place] = piece.to(device, stored)
        return None, *found


class Chain:
    """The gathers of a stage, in order; at most one of them has begun ahead of its use."""

    def __init__(self) -> None:
        self.links: list[Unshard] = []
        self._ahead: tuple[Unshard, list[Any], Gathering] | None = None

    def send(self, link: Unshard, shards: Sequence[Tensor]) -> None:
        """Begin a gather that will probably be the next."""
        gathering = begin(link.shardings, shards, later=True)
        self._ahead = link, _marks(shards), gathering

    def take(self, link: Unshard, shards: Sequence[Tensor]) -> Gathering:
        """The gather of these shards, whether or not it has begun.

        Another one that has begun (a step has failed, or has no use for it) is let go.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            of, marks, gathering = ahead
            if of is link and marks == _marks(shards):
                return gathering
            gathering.wait()
        return begin(link.shardings, shards)


def _marks(shards: Sequence[Tensor]) -> list[Any]:
    """The step, and the memory of the shards: autograd hands on other tensors of it."""
    return [steps_begun(), *((_torch.storage_key(x), x.storage_offset()) for x in shards)]


class Unshard(nn.Module):
    """Shards of parameters of one team → the whole ones, which backward reduces again.

    In a chain it begins the gather of the next link, or of the link before where a segment is run
    again in backward. `learns`: whether backward will run its segment again; `again`: it does.
    """

    def __init__(self, shardings: Sequence[Sharding], chain: Chain | None = None) -> None:
        super().__init__()
        self.shardings = tuple(shardings)
        self.chain = Chain() if chain is None else chain
        self.place = len(self.chain.links)
        self.chain.links.append(self)
        self.learns = False
        self.again = False

    def forward(
        self, *shards: Tensor, after: Sequence[Tensor] = (), before: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """One all-gather; backward does a reduce-scatter for each type that is reduced in.

        `after`, `before`: the shards of the next link and of the one before; none at the ends.
        """
        gathering = self.chain.take(self, shards)
        found = _Unshard.apply(gathering, *shards)
        if self.shardings[0].team.overlaps:
            links, place = self.chain.links, self.place
            if not self.again and after:
                self.chain.send(links[place + 1], after)
            elif self.again and before and links[place - 1].learns:
                self.chain.send(links[place - 1], before)
        return found  # type: ignore[return-value]

    def contexts(self) -> tuple[Any, Any]:
        """Of the segment's first run, and of another one in backward (`context_fn`)."""
        return contextlib.nullcontext(), _RunAgain(self)


class _RunAgain:
    """A segment is run again. No generator: torch ends it by an exception, which that would keep.

    With the exception, its frames would stay for a while, and the whole parameters in them.
    """

    def __init__(self, gather: Unshard) -> None:
        self.gather = gather

    def __enter__(self) -> None:
        self.gather.again = True

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.gather.again = False
        if isinstance(error, RuntimeError):  # torch's own exception is none
            tell(error)

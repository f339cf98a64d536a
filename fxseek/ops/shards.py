"""Parameters that are sharded over processes: gathered before they are read, reduced backward.

`torch.distributed.fsdp.fully_shard` leaves each process a shard of every parameter. Here several
are made whole by one all-gather of their bytes. Backward reduces the gradients by one
reduce-scatter, and averages them as FSDP does (over all processes of the mesh).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fxseek import _fsdp

__all__ = ["Sharding", "Team", "Unshard", "in_buckets", "whole"]

_ALIGNED = 16
"""Bytes at whose multiples a shard begins in a buffer: no number is longer."""


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

    def gather(self, sent: Tensor) -> Tensor:
        """What all have sent, one after the other: [n] → [count · n]."""
        received = sent.new_empty(self.count * len(sent))
        _fsdp.all_gather(received, sent, group=self.shards)
        return received

    def reduce(self, sent: Tensor) -> Tensor:
        """The sum of the row that is this process's over all processes: [count, n] → [n]."""
        received = sent.new_empty(sent.shape[1])
        _fsdp.reduce_scatter(received, sent.view(-1), group=self.shards)
        if self.replicas is not None:
            dist.all_reduce(received, group=self.replicas)
        return received

    def follow(self, wholes: Sequence[Tensor]) -> None:
        """Parameters are whole from now on; whoever predicts memory notes it."""

    def largest(self, own: Tensor) -> Tensor:
        """The largest of each number over all processes; waits for them and for the device."""
        found = own.to(self.device, copy=True)
        for group in (self.shards, self.replicas):
            if group is not None:
                dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return found.cpu()


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


def in_buckets(shardings: Iterable[Sharding]) -> list[list[int]]:
    """The places of those that one collective serves; in order."""
    buckets: dict[Team, list[int]] = {}
    for place, sharding in enumerate(shardings):
        buckets.setdefault(sharding.team, []).append(place)
    return list(buckets.values())


def whole(shardings: Sequence[Sharding], shards: Sequence[Tensor]) -> list[Tensor]:
    """The whole parameters, without gradient, by one all-gather; all are of one team."""
    team = shardings[0].team
    own: list[Tensor] = []
    starts: list[int] = []
    length = 0
    for sharding, shard in zip(shardings, shards, strict=True):
        held = _filled_up(sharding, shard.detach().to(team.device, sharding.dtype))
        held = held.contiguous().view(-1).view(torch.uint8)
        starts.append(length)
        gap = -len(held) % _ALIGNED
        own += [held, held.new_empty(gap)] if gap else [held]
        length += len(held) + gap
    sent = torch.cat(own)
    del own
    count = team.count
    rows = team.gather(sent).view(count, length)
    del sent
    found = []
    for sharding, start in zip(shardings, starts, strict=True):
        piece, dim = sharding.piece, sharding.dim
        nbytes = math.prod(piece) * sharding.dtype.itemsize
        pieces = rows[:, start : start + nbytes].view(sharding.dtype).view(count, *piece)
        full = torch.cat(pieces.unbind(0), dim)  # a view would keep all that was received
        found.append(full.narrow(dim, 0, sharding.shape[dim]))
    team.follow(found)
    return found


def _filled_up(sharding: Sharding, shard: Tensor) -> Tensor:
    missing = sharding.longest - shard.shape[sharding.dim]
    if not missing:
        return shard
    behind = shard.dim() - 1 - sharding.dim  # F.pad begins with the last dimension
    return F.pad(shard, [0, 0] * behind + [0, missing])


def _reduced(shardings: Sequence[Sharding], slopes: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pieces of the averages over the team that are this process's, by one reduce-scatter."""
    team, divisor = shardings[0].team, shardings[0].divisor
    count = team.count
    # float16 would leave its range by a sum, or by the whole division ahead of it
    before = 2.0 ** (int(math.log2(divisor)) // 2) if divisor >= 1 else 1.0
    rows = []
    for sharding, slope in zip(shardings, slopes, strict=True):
        missing = sharding.longest * count - slope.shape[sharding.dim]
        if missing:
            behind = slope.dim() - 1 - sharding.dim
            slope = F.pad(slope, [0, 0] * behind + [0, missing])
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
    def forward(ctx: Any, shardings: Sequence[Sharding], *shards: Tensor) -> tuple[Tensor, ...]:
        found = whole(shardings, shards)
        ctx.shardings = shardings
        ctx.stored = [(shard.device, shard.dtype) for shard in shards]
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*[x for x, n in zip(found, needed, strict=True) if not n])
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
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


class Unshard(nn.Module):
    """Shards of parameters of one team → the whole ones, which backward reduces again."""

    def __init__(self, shardings: Sequence[Sharding]) -> None:
        super().__init__()
        self.shardings = tuple(shardings)

    def forward(self, *shards: Tensor) -> tuple[Tensor, ...]:
        """One all-gather; backward does a reduce-scatter for each type that is reduced in."""
        return _Unshard.apply(self.shardings, *shards)  # type: ignore[return-value]

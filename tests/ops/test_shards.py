"""Gathering and reducing shards, with the processes one after the other in the place of a group."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fxseek.ops.shards import Sharding, Team, Unshard

SHAPES = ((5, 3), (2, 4), (1,), (4, 6))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Alone(Team):
    """One process of several: it is given what the others send."""

    processes: int = 2
    at: int = 0
    sent: list[Tensor] = field(default_factory=list)
    others: list[list[Tensor]] = field(default_factory=list)
    """What all send in each of its collectives; for want of it, what it sends itself."""

    def __hash__(self) -> int:
        return id(self)

    @property
    def count(self) -> int:
        return self.processes

    @property
    def rank(self) -> int:
        return self.at

    @property
    def size(self) -> int:
        return self.processes

    def gather(self, sent: Tensor) -> Tensor:
        return torch.cat(self._of_all(sent))

    def reduce(self, sent: Tensor) -> Tensor:
        return torch.stack(self._of_all(sent)).sum(0)[self.at]

    def _of_all(self, sent: Tensor) -> list[Tensor]:
        self.sent.append(sent)
        return self.others[len(self.sent) - 1] if self.others else [sent] * self.count


def team(rank: int, processes: int) -> Alone:
    return Alone(None, None, torch.device("cpu"), processes, rank)  # type: ignore[arg-type]


def shardings(of: Team) -> list[Sharding]:
    """Those of `SHAPES`; the last is cut in its second dimension."""
    dims = [0] * (len(SHAPES) - 1) + [1]
    given = zip(SHAPES, dims, DTYPES, strict=True)
    return [
        Sharding(f"p{i}", of, torch.Size(shape), dim, dtype, None, float(of.size))
        for i, (shape, dim, dtype) in enumerate(given)
    ]


def pieces(x: Tensor, dim: int, processes: int) -> list[Tensor]:
    """As FSDP cuts a parameter: pieces of one length, shorter or empty ones last."""
    length = -(-x.shape[dim] // processes)
    starts = [min(rank * length, x.shape[dim]) for rank in range(processes)]
    return [x.narrow(dim, at, min(length, x.shape[dim] - at)) for at in starts]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_parameters_are_made_whole_and_gradients_averaged(processes):
    def drawn() -> list[Tensor]:
        return [torch.randn(s).to(d) for s, d in zip(SHAPES, DTYPES, strict=True)]

    wholes, slopes = drawn(), [drawn() for _ in range(processes)]
    teams = [team(rank, processes) for rank in range(processes)]

    def run(one: Alone) -> tuple[list[Tensor], list[Tensor | None]]:
        one.sent.clear()
        places = shardings(one)
        cut = [pieces(x, p.dim, processes)[one.at] for x, p in zip(wholes, places, strict=True)]
        own = [x.clone().requires_grad_() for x in cut]
        found = list(Unshard(places)(*own))
        torch.autograd.backward(found, slopes[one.at])
        return found, [x.grad for x in own]

    for one in teams:
        run(one)
    sent = [list(x) for x in zip(*(list(one.sent) for one in teams), strict=True)]
    for one in teams:
        one.others.extend(sent)
        found, gradients = run(one)
        for i, place in enumerate(shardings(one)):
            assert torch.equal(found[i], wholes[i])
            if place.dim == 0:  # in memory of its own, filled up to pieces of one length
                row = wholes[i][0].nbytes
                assert found[i].untyped_storage().nbytes() == place.longest * processes * row
            mean = torch.stack([x[i] for x in slopes]).mean(0)
            wanted = pieces(mean, place.dim, processes)[one.at]
            torch.testing.assert_close(gradients[i], wanted)

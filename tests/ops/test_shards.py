"""Gathering and reducing shards, with the processes one after the other in the place of a group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fxseek.ops.shards import Chain, Sharding, Unshard
from fxseek.ops.team import Team, step_begins

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

    def gather(self, sent: Tensor, *, later: bool = False) -> tuple[Tensor, Any]:
        return torch.cat(self._of_all(sent)), None

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


@dataclass(frozen=True)
class Overlapping(Alone):
    """One that notes which gathers begin and end, and whether ahead of their use."""

    events: list[str] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    @property
    def overlaps(self) -> bool:
        return True

    def gather(self, sent: Tensor, *, later: bool = False) -> tuple[Tensor, Any]:
        number = int(sent.view(torch.float64)[0])
        self.events.append(f"begin {number}" + " ahead" * later)
        return super().gather(sent)[0], number if later else None

    def wait(self, work: Any) -> None:
        self.events.append(f"wait {work}")


def chained(count: int) -> tuple[Overlapping, Chain, list[Tensor]]:
    """Segments with one parameter each, filled with the segment's number."""
    one = Overlapping(None, None, torch.device("cpu"))  # type: ignore[arg-type]
    chain = Chain()
    for i in range(count):
        Unshard([Sharding(f"p{i}", one, torch.Size([6]), 0, torch.float64, None, 2.0)], chain)
    return one, chain, [torch.full((3,), float(i), dtype=torch.float64) for i in range(count)]


def run_link(chain: Chain, shards: list[Tensor], i: int, *, again: bool = False) -> None:
    after, before = shards[i + 1 : i + 2], shards[i - 1 : i] if i else []
    contexts = chain.links[i].contexts()
    with contexts[again]:
        (found,) = chain.links[i](shards[i], after=tuple(after), before=tuple(before))
    assert found.tolist() == [float(shards[i][0])] * 6


def test_the_next_gather_is_begun_ahead_of_its_use():
    one, chain, shards = chained(3)
    for i in range(3):
        run_link(chain, shards, i)
    wanted = ["begin 0", "begin 1 ahead", "wait 1", "begin 2 ahead", "wait 2"]
    assert one.events == wanted
    one.events.clear()
    chain.links[1].learns = True  # and the first one does not: backward will not ask for it
    for i in (2, 1):
        run_link(chain, shards, i, again=True)
    assert one.events == ["begin 2", "begin 1 ahead", "wait 1"]


@pytest.mark.parametrize("change", ["shards", "step", "link"])
def test_a_gather_that_is_ahead_is_not_taken_for_another(change):
    one, chain, shards = chained(3)
    run_link(chain, shards, 0)
    if change == "shards":
        shards[1] = shards[1] + 10
    elif change == "step":  # whose shards may have other values by now
        shards[1] += 10
        step_begins()
    run_link(chain, shards, 2 if change == "link" else 1)
    number = int(shards[2 if change == "link" else 1][0])
    assert one.events[2:4] == ["wait 1", f"begin {number}"]

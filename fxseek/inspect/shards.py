"""A captured step as it would be of a model that FSDP2 has sharded, for `fxseek.estimate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxseek.config import SeekConfig
from fxseek.inspect.explain import Captured
from fxseek.ops.shards import Sharding
from fxseek.ops.team import Team
from fxseek.passes.unshard import mark_sharded
from fxseek.run.assemble import Step

__all__ = ["as_sharded"]


@dataclass(frozen=True)
class _Pretended(Team):
    """Processes that are not there; `noted` is told of whole parameters."""

    processes: int
    ahead: bool
    noted: Callable[[Sequence[Tensor]], None]

    @property
    def count(self) -> int:
        return self.processes

    @property
    def rank(self) -> int:
        return 0  # of unequal shards it has the largest

    @property
    def size(self) -> int:
        return self.processes

    @property
    def overlaps(self) -> bool:
        return self.ahead

    def gather(self, sent: Tensor, *, later: bool = False) -> tuple[Tensor, Any]:
        return sent.new_empty(self.count * len(sent)), None

    def reduce(self, sent: Tensor) -> Tensor:
        return sent.new_empty(sent.shape[1])

    def largest(self, own: Tensor) -> Tensor:
        return own

    def follow(self, wholes: Sequence[Tensor]) -> None:
        self.noted(wholes)


def as_sharded(
    captured: Captured,
    model: nn.Module,
    config: SeekConfig,
    processes: int,
    ahead: bool,
    noted: Callable[[Sequence[Tensor]], None],
) -> tuple[nn.Module, Step, Sequence[Any]]:
    """What a process holds that has one of so many shards of each parameter, its step and inputs.

    `ahead`: the next segment's parameters are gathered ahead of their use, as on a GPU; `noted` is
    told of whole parameters, and of those that are received ahead. Quantised weights stay whole, as
    accelerate leaves them out.
    """
    device = next(model.parameters()).device
    team = _Pretended(None, None, device, processes, ahead, noted)  # type: ignore[arg-type]
    shards: dict[int, tuple[Sharding, nn.Parameter]] = {}
    held = nn.Module()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        own = parameter
        if type(parameter) is nn.Parameter:
            sharding = Sharding(
                name, team, parameter.shape, 0, parameter.dtype, None, float(processes)
            )
            shard = torch.empty(sharding.piece, dtype=parameter.dtype, device=device)
            own = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            shards[id(parameter)] = sharding, own
        held.register_parameter(str(index), own)
    for index, buffer in enumerate(model.buffers()):
        held.register_buffer(f"buffer_{index}", buffer)
    nodes = captured.graph.find_nodes(op="placeholder")
    for node, value in zip(nodes, captured.inputs, strict=True):
        if id(value) in shards:
            mark_sharded(node, shards[id(value)][0])
    inputs = [shards[id(x)][1] if id(x) in shards else x for x in captured.inputs]
    return held, captured.made(config), inputs

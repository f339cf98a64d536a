"""The peak of a step as torch's profiler sees it: by each allocation, without fxseek's tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]


def allocated_peak(step: Step, before: Iterable[Any]) -> int:
    """Bytes of the tensors that were there `before`, and the most that the step adds on the CPU."""
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in before
        if isinstance(x, Tensor)
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    now = most = 0
    events: Any = results.kineto_results.events()  # its stub lacks nbytes
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return sum(held.values()) + most


def training_peak(model: torch.nn.Module, batch: dict[str, Tensor], *, optimise: bool) -> int:
    """The peak of a step that is not the first: forward, backward and fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, fused=True) if optimise else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimiser is not None:
            optimiser.step()

    step()
    model.zero_grad(set_to_none=True)
    state = [] if optimiser is None else [x for s in optimiser.state.values() for x in s.values()]
    return allocated_peak(step, [*model.parameters(), *model.buffers(), *batch.values(), *state])

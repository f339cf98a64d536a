"""The most memory that a training step holds besides weights and their gradients."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import common

MEMORY = "[memory]"  # how torch names allocations in a trace


def step_peak(
    step: Callable[[], object], parameters: Iterable[nn.Parameter], device: torch.device
) -> int:
    """Run ``step``, a forward and its backward, and return its peak in bytes.

    That is the largest sum, at any moment of the step, of the bytes alive above those before it,
    minus the gradient bytes of the parameters. What counts is what torch's allocator hands out:
    neither the scratch memory of libraries nor what the allocator keeps for later.

    On the CPU the profiler tells of each allocation, and the gradients' are those that hold
    ``.grad`` after the step: they are left out from the beginning, so that a gradient counts
    neither early nor late. What is added to a gradient, and then freed, counts. On CUDA the device
    keeps the maximum itself; the gradients are allocated before the step, so that all that is
    added to them counts.

    Every ``.grad`` is set to None before and is left as the step made it.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    if device.type == "cuda":
        return _cuda_peak(step, parameters, device)
    events = trace_of(step)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return peak_of(events, {gradient.untyped_storage().data_ptr() for gradient in gradients})


def trace_of(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Run ``step``, and return the allocations among the events of its Chrome trace."""
    with warnings.catch_warnings():
        # Torch 2.12 says that it keeps the events of one cycle. All of them in Python, as
        # acc_events has it, would take gigabytes.
        warnings.filterwarnings("ignore", ".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"), object_hook=_allocation)
    return [event for event in trace["traceEvents"] if event is not None]


def _allocation(found: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept of a trace, of whose events only allocations are wanted: there are millions."""
    return None if found.get("name", MEMORY) != MEMORY else found


def _cuda_peak(
    step: Callable[[], object], parameters: list[nn.Parameter], device: torch.device
) -> int:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    common.synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    common.synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_of(events: Iterable[Mapping[str, Any]], left_out: set[int] = frozenset()) -> int:  # type: ignore[assignment]
    """The largest running sum of a trace's memory events on the CPU, in bytes; at least 0.

    Args:
        events: A Chrome trace's. Those named `MEMORY` hold ``Bytes``, negative where memory is
            freed, and ``Addr``.
        left_out: Addresses. The allocation that is alive there in the end isn't counted.
    """
    cpu = 0  # c10::DeviceType
    memory = [
        event for event in events
        if event["name"] == MEMORY and event["args"]["Device Type"] == cpu
    ]  # fmt: skip
    memory.sort(key=lambda event: event["ts"])
    changes = [int(event["args"]["Bytes"]) for event in memory]
    alive: dict[int, int] = {}
    for number, event in enumerate(memory):
        address = event["args"]["Addr"]
        if changes[number] > 0:
            alive[address] = number
        else:
            alive.pop(address, None)
    for address in left_out & alive.keys():
        changes[alive[address]] = 0
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most

"""`fxseek.profile`: where the time and the memory of a training step go, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxseek.capture.backend import stage_seconds
from fxseek.capture.sharded import refuse_shards
from fxseek.capture.step import compiled_step
from fxseek.errors import InputError
from fxseek.inspect.explain import capture
from fxseek.inspect.memory import (
    StepMemory,
    Tracker,
    following,
    formatted,
    loss_of,
    module_tensors,
)
from fxseek.inspect.state import accelerator_of, as_before
from fxseek.run.assemble import Ran, Step

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile(StepMemory):
    """Time and memory of one training step; print it, or `plot` it. See `StepMemory` for memory.

    `seconds`: of each stage (prefill, score, select, gather, learn) and of the backward.
    `saved_bytes`: what autograd kept for the backward, as in `StepReport`. `allocated_bytes`: the
    peak that the device's allocator saw by itself in an unfollowed step, None on the CPU.
    `tokens` and `kept` of each of `batch` rows; `device`: its type.
    """

    seconds: dict[str, float]
    saved_bytes: int
    allocated_bytes: int | None
    tokens: int
    kept: int
    batch: int
    device: str

    def __str__(self) -> str:
        """A page for a person."""
        total = sum(self.seconds.values())
        rows = f"{self.batch} row{'s' if self.batch > 1 else ''} of {self.tokens} tokens"
        lines = [
            f"fxseek profile: {rows}, {self.kept} kept, on {self.device}",
            f"  {total:.3f} s, peak {formatted(self.peak_bytes)} in {self.peak_stage}",
            "",
            f"  {'':10}{'seconds':>10}{'share':>8}{'peak':>12}",
        ]
        for name, seconds in self.seconds.items():
            share, peak = f"{seconds / total:.0%}", formatted(self.stage_peaks[name])
            lines.append(f"  {name:10}{seconds:>10.4f}{share:>8}{peak:>12}")
        lines += ["", *self._table()]
        lines.append(f"\n  saved for backward: {formatted(self.saved_bytes)}")
        if self.allocated_bytes is not None:
            lines.append(f"  peak of the device's allocator: {formatted(self.allocated_bytes)}")
        return "\n".join(lines)


def profile(model: nn.Module, /, **batch: Any) -> Profile:
    """Run a training step of a compiled model and measure it; no optimiser steps.

    The step, forward and backward, runs twice: followed tensor by tensor for its memory, which
    takes longer, and once more for its time. Gradients, the step counter, the report and the
    random generators are as before afterwards; buffers that a forward updates are not. Gradients
    that the model has already, and the optimiser's state, are not in the memory.

    Args:
        model: a model compiled by `fxseek.compile`, in training mode or not.
        batch: the arguments of a training step.

    Raises:
        InputError: the model is not compiled by fxseek, or with another backend than ``"eager"``,
            is sharded, computes no loss, or has hooks that may change weights in a backward.
        CaptureError, GraphError: as the training step would.
    """
    step = compiled_step(model)
    refuse_shards(model, "profile")
    if step.config.backend != "eager":
        raise InputError(
            f"backend={step.config.backend!r}: the tensors inside of compiled stages cannot be "
            'followed. Compile the model with backend="eager" to profile it'
        )
    compiled, inputs, _ = capture(step, batch)
    index = step.recorder.step
    ratio = step.config.ratio_at(index, step.recorder.progress)
    padding_mask = step.calls.padding_mask(batch)
    run = partial(compiled.run, tuple(inputs), index, padding_mask, ratio)
    tensors = [x for x in batch.values() if isinstance(x, Tensor)]
    tracker = Tracker(tensors[0].device.type)
    tracker.hold(module_tensors(model), "parameters")
    tracker.hold((x for x in inputs if isinstance(x, nn.Parameter)), "parameters")
    tracker.hold(tensors, "constants")
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.is_leaf]
    with as_before(model, *leaves), tracker, following(compiled, tracker):
        _followed(model, run, tracker)
    with as_before(model, *leaves):
        figures = _timed(compiled, run, accelerator_of(tensors[0].device))  # warm by now
    return Profile(**tracker.result(), **figures, device=tracker.device)


def _followed(model: nn.Module, run: Callable[[], Ran], tracker: Tracker) -> None:
    """Memory of the step into the tracker."""
    ran = run()
    tracker.stage("backward")
    loss_of(ran.outputs).backward()
    tracker.label((p.grad for p in model.parameters()), "gradients")
    tracker.stop()


def _timed(
    compiled: Step, run: Callable[[], Ran], accelerator: torch.device | None
) -> dict[str, Any]:
    """Of a `Profile` all but the memory over time and the device."""
    if accelerator is not None:
        torch.accelerator.reset_peak_memory_stats(accelerator)
    seconds: dict[str, float] = {}
    with stage_seconds(compiled.module, seconds):
        outputs, selection, scores, saved_bytes = run()
    tokens, (batch, kept) = scores.valid.shape[1], selection.kept.shape
    del scores
    start = time.perf_counter()
    loss_of(outputs).backward()
    if accelerator is not None:
        torch.accelerator.synchronize(accelerator)
    seconds["backward"] = time.perf_counter() - start
    allocated = None
    if accelerator is not None:
        allocated = torch.accelerator.max_memory_allocated(accelerator)
    return {
        "seconds": seconds,
        "saved_bytes": saved_bytes,
        "allocated_bytes": allocated,
        "tokens": tokens,
        "kept": kept,
        "batch": batch,
    }

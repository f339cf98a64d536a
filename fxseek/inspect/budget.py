"""The first way to run a step that fits a memory budget, of what usually costs the least time."""

from __future__ import annotations

import bisect
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxseek.config import CPU_CHUNK_BYTES, SeekConfig
from fxseek.errors import ConfigError
from fxseek.inspect.estimate import Peaks
from fxseek.inspect.memory import formatted, module_tensors
from fxseek.selecting import count_kept

__all__ = ["within_budget"]

log = logging.getLogger("fxseek")

_SIZES = (4096, 2048, 1024, 512, 256, 128)
"""Sizes of parts to choose from."""

_SMALL = 1024
"""Smaller parts leave an accelerator waiting for launches: other ways come first there."""

_PREFILL = 2048
"""The size of the prefill's chunks where they are needed."""

_OPTIONS = ("learn_chunk", "prefill_chunk", "recompute", "kv", "chunk_bytes")
"""What a budget picks."""

_MULTIPLE, _TRIES = 64, 4
"""Lengths that an error names are multiples of it; how many are tried."""


def within_budget(model: nn.Module, config: SeekConfig, tokens: int, batch: int) -> SeekConfig:
    """The configuration with what keeps a step in its memory budget.

    Of `learn_chunk`, `prefill_chunk`, `recompute`, `kv` and `chunk_bytes` it sets those that have
    their default, and nothing else; what usually takes less time comes first. The peak is that of
    `fxseek.estimate`: weights, gradients and activations, without optimiser state. The model is
    copied without its weights and left as it is.

    Raises:
        ConfigError: no way fits; the message says which ratio or which length would.
    """
    budget = config.budget
    assert budget is not None
    owned = _owned(model)
    if owned > budget:
        raise ConfigError(
            f"{_told(budget)} cannot be reached: weights and gradients alone are "
            f"{formatted(owned)}. Train fewer parameters, or quantise the others."
        )
    device = _device_of(model)
    peaks = Peaks(model, config, tokens, batch, device)
    step = f"a step of {batch} {'row' if batch == 1 else 'rows'} of {tokens} tokens"
    least, lean = peaks(config), config
    if least > budget:
        for ways in _ladder(config, _sizes(peaks, config), tokens, device):
            way, peak = _largest(peaks, ways, budget)
            if peak < least:
                least, lean = peak, way
            if peak <= budget:
                break
    if least > budget:
        raise ConfigError(
            f"{_told(budget)} cannot be reached: {step} at ratio {config.ratio} needs "
            f"{formatted(least)}, with {_changes(config, lean)}. "
            f"What would fit: {_what_fits(model, lean, peaks, least)}."
        )
    log.info(
        "fxseek: %s for %s: %s is estimated to peak at %s",
        _changes(config, lean), _told(budget), step, formatted(least),
    )  # fmt: skip
    return lean.on(device)  # as it was estimated


def _sizes(peaks: Peaks, config: SeekConfig) -> list[int]:
    """The sizes of parts to try; none for a model that is not learned in parts."""
    kept = count_kept(config.ratio_range[1], peaks.tokens)
    sizes = [size for size in _SIZES if size < kept]
    if not sizes or config.backend != "eager" or config.learn_chunk is not None:
        return []
    peaks(dataclasses.replace(config, learn_chunk=sizes[-1]))
    return sizes if peaks.in_parts else []


def _ladder(
    config: SeekConfig, sizes: Sequence[int], tokens: int, device: str
) -> Iterator[list[SeekConfig]]:
    """Ways to run a step, in groups, what takes less time first; within one, the largest peak."""
    free = {name for name in _OPTIONS if getattr(config, name) == getattr(SeekConfig, name)}

    sizes = sizes if "learn_chunk" in free else ()

    def group(some: Sequence[int], **options: Any) -> list[SeekConfig]:
        options = {name: value for name, value in options.items() if name in free}
        if not sizes:
            return [dataclasses.replace(config, **options)]
        return [dataclasses.replace(config, **options, learn_chunk=size) for size in some]

    large = [size for size in sizes if device == "cpu" or size >= _SMALL]
    small = [size for size in sizes if size not in large]
    prefill = {"prefill_chunk": _PREFILL} if tokens > _PREFILL else {}
    block = {**prefill, "recompute": "block"}
    if device != "cpu":
        block["chunk_bytes"] = CPU_CHUNK_BYTES
    groups = [group(large), group(large, **prefill), group(large, **block)]
    groups += [group(small), group(small, **prefill), group(small, **block)]
    eager = config.backend == "eager" and device != "cpu"  # where the host is the device
    if eager and ("recompute" in free or config.recompute == "block"):
        groups += [group(large, **block, kv="offload"), group(small, **block, kv="offload")]
    for index, ways in enumerate(groups):
        if ways and ways != [config] and ways not in groups[:index]:
            yield ways


def _largest(peaks: Peaks, ways: Sequence[SeekConfig], budget: int) -> tuple[SeekConfig, int]:
    """The first of some ways that fits, or the last, which needs least; and its peak."""
    at = last = len(ways) - 1  # which fits, if any does
    if peaks(ways[last]) <= budget:
        at = bisect.bisect_left(ways, True, hi=last, key=lambda way: peaks(way) <= budget)
    return ways[at], peaks(ways[at])


def _what_fits(model: nn.Module, lean: SeekConfig, peaks: Peaks, least: int) -> str:
    """Which ratio, and which length, would fit."""
    budget, tokens = lean.budget, peaks.tokens
    assert budget is not None
    found: list[str] = []
    for share in (0.1, 0.25, 0.5):
        if share >= lean.ratio_range[1] or peaks(dataclasses.replace(lean, ratio=share)) > budget:
            break  # a number in the place of "mass:0.9" too
        found = [f"ratio={share}"]
    known = {tokens: least}
    length = tokens // 2
    for _ in range(_TRIES):
        length = length // _MULTIPLE * _MULTIPLE
        if length <= 0 or length in known:
            break
        known[length] = Peaks(model, lean, length, peaks.batch, peaks.device)(lean)
        (low, few), (high, many) = sorted(known.items())[:2]
        slope = max((many - few) / (high - low), 1e-9)
        length = min(high - 1, int(low + (budget - few) / slope))  # as if memory grew in a line
    fits = [length for length, peak in known.items() if peak <= budget]
    if fits:
        found.append(f"rows of {max(fits)} tokens")
    return ", or ".join(found) or "fewer or shorter rows"


def _owned(model: nn.Module) -> int:
    """Bytes of the weights and of their gradients."""
    count = 0
    for tensor in {id(x): x for x in module_tensors(model)}.values():
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        count += tensor.nbytes * (2 if trained else 1)
    return count


def _told(budget: int) -> str:
    return f"memory_budget_bytes={budget} ({formatted(budget)})"


def _changes(config: SeekConfig, way: SeekConfig) -> str:
    changed = [n for n in _OPTIONS if getattr(way, n) != getattr(config, n)]
    shown = ", ".join(f"{name}={getattr(way, name)!r}" for name in changed)
    return shown or "the configuration as it is"


def _device_of(model: nn.Module) -> str:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "cuda"

"""The ratio that a memory budget allows."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from fxseek.config import SeekConfig
from fxseek.errors import ConfigError
from fxseek.inspect.estimate import peak_of_ratios

__all__ = ["ratio_within"]

log = logging.getLogger("fxseek")

_STEPS = 6
"""Halvings of the range of ratios: its 64th part is what the answer may fall short by."""


def ratio_within(model: nn.Module, config: SeekConfig, tokens: int, batch: int) -> float:
    """The largest ratio of ``config.ratio_bounds`` whose step stays in the memory budget.

    The peak is that of `fxseek.estimate`: weights, gradients and activations, without optimiser
    state. The model is copied without its weights and left as it is.

    Raises:
        ConfigError: the smallest ratio of the bounds needs more; the message says how much.
    """
    budget = config.memory_budget_bytes
    assert budget is not None
    low, high = config.ratio_bounds
    plain = dataclasses.replace(config, memory_budget_bytes=None, ratio=low, backend="eager")
    peak = peak_of_ratios(model, plain, tokens, batch, device=_device_of(model))
    least = peak(low)
    if least > budget:
        raise ConfigError(
            f"memory_budget_bytes={budget} ({_gib(budget)}) cannot be reached: a step of {batch} "
            f"rows of {tokens} tokens needs {_gib(least)} at the smallest ratio of "
            f"ratio_bounds={config.ratio_bounds}. {_remedy(config)}"
        )
    if peak(high) <= budget:
        chosen = high
    else:
        chosen = low
        for _ in range(_STEPS):
            middle = (chosen + high) / 2
            if peak(middle) <= budget:
                chosen = middle
            else:
                high = middle
    log.info(
        "fxseek: ratio %.3f fits memory_budget_bytes=%d for %d rows of %d tokens",
        chosen, budget, batch, tokens,
    )  # fmt: skip
    return chosen


def _remedy(config: SeekConfig) -> str:
    remedies = []
    if config.recompute != "block":
        remedies.append('pass recompute="block"')
    if config.kv == "device":
        remedies.append('keep keys and values on the host (recompute="block", kv="offload")')
    if config.prefill_chunk is None:
        remedies.append("pass prefill_chunk=")
    remedies.append("use fewer or shorter rows")
    return f"To need less, {', or '.join(remedies)}."


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _device_of(model: nn.Module) -> str:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "cuda"

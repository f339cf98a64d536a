"""Autocast where code runs outside the region that it was called in, or must not be in one.

Each function takes the type of a device, `tensor.device.type`; a type without autocast (``"meta"``)
is never in one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

__all__ = ["autocast_dtype", "no_autocast", "same_autocast"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """What products are computed in here; None outside autocast."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Outside autocast, which would run products in half precision, whatever they are given."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def same_autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that is in force, to be entered again."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype, enabled=on)

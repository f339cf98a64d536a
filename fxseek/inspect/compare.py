"""Gradients against gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fxseek._fsdp import is_sharded
from fxseek.errors import InputError

__all__ = ["Comparison", "compare"]

_FLOOR = 1e-3
"""The least that an error is relative to, of the largest entry of all parameters."""


class Comparison(NamedTuple):
    """The largest relative error between two sets of gradients, and the parameter it is in."""

    error: float
    name: str


def compare(
    gradients: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor | None],
) -> Comparison:
    """The largest error of ``gradients``, relative to ``reference``, and where it is.

    An error is relative to the largest entry, in magnitude, of that parameter's reference gradient,
    but at least 0.001 of the largest of all parameters: a gradient that is zero but for rounding,
    such as a key bias under full attention, has no relative error to speak of. A missing gradient
    (no entry, or None) counts as zeros. NaN and infinity give an infinite error. Sharded gradients
    are gathered one by one: all processes find the same.

    Raises:
        InputError: Two gradients of one parameter have different shapes.
    """
    names = list(dict.fromkeys([*reference, *gradients]))
    scales = {}
    for name in names:
        wanted = _whole(reference.get(name))
        scales[name] = 0.0 if wanted is None or not wanted.numel() else wanted.abs().max().item()
    lowest = max(_FLOOR * max(scales.values(), default=0.0), torch.finfo(torch.float64).tiny)
    worst = Comparison(0.0, names[0] if names else "")
    for name in names:
        got, wanted = _whole(gradients.get(name)), _whole(reference.get(name))
        if got is None and wanted is None:
            continue
        if got is not None and wanted is not None and got.shape != wanted.shape:
            raise InputError(
                f"the gradient of {name!r} has shape {tuple(got.shape)} and its reference "
                f"{tuple(wanted.shape)}; compare gradients of the same parameters"
            )
        got = torch.zeros_like(wanted) if got is None else got.detach()  # type: ignore[arg-type]
        wanted = torch.zeros_like(got) if wanted is None else wanted.detach()
        if not got.numel():
            continue
        difference = (got.double() - wanted.to(got.device).double()).abs().max().item()
        error = difference / max(scales[name], lowest)
        if not math.isfinite(error):
            error = math.inf
        if error > worst.error:
            worst = Comparison(error, name)
    return worst


def _whole(gradient: Tensor | None) -> Tensor | None:
    return gradient.full_tensor() if is_sharded(gradient) else gradient  # type: ignore[union-attr]

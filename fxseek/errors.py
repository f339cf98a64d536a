"""The exceptions fxseek raises: one base class, one child per kind of cause.

Every message says what was wrong, what was found, and what to do about it. The children that stand
for a bad value are also ``ValueError``, so that callers who catch the built-in class still do.
"""

from __future__ import annotations

import torch

__all__ = [
    "CaptureError",
    "ConfigError",
    "FxseekError",
    "GradientMismatch",
    "GraphError",
    "InputError",
    "ScoreError",
]


class FxseekError(RuntimeError):
    """Base of everything fxseek raises on purpose."""


class ConfigError(FxseekError, ValueError):
    """An argument of ``fxseek.compile`` or a field of ``SeekConfig`` cannot be used."""


class InputError(FxseekError, ValueError):
    """A batch or an argument of a call cannot be used, or the model is in no state for the call.

    For example: sizes that disagree, an empty batch, a model that is not compiled.
    """


class CaptureError(FxseekError):
    """Dynamo could not capture the model as one graph."""


class GraphError(FxseekError):
    """A captured graph cannot be rewritten.

    For example: no token dimension, no attention for a score that needs one, a mutation that
    cannot be undone.
    """


class ScoreError(FxseekError, ValueError):
    """Token scores cannot be used.

    They are NaN or ``+inf``, of another shape or type, or negative where they are a mass.
    """


class GradientMismatch(FxseekError, AssertionError):
    """Gradients differ from masked full backprop by more than the tolerance."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the CPU torch's error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )

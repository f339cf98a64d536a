"""Token-selective fine-tuning as a compiler pass.

model = fxseek.compile(model, ratio=0.1)
model(input_ids=..., attention_mask=..., labels=...).loss.backward()
"""

from fxseek.backend import StepReport
from fxseek.check import GradientCheck, check_gradients
from fxseek.config import SeekConfig
from fxseek.errors import (
    CaptureError,
    ConfigError,
    FxseekError,
    GradientMismatch,
    GraphError,
    InputError,
    ScoreError,
)
from fxseek.explain import Explanation, Fallback, explain
from fxseek.scoring import ScoreInputs
from fxseek.step import compile, report, uncompile

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ConfigError",
    "Explanation",
    "Fallback",
    "FxseekError",
    "GradientCheck",
    "GradientMismatch",
    "GraphError",
    "InputError",
    "ScoreError",
    "ScoreInputs",
    "SeekConfig",
    "StepReport",
    "check_gradients",
    "compile",
    "explain",
    "report",
    "uncompile",
]

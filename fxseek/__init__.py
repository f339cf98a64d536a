"""Token-selective fine-tuning as a compiler pass.

model = fxseek.compile(model, ratio=0.1)
model(input_ids=..., attention_mask=..., labels=...).loss.backward()
"""

from typing import TYPE_CHECKING, Any

from fxseek.api import compile, report, resume, uncompile
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
from fxseek.inspect.check import GradientCheck, check_gradients
from fxseek.inspect.compare_memory import MemoryComparison, compare_memory
from fxseek.inspect.estimate import Estimate, estimate
from fxseek.inspect.explain import Explanation, Fallback, explain
from fxseek.inspect.profile import Profile, profile
from fxseek.inspect.qualities import GradientQuality
from fxseek.inspect.quality import gradient_quality
from fxseek.reports.step import StepReport
from fxseek.scores import ScoreInputs

if TYPE_CHECKING:
    from fxseek.integrations.trainer import SeekCallback

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ConfigError",
    "Estimate",
    "Explanation",
    "Fallback",
    "FxseekError",
    "GradientCheck",
    "GradientMismatch",
    "GradientQuality",
    "GraphError",
    "InputError",
    "MemoryComparison",
    "Profile",
    "ScoreError",
    "ScoreInputs",
    "SeekCallback",
    "SeekConfig",
    "StepReport",
    "check_gradients",
    "compare_memory",
    "compile",
    "estimate",
    "explain",
    "gradient_quality",
    "profile",
    "report",
    "resume",
    "uncompile",
]


def __getattr__(name: str) -> Any:
    """`SeekCallback` on first use: it needs transformers, and nothing else here does."""
    if name == "SeekCallback":
        from fxseek.integrations.trainer import SeekCallback

        return SeekCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

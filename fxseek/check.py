"""`fxseek.check_gradients`: a compiled model against masked full backprop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxseek.backend import StepReport
from fxseek.errors import GradientMismatch, InputError
from fxseek.passes.facts import example, tensors_of
from fxseek.reference import Reference, compare, masked_backprop
from fxseek.step import SeekStep, step_of

__all__ = ["GradientCheck", "check_gradients"]

_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 1e-1,
    torch.float16: 3e-2,
}


@dataclass(frozen=True)
class GradientCheck:
    """How far the gradients are from masked full backprop.

    `error`: the largest difference of any entry, relative to the largest entry of that
    parameter's reference gradient; `parameter`: where; `tolerance`: what was allowed.
    """

    error: float
    parameter: str
    tolerance: float


def check_gradients(
    model: nn.Module, /, tolerance: float | None = None, **batch: Any
) -> GradientCheck:
    """Compare one step's gradients with masked full backprop of the same selection.

    The model's gradients, random state and step count are put back. The reference runs the
    uncompiled model with module hooks and shares no code with the passes.

    Args:
        model: a model compiled by `fxseek.compile`, in training mode.
        tolerance: largest relative error; by default by the lowest precision that the model
            computes in (float64 1e-9, float32 1e-4, float16 3e-2, bfloat16 1e-1).
        batch: the arguments of a training step.

    Raises:
        GradientMismatch: the error is above the tolerance.
        InputError: the model is not compiled, or dropout is on (prefill and learn draw
            separately, so that exactness is stated with dropout off).
    """
    step = step_of(model)
    if step is None:
        raise InputError("the model is not compiled by fxseek: call fxseek.compile first")
    if not model.training:
        raise InputError("check_gradients needs training mode: call model.train() first")
    noisy = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training
    ]
    if noisy:
        raise InputError(
            f"dropout is on in {noisy[0]!r} (and {len(noisy) - 1} more): gradients are exact with "
            "dropout off. Set its p to 0 for the check (and leave the model in training mode)."
        )
    with _put_back(model, step):
        output = model(**batch)
        loss = _own_loss(output, batch)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        last = step.recorder.last
        assert last is not None
        for parameter in model.parameters():
            parameter.grad = None
        reference = _reference(model, step, last, batch)
    allowed = _tolerance(step) if tolerance is None else tolerance
    worst = compare(found, reference.gradients)
    if not worst.error <= allowed:
        raise GradientMismatch(
            f"the gradient of {worst.name!r} differs from masked full backprop by "
            f"{worst.error:.3g} relative (allowed {allowed:.3g}). If the model draws random "
            "numbers in forward, switch that off for the check; otherwise this is a defect of "
            "fxseek: please report it with fxseek.explain(model, **batch)."
        )
    return GradientCheck(worst.error, worst.name, allowed)


def _reference(
    model: nn.Module, step: SeekStep, last: StepReport, batch: dict[str, Any]
) -> Reference:
    """Masked full backprop of what the step selected."""
    program = step.recorder.program
    virtual = 0 if program is None or program.sizes is None else program.sizes.virtual
    loss = _reference_loss(step)
    try:
        return masked_backprop(
            model, batch, last.selected, weights=last.weights, loss=loss, virtual=virtual
        )
    except InputError:
        if loss is not None:
            raise
    # Something is added to the token loss (a regulariser, say): take the model's own sum.
    with _SelectedCrossEntropy(last):
        return masked_backprop(model, batch, last.selected, loss=_own_loss, virtual=virtual)


def _reference_loss(step: SeekStep) -> Callable[[Any, Mapping[str, Any]], Tensor] | None:
    """The caller's loss, with its token cross-entropies over the selected positions only.

    A model whose own loss is none over tokens (a classifier's) is held to that loss as it is.
    """
    loss, last = step.config.loss, step.recorder.last
    program = step.recorder.program
    structure = None if program is None else program.structure
    if loss is None and structure is not None and structure.loss is None:
        return _own_loss
    if loss is None or last is None:
        return None
    given, report = loss, last

    def over_selected(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        with _SelectedCrossEntropy(report):
            return given(outputs, batch)

    return over_selected


def _own_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs[0] if isinstance(outputs, tuple) else outputs["loss"]


class _SelectedCrossEntropy(TorchFunctionMode):
    """Replaces a token cross-entropy by its weighted mean over selected labelled positions."""

    def __init__(self, report: StepReport) -> None:
        super().__init__()
        self.report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy or kwargs.get("reduction", "mean") == "none":
            return func(*args, **kwargs)
        bound = inspect.signature(F.cross_entropy).bind(*args, **kwargs).arguments
        target, report = bound["target"], self.report
        rows, length = report.selected.shape[0], target.numel() // report.selected.shape[0]
        if length not in (report.tokens, report.tokens - 1) or bound.get("weight") is not None:
            return func(*args, **kwargs)
        per_token = target.new_zeros(rows, report.tokens + 1, dtype=report.weights.dtype)
        at = report.selected.where(report.selected >= 0, report.tokens)  # -1: a place of its own
        per_token.scatter_(1, at, report.weights)
        chosen = torch.zeros_like(per_token, dtype=torch.bool).scatter_(1, at, True)
        ignored = bound.get("ignore_index", -100)
        weights = per_token[:, :length].reshape(target.shape)
        labelled = (target != ignored) & chosen[:, :length].reshape(target.shape)
        losses = F.cross_entropy(**{**bound, "reduction": "none"})
        mean = (losses * weights).sum() / labelled.sum().clamp(min=1)
        if bound.get("reduction", "mean") == "sum":
            return mean * (target != ignored).sum()
        return mean


def _tolerance(step: SeekStep) -> float:
    """By the lowest precision among the values that carry gradient."""
    dtypes = {
        tensor.dtype
        for node in ([] if step.recorder.program is None else step.recorder.program.graph.nodes)
        for tensor in tensors_of(example(node))
        if tensor.requires_grad and tensor.dtype in _TOLERANCES
    }
    return max((_TOLERANCES[dtype] for dtype in dtypes), default=1e-4)


@contextmanager
def _put_back(model: nn.Module, step: SeekStep) -> Iterator[None]:
    gradients: dict[nn.Parameter, Tensor | None] = {p: p.grad for p in model.parameters()}
    count, last = step.recorder.step, step.recorder.last
    devices = sorted({p.device.index or 0 for p in gradients if p.device.type == "cuda"})
    try:
        for parameter in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        step.recorder.step, step.recorder.last = count, last

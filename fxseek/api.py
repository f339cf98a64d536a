"""`fxseek.compile`, and what is asked of a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fxseek import _fsdp, _torch
from fxseek.capture.backend import latest_is_released, latest_recorder
from fxseek.capture.limits import refuse_model
from fxseek.capture.sharded import config_for_shards
from fxseek.capture.step import SeekStep, compiled_step, step_of
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError, InputError
from fxseek.inspect.budget import within_budget
from fxseek.reports.step import StepReport

__all__ = ["compile", "report", "resume", "uncompile"]

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model, ratio: float | str | Callable[[int], float] | SeekConfig = 0.1, **options: Any
) -> Model:
    """Make a model's training step keep the activations of selected tokens only.

    In training mode, with grad enabled, a call of the model runs the compiled step: all tokens
    once without grad, scores, and the best ``ceil(ratio · tokens)`` of each row with grad. In eval
    mode and under ``torch.no_grad`` the model is what it was. Where the loss is computed outside
    the model (by TRL, or of a call without labels), outputs have the values of all tokens, and
    gradients go through the selected ones.

    The default is the paper's. Take ``ratio=1.0, learn_chunk=256``, which is ordinary fine-tuning,
    where memory is short (on a GPU larger parts), and for preferences and rewards;
    ``ratio="labelled"`` where only completions have labels; ``ratio=0.5, score="gradient",
    select="sample"`` where time is short on a CPU. What shares of the tokens teach was measured
    (docs/quality.md); `gradient_quality` compares them on your data.

    Args:
        model: any module that Dynamo captures as one graph; returned itself, not wrapped.
        ratio: share of tokens that are back-propagated through, in (0, 1]; ``"mass:0.9"`` for as
            few of each row as hold 90 % of its score mass; ``"labelled"`` for those that have a
            label; ``"0.1->0.5"`` or a function of the step; or a `SeekConfig`.
        options: fields of `SeekConfig`: score, select, alpha, beta, backend, ...

    Raises:
        ConfigError: an argument is out of range, the model is compiled already or wrapped for
            parallel training, or something of it cannot be compiled (its attention, Liger's
            forwards, NEFTune, packed 4-bit weights, context parallelism; with FSDP2 a compiled
            backend or a budget).

    The first training step captures the model, and may raise `CaptureError`, `GraphError`,
    `ScoreError`, `InputError`, or `ConfigError` where the budget cannot be reached or a ratio needs
    a number of steps.

    Source: TokenSeek, arXiv 2601.19739. Gradients equal masked full backprop (docs).
    """
    config = SeekConfig.make(ratio, **options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.named_modules())
    refuse_model(modules, ConfigError)
    compiled = [name for name, module in modules if step_of(module) is not None]
    if compiled:
        part = f"{compiled[0]!r} in the model" if compiled[0] else "the model"
        raise ConfigError(
            f"{part} is compiled by fxseek already; call fxseek.uncompile on it first"
            + ("" if compiled[0] else " to change the configuration")
        )
    if _torch.is_compiled(model):
        raise ConfigError(
            "the model is compiled by torch.compile already. Give fxseek the plain model, and "
            'choose what runs the learn stage by backend="inductor".'
        )
    if _fsdp.sharded_modules(module for _, module in modules):
        config_for_shards(config, ConfigError)
    step = SeekStep(model, config, fit=within_budget)
    step.switches.off(modules)
    _torch.set_compiled_call(model, step)
    return model


def uncompile(model: Model) -> Model:
    """Give the model its original call back.

    Args:
        model: a model, compiled or not; returned itself.

    Raises:
        InputError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    step = step_of(model)
    if step is not None:
        step.switches.restore()
        _torch.set_compiled_call(model, None)
    return model


def report(model: nn.Module | None = None) -> StepReport:
    """What the last training step selected, scored and saved; see `StepReport`.

    Args:
        model: a model compiled by `fxseek.compile`. None for the last step of this thread, also
            one of ``torch.compile(..., backend="fxseek")``.

    Raises:
        InputError: the model is not compiled by fxseek, no training step has run, or the model or
            compiled function of the last one is gone. A report that was asked for before stays.
    """
    recorder = latest_recorder() if model is None else compiled_step(model).recorder
    if model is None and latest_is_released():
        raise InputError(
            "the model or compiled function of this thread's last step is gone, and its report "
            "with it: keep the model, or ask for the report before it is released"
        )
    if recorder is None or recorder.last is None:
        raise InputError(
            "no training step has run: call the model in training mode, with grad enabled"
        )
    return recorder.last


def resume(model: nn.Module, step: int) -> None:
    """Let the next training step of a compiled model be number `step`.

    Random scores, samples and spans are drawn from the seed and the number of the step, counted per
    forward, which a ratio may follow too. After a restart, a loop that has run `step` of them goes
    on where it was: ``fxseek.report(model).step + 1`` at the time of saving. `SeekCallback` does it
    in a Trainer.

    Args:
        model: a model compiled by `fxseek.compile`.
        step: the number of training steps that have been run, 0 or more.

    Raises:
        InputError: the model is not compiled by fxseek, or `step` is not a number of steps.
    """
    compiled = compiled_step(model)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step={step!r} is not a number of steps: pass an integer of at least 0")
    compiled.recorder.step = step

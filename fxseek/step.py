"""`fxseek.compile` and what it puts in a model's place for a compiled call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.backend import Recorder, StepReport, latest_recorder, make_backend
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError, FxseekError, InputError
from fxseek.passes.facts import DECODER_INPUTS, PRIMARY_INPUTS

__all__ = ["SeekStep", "compile", "report", "step_of", "uncompile"]

log = logging.getLogger("fxseek")

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, ratio: float | SeekConfig = 0.1, **options: Any) -> Model:
    """Make a model's training step keep the activations of selected tokens only.

    In training mode, with grad enabled and labels given, a call of the model runs the
    compiled step: all tokens once without grad, scores, and the best ``ceil(ratio · tokens)``
    of each row with grad. In eval mode and under ``torch.no_grad`` the model is what it was.

    Args:
        model: any module that Dynamo captures as one graph; returned itself, not wrapped.
        ratio: share of tokens that are back-propagated through, in (0, 1], or a `SeekConfig`.
        options: fields of `SeekConfig`: score, select, alpha, beta, backend, ...

    Raises:
        ConfigError: an argument is out of range, or the model is compiled already.

    Source: TokenSeek, arXiv 2601.19739. Gradients equal masked full backprop (docs).
    """
    config = SeekConfig.make(ratio, **options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if step_of(model) is not None:
        raise ConfigError(
            "the model is compiled by fxseek already; call fxseek.uncompile(model) first to "
            "change the configuration"
        )
    if _torch.compiled_call(model) is not None or isinstance(
        model, torch._dynamo.eval_frame.OptimizedModule
    ):
        raise ConfigError(
            "the model is compiled by torch.compile already. Give fxseek the plain model, and "
            'choose how its stages are lowered by backend="inductor".'
        )
    step = SeekStep(model, config)
    step.switch_off_checkpointing()
    _torch.set_compiled_call(model, step)
    return model


def uncompile(model: Model) -> Model:
    """Give the model its original call back; returns it. A model that is not compiled stays."""
    step = step_of(model)
    if step is not None:
        step.restore_checkpointing()
        _torch.set_compiled_call(model, None)
    return model


def step_of(model: nn.Module) -> SeekStep | None:
    """The compiled step of a model, or None."""
    call = _torch.compiled_call(model)
    return call if isinstance(call, SeekStep) else None


def report(model: nn.Module | None = None) -> StepReport:
    """What the last training step selected, scored and saved; see `StepReport`.

    Without a model: the last step of ``torch.compile(..., backend="fxseek")`` in this thread.

    Raises:
        InputError: the model is not compiled by fxseek, or no training step has run.
    """
    if model is None:
        recorder = latest_recorder()
    else:
        step = step_of(model)
        if step is None:
            raise InputError("the model is not compiled by fxseek: call fxseek.compile first")
        recorder = step.recorder
    if recorder is None or recorder.last is None:
        raise InputError(
            "no training step has run: call the model in training mode, with labels and with "
            "grad enabled"
        )
    return recorder.last


class SeekStep:
    """What `nn.Module.__call__` runs instead of the module's own call."""

    def __init__(self, model: nn.Module, config: SeekConfig) -> None:
        self.model = model
        self.config = config
        self.recorder = Recorder()
        self.signature = inspect.signature(model.forward)
        self._restore: list[Callable[[], None]] = []
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.token_inputs = DECODER_INPUTS if self.seq2seq else None
        self.use_backend(
            make_backend(config, self.recorder, full_outputs=False, token_inputs=self.token_inputs)
        )

    def use_backend(self, backend: Callable[..., Any]) -> None:
        """Compile the model's call with this backend (nothing is captured before a call)."""
        model, loss = self.model, self.config.loss
        call = _torch.eager_call(model)
        if loss is None:
            self._compiled = torch.compile(call, backend=backend, fullgraph=True)
            return

        def with_loss(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            return loss(outputs, kwargs), outputs

        self._compiled = torch.compile(with_loss, backend=backend, fullgraph=True)

    # ---- the call ------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The training step where there is something to train on, else the original call."""
        model = self.model
        if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return _torch.eager_call(model)(*args, **kwargs)
        batch = self._bind(args, kwargs)
        if self.config.loss is None and not self._has_labels(batch):
            raise InputError(
                "no labels: in training mode fxseek selects tokens for the loss, so the model "
                "must be given labels=. Pass them, or give fxseek.compile a loss= callable; for "
                "inference call model.eval() or use torch.no_grad()."
            )
        self.switch_off_checkpointing()
        if self._takes_use_cache(batch):
            batch["use_cache"] = False
        marked = self._marked(batch)
        mask = batch.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
        self.recorder.padding_mask = mask if plain else None
        try:
            return self._run(marked)
        finally:
            self.recorder.padding_mask = None

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name (positional ones get the names of the signature)."""
        batch: dict[str, Any] = {}
        names = [
            name
            for name, parameter in self.signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if len(args) > len(names):
            raise InputError(
                f"{type(self.model).__name__}.forward takes {len(names)} positional arguments "
                f"and was given {len(args)}: pass tensors by name"
            )
        batch.update(zip(names, args, strict=False))
        twice = set(batch) & set(kwargs)
        if twice:
            raise InputError(f"argument {sorted(twice)[0]!r} was given twice")
        batch.update(kwargs)
        return batch

    def _has_labels(self, batch: dict[str, Any]) -> bool:
        return any(
            isinstance(value, Tensor) and (name == "labels" or name.endswith("_labels"))
            for name, value in batch.items()
        )

    def _takes_use_cache(self, batch: dict[str, Any]) -> bool:
        if getattr(getattr(self.model, "config", None), "use_cache", None) is None:
            return False
        parameters = self.signature.parameters
        return "use_cache" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def _marked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with dynamic token and batch dimensions, on aliases of its tensors."""
        dim = self.config.token_dim
        names = [name for name in PRIMARY_INPUTS if isinstance(batch.get(name), Tensor)]
        if not names:
            names = [k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > dim]
        if not names:
            given = ", ".join(sorted(batch)) or "nothing"
            raise InputError(
                f"no tensor argument has a token dimension (dimension {dim}); got {given}. Pass "
                "token_dim= to fxseek.compile if tokens are elsewhere."
            )
        primary = batch[names[0]]
        if primary.dim() <= dim:
            raise InputError(
                f"{names[0]} has the shape {list(primary.shape)}; its dimension {dim} must "
                "count tokens"
            )
        rows, tokens = primary.shape[0], primary.shape[dim]
        self._check_lengths(batch, names[0], rows, tokens)
        decoder = [batch.get(name) for name in self.token_inputs or ()]
        lengths = {x.shape[dim] for x in decoder if isinstance(x, Tensor) and x.dim() > dim}
        lengths = {tokens, *lengths} - {1}
        aliases: dict[int, Tensor] = {}

        def alias(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if id(value) in aliases:
                return aliases[id(value)]
            view = value.view_as(value)
            if value.dim() > dim and value.shape[dim] in lengths:
                _torch.mark_dynamic(view, dim)
            if value.dim() == 4 and value.shape[2:] == (tokens, tokens) and tokens > 1:
                _torch.mark_dynamic(view, 2)
                _torch.mark_dynamic(view, 3)
            if value.shape[0] == rows and rows > 1 and dim > 0:
                _torch.mark_dynamic(view, 0)
            aliases[id(value)] = view
            return view

        return {name: alias(value) for name, value in batch.items()}

    def _check_lengths(self, batch: dict[str, Any], primary: str, rows: int, tokens: int) -> None:
        """Integer [batch, tokens] arguments must be as long as the tokens are."""
        if self.config.token_dim != 1 or self.seq2seq:
            return
        for name in ("labels", "attention_mask", "position_ids"):
            other = batch.get(name)
            if not isinstance(other, Tensor) or other.dim() != 2 or other.is_floating_point():
                continue
            if other.shape[0] not in (1, rows) or other.shape[1] != tokens:
                raise InputError(
                    f"{name} has the shape {list(other.shape)}, {primary} has {rows} rows of "
                    f"{tokens} tokens: both must be [batch, tokens]"
                )

    def _run(self, batch: dict[str, Any]) -> Any:
        try:
            with _torch.capture_settings(first=not self.recorder.programs):
                result = self._compiled(**batch)
        except FxseekError:
            raise
        except Exception as error:
            raise _torch.translated(error, type(self.model).__name__) from error
        if self.config.loss is None:
            return result
        loss, outputs = result
        return _with_loss(outputs, loss)

    # ---- what is in the way of a capture -------------------------------------------------

    def switch_off_checkpointing(self) -> None:
        """Switch gradient checkpointing and the input-require-grads hook off, and say so."""
        modules = [
            module
            for module in self.model.modules()
            if getattr(module, "gradient_checkpointing", False) is True
        ]
        for module in modules:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010 - not declared on Module
            self._restore.append(partial(setattr, module, "gradient_checkpointing", True))
        if modules:
            log.warning(
                "fxseek: gradient checkpointing is switched off; the compiled step keeps the "
                "activations of selected tokens only, so there is nothing left to checkpoint"
            )
        hooks = _input_hooks(self.model)
        for table, key in hooks:
            self._restore.append(partial(table.__setitem__, key, table.pop(key)))
        if hooks:
            log.warning(
                "fxseek: the input-require-grads hook is removed; only gradient checkpointing "
                "needs it, and it cannot be captured"
            )

    def restore_checkpointing(self) -> None:
        """Undo `switch_off_checkpointing`."""
        while self._restore:
            self._restore.pop()()


def _input_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks that make embeddings' outputs require grad (transformers and peft name them so)."""
    return [
        (module._forward_hooks, key)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if "make_inputs_require_grad" in getattr(hook, "__name__", "")
    ]


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    """The model's output with the loss in it: as ``["loss"]`` of a mapping, else first."""
    if isinstance(outputs, dict):
        outputs["loss"] = loss
        return outputs
    if isinstance(outputs, tuple):
        return (loss, *outputs)
    return loss, outputs

"""`fxseek.compile` and what it puts in a model's place for a compiled call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxseek import _torch
from fxseek.backend import Recorder, StepReport, latest_recorder, make_backend
from fxseek.config import SeekConfig
from fxseek.errors import CaptureError, ConfigError, FxseekError, InputError
from fxseek.limits import refuse_attention, refuse_wrapper, uses_cache
from fxseek.masks import read_tokens
from fxseek.passes.facts import DECODER_INPUTS, PRIMARY_INPUTS, may_batch, may_count
from fxseek.quantised import trace_dequantisation
from fxseek.recorders import install_recorders
from fxseek.uncomputed import Uncomputed, cleared

__all__ = ["SeekStep", "compile", "report", "resume", "step_of", "uncompile"]

log = logging.getLogger("fxseek")

Model = TypeVar("Model", bound=nn.Module)

# What a step of one model may be captured for: dtypes, adapters, one row or many, ...
_CAPTURES = 64


def compile(model: Model, ratio: float | str | SeekConfig = 0.1, **options: Any) -> Model:
    """Make a model's training step keep the activations of selected tokens only.

    In training mode, with grad enabled and labels given, a call of the model runs the
    compiled step: all tokens once without grad, scores, and the best ``ceil(ratio · tokens)``
    of each row with grad. In eval mode and under ``torch.no_grad`` the model is what it was.

    Args:
        model: any module that Dynamo captures as one graph; returned itself, not wrapped.
        ratio: share of tokens that are back-propagated through, in (0, 1]; ``"mass:0.9"`` for as
            few of each row as hold 90 % of its score mass; or a `SeekConfig`.
        options: fields of `SeekConfig`: score, select, alpha, beta, backend, ...

    Raises:
        ConfigError: an argument is out of range, the model is compiled already or wrapped for
            parallel training, or its attention cannot be compiled.

    Source: TokenSeek, arXiv 2601.19739. Gradients equal masked full backprop (docs).
    """
    config = SeekConfig.make(ratio, **options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapper(model, ConfigError)
    compiled = [name for name, module in model.named_modules() if step_of(module) is not None]
    if compiled:
        part = f"{compiled[0]!r} in the model" if compiled[0] else "the model"
        raise ConfigError(
            f"{part} is compiled by fxseek already; call fxseek.uncompile on it first"
            + ("" if compiled[0] else " to change the configuration")
        )
    if _torch.is_compiled(model):
        raise ConfigError(
            "the model is compiled by torch.compile already. Give fxseek the plain model, and "
            'choose how its stages are lowered by backend="inductor".'
        )
    refuse_attention(model, ConfigError)
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


def resume(model: nn.Module, step: int) -> None:
    """Let the next training step of a compiled model be number `step`.

    Random scores and samples are drawn from the seed and the number of the step, counted per
    forward. After a restart, a loop that has run `step` of them goes on where it was:
    ``fxseek.report(model).step + 1`` at the time of saving. `SeekCallback` does it in a Trainer.

    Raises:
        InputError: the model is not compiled by fxseek, or `step` is not a number of steps.
    """
    compiled = step_of(model)
    if compiled is None:
        raise InputError("the model is not compiled by fxseek: call fxseek.compile first")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step={step!r} is not a number of steps: pass an integer of at least 0")
    compiled.recorder.step = step


class SeekStep:
    """What `nn.Module.__call__` runs instead of the module's own call.

    `shapes_only`: the call is captured and not run (`fxseek.explain`), so that any device will do.
    """

    shapes_only = False

    def __init__(self, model: nn.Module, config: SeekConfig) -> None:
        self.model = model
        self.config = config
        self.recorder = Recorder()
        self.signature = inspect.signature(model.forward)
        self._restore: list[Callable[[], None]] = []
        self._buffers: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        """Each module's buffers as they were at a capture, until its first step is done."""
        self._told: set[str] = set()
        self._seen_positions = False
        self._largest = 0
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.token_inputs = DECODER_INPUTS if self.seq2seq else None
        self.use_backend(
            make_backend(config, self.recorder, full_outputs=False, token_inputs=self.token_inputs)
        )

    def use_backend(self, backend: Callable[..., Any]) -> None:
        """Compile the model's call with this backend (nothing is captured before a call)."""
        self._backend, self._global_hooks = backend, _torch.global_hooks()
        model, loss = self.model, self.config.loss
        call = _torch.eager_call(model)
        options: dict[str, Any] = {"fullgraph": True}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
            options["isolate_recompiles"] = True  # models share code: each counts its own captures

        def with_loss(*args: Any, **kwargs: Any) -> Any:
            # a function of ours: Dynamo would break a bare call up at the model's own hooks
            outputs = call(*args, **kwargs)
            return None if loss is None else _scalar(loss(outputs, kwargs)), outputs

        def capture(gm: fx.GraphModule, examples: Any) -> Callable[..., Any]:
            self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
            return backend(gm, examples)

        self._plain = with_loss
        self._compiled = torch.compile(with_loss, backend=capture, **options)

    # ---- the call ------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The training step where there is something to train on, else the original call."""
        model = self.model
        if not (model.training and torch.is_grad_enabled()):
            return _torch.eager_call(model)(*args, **kwargs)
        return self._train(args, kwargs)

    @torch.compiler.disable(reason="fxseek compiles the training step by itself")
    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The compiled step; a `torch.compile` around the model leaves it alone."""
        refuse_wrapper(self.model, InputError)
        refuse_attention(self.model, InputError)
        batch = self._bind(args, kwargs)
        if batch.get("fused_lm_head"):
            raise InputError(
                "fused_lm_head=True: TRL's SFTTrainer computes its loss outside the model, by a "
                "kernel that cannot be captured. Let it use the model's own loss: override its "
                "compute_loss as docs/quickstart.md shows."
            )
        if self.config.loss is None and not self._has_labels(batch):
            raise InputError(
                "no labels: in training mode fxseek selects tokens for the loss, so the model "
                "must be given labels=. Pass them, or give fxseek.compile a loss= callable; for "
                "inference call model.eval() or use torch.no_grad()."
            )
        self.switch_off_checkpointing()
        self._refuse_cache(batch)
        if self._takes_use_cache(batch):
            self._without_cache(batch)
        if self._global_hooks != _torch.global_hooks():
            self.use_backend(self._backend)
        marked = self._marked(batch)
        if not self.shapes_only:
            self._fit_budget(batch)
        self.recorder.padding_mask = self.padding_mask(batch)
        try:
            return self._run(marked)
        finally:
            self.recorder.padding_mask = None

    def padding_mask(self, batch: dict[str, Any]) -> Tensor | None:
        """Which tokens of the batch are no padding, Bool[batch or 1, tokens]; None without a mask.

        A mask is [batch, tokens], or one of tokens × tokens, or some of these in a dictionary.
        """
        mask = batch.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        parts = [
            part
            for part in (mask.values() if isinstance(mask, dict) else (mask,))
            if isinstance(part, Tensor) and part.dim() in (2, 4)
        ]
        if not parts or any(part.is_meta for part in parts):
            return None
        return functools.reduce(torch.logical_or, map(read_tokens, parts))

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
        if uses_cache(self.model) is None:
            return False
        parameters = self.signature.parameters
        return "use_cache" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def _refuse_cache(self, batch: dict[str, Any]) -> None:
        """A step has no place for keys and values of earlier tokens."""
        for name in _CACHES:
            if batch.get(name) is not None:
                raise InputError(
                    f"{name} was given: a training step reads the tokens that it is given, and no "
                    "keys, values or states of earlier ones. Leave it out and pass all tokens of "
                    "a row, or call the model in eval mode."
                )

    def _without_cache(self, batch: dict[str, Any]) -> None:
        """A training step makes no cache, and computes what the model computes with it.

        Models of transformers take position ids that start again for the documents of a packed row,
        and keep these apart, but only where they make no cache and are given no mask. A mask of
        ones says for a model with a cache that its rows are one document.
        """
        cached = batch.get("use_cache")
        if cached is None:
            cached = uses_cache(self.model)
        elif cached:
            self._tell("use_cache=True is ignored: a training step returns no past_key_values")
        batch["use_cache"] = False
        positions, names = batch.get("position_ids"), self._primary_names(batch)
        primary = batch[names[0]] if names else None
        if (
            not cached
            or self.seq2seq
            or not isinstance(positions, Tensor)
            or not isinstance(primary, Tensor)
            or primary.dim() < 2
            or batch.get("attention_mask") is not None
            or "attention_mask" not in self.signature.parameters
        ):
            return
        batch["attention_mask"] = primary.new_ones(primary.shape[:2], dtype=torch.int64)
        if not self._seen_positions and not positions.is_meta:
            self._seen_positions = True
            if bool((positions.diff(dim=-1) != 1).any()):
                self._tell(
                    "position_ids start again within a row. As in ordinary training, the "
                    "documents of such a row see each other, since the model's use_cache is on: "
                    "pass use_cache=False, or set it in the model's config, to keep them apart"
                )

    def _tell(self, message: str) -> None:
        """Log a warning, once for each model."""
        if message not in self._told:
            self._told.add(message)
            log.warning("fxseek: %s", message)

    def _primary_names(self, batch: dict[str, Any]) -> list[str]:
        """Arguments that may count the tokens, the likeliest first."""
        names = [name for name in PRIMARY_INPUTS if isinstance(batch.get(name), Tensor)]
        dim = self.config.token_dim
        return names or [k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > dim]

    def _marked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with dynamic token and batch dimensions, on aliases of its tensors."""
        dim = self.config.token_dim
        names = self._primary_names(batch)
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
        self._check_extent(primary, names[0])
        self._check_lengths(batch, names[0], rows, tokens)
        decoder = [batch.get(name) for name in self.token_inputs or ()]
        lengths = {x.shape[dim] for x in decoder if isinstance(x, Tensor) and x.dim() > dim}
        lengths = {tokens, *lengths} - {1}
        aliases: dict[int, Tensor] = {}

        def alias(value: Any) -> Any:
            if type(value) is dict:
                return {key: alias(part) for key, part in value.items()}
            if type(value) in (list, tuple):
                return type(value)(alias(part) for part in value)
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if id(value) in aliases:
                return aliases[id(value)]
            view = value.view_as(value)
            for at, size in enumerate(value.shape):
                if (size in lengths and may_count(value, at, dim)) or (
                    size == rows > 1 and dim > 0 and may_batch(value, at)
                ):
                    _torch.mark_dynamic(view, at)
            aliases[id(value)] = view
            return view

        return {name: alias(value) for name, value in batch.items()}

    def _fit_budget(self, batch: dict[str, Any]) -> None:
        """Pick the ratio for the first batch, and for one that is larger than all before."""
        config = self.config_for(batch)
        if config is self.config:
            return
        primary = batch[self._primary_names(batch)[0]]
        self._largest = primary.shape[0] * primary.shape[config.token_dim]
        self.config = config
        self.use_backend(
            make_backend(
                self.config,
                self.recorder,
                full_outputs=False,
                token_inputs=self.token_inputs,
            )
        )

    def config_for(self, batch: dict[str, Any]) -> SeekConfig:
        """The configuration, with the ratio that a memory budget allows for such a batch."""
        names = self._primary_names(batch)
        if self.config.memory_budget_bytes is None or not names:
            return self.config
        from fxseek.budget import ratio_within  # it estimates with a step of this class

        rows, tokens = batch[names[0]].shape[0], batch[names[0]].shape[self.config.token_dim]
        if rows * tokens <= self._largest:
            return self.config
        ratio = ratio_within(self.model, self.config, tokens, rows)
        return dataclasses.replace(self.config, ratio=ratio)

    def _check_extent(self, primary: Tensor, name: str) -> None:
        """There must be rows, values, and tokens to choose from."""
        if primary.is_meta and not self.shapes_only:
            raise InputError(
                f"{name} is on the meta device, which has no values: load the model's weights and "
                "move both to a real device"
            )
        if primary.numel() == 0:
            raise InputError(
                f"{name} has the shape {list(primary.shape)}: the batch is empty. Skip it."
            )
        if primary.shape[self.config.token_dim] == 1:
            raise InputError(
                f"{name} has the shape {list(primary.shape)}: with one token in a row there is "
                "nothing to select. Skip the batch, pad it to two tokens (attention_mask 0), or "
                "train without fxseek.compile."
            )

    def _check_lengths(self, batch: dict[str, Any], primary: str, rows: int, tokens: int) -> None:
        """Integer [batch, tokens] arguments must be as long as the tokens are."""
        if self.config.token_dim != 1 or self.seq2seq:
            return
        for name in ("labels", "attention_mask", "position_ids"):
            other = batch.get(name)
            if not isinstance(other, Tensor) or other.dim() != 2:
                continue
            if other.is_floating_point() and name == "labels":
                continue
            if other.shape[0] not in (1, rows) or other.shape[1] != tokens:
                raise InputError(
                    f"{name} has the shape {list(other.shape)}, {primary} has {rows} rows of "
                    f"{tokens} tokens: both must be [batch, tokens]"
                )

    def _run(self, batch: dict[str, Any]) -> Any:
        try:
            first = not self.recorder.programs
            with _torch.capture_settings(captures=_CAPTURES, first=first), _quiet(batch):
                result = self._captured(batch)
        except FxseekError:
            raise
        except _torch.CapturedTooOften as error:
            raise CaptureError(
                f"{type(self.model).__name__} was captured {_CAPTURES} times: something other than "
                "the length and the batch size changes from step to step. TORCH_LOGS=recompiles "
                "shows what; keep it constant, or call torch._dynamo.reset()."
            ) from error
        except Exception as error:
            told = self._hooked(error)
            own = None
            if told is None:
                told = _torch.translated(error, type(self.model).__name__)
                own = self._own_error(batch) if _torch.may_have_raised(error) else None
            try:
                if own is not None:
                    raise own from own.__cause__
                if told is None:
                    raise
                raise told from error
            finally:
                del told, own  # their tracebacks hold this frame
        if self.recorder.uncomputed:
            result = self._cleared(result)
        self._buffers = []
        loss, outputs = result
        if self.config.loss is None:
            return outputs
        if not loss.requires_grad and any(p.requires_grad for p in self.model.parameters()):
            raise InputError(
                "loss= returned a tensor that no gradient flows through: compute it from the "
                "model's outputs, without detach(), item() or torch.no_grad()"
            )
        return _with_loss(outputs, loss)

    def _cleared(self, result: Any) -> Any:
        """The model's output with None for activations; says so where somebody else keeps one."""
        met: list[Uncomputed] = []
        result = cleared(result, met)
        if len({id(x) for x in met}) < len(self.recorder.uncomputed):
            self._refuse_kept_buffer()
            self._tell(
                "a hook or the model keeps activations that a training step does not compute, and "
                'reading one is an error: compile with outputs="full" to have them, or with '
                'outputs="selected" to have their selected rows'
            )
        self.recorder.uncomputed = []
        return result

    def _refuse_kept_buffer(self) -> None:
        """A buffer must be a tensor: it is saved with the model."""
        names = {module: name for name, module in self.model.named_modules()}
        refused = []
        for module, before in self._buffers:
            for name, value in module._buffers.items():
                if isinstance(value, Uncomputed):
                    module._buffers[name] = before.get(name)
                    refused.append(".".join(part for part in (names[module], name) if part))
        if refused:
            raise InputError(
                f"the model sets its buffer {refused[0]!r} to an activation of all tokens, which a "
                'training step does not compute: fxseek.compile(model, ..., outputs="full") makes '
                "it do so. The buffer is as it was before the step."
            )

    def _hooked(self, error: Exception) -> CaptureError | None:
        """The error to raise where hooks on a backward were in the way of a capture."""
        if not isinstance(error, _torch.CaptureFailure):
            return None
        hooked = [
            repr(name) if name else "the model" for name in _torch.backward_hooked(self.model)
        ]
        if any(name.startswith("_global_backward") for name, *_ in self._global_hooks):
            hooked.append("every module (register_module_full_backward_hook)")
        if not hooked:
            return None
        more = f" (and {len(hooked) - 1} more)" if len(hooked) > 1 else ""
        return CaptureError(
            f"{hooked[0]}{more} has a hook on its backward, which cannot be captured. Remove it, "
            "or hook the gradient of a value instead: a forward hook that calls "
            "output.register_hook(...) is captured."
        )

    def _captured(self, batch: dict[str, Any]) -> Any:
        """The compiled call, captured again where hooks had to be installed first."""
        trace_dequantisation()
        while True:
            try:
                return self._compiled(**batch)
            except _torch.CaptureFailure as error:
                if not install_recorders(self.model, error):
                    raise

    def _own_error(self, batch: dict[str, Any]) -> Exception | None:
        """What the model, or `loss=`, raises for this batch by itself; None if it raises nothing.

        Dynamo reads code that raises as code that it cannot capture. So the call is run once more
        without it, keeping nothing for backward. Shapes alone do not run.
        """
        tensors = [x for x in batch.values() if isinstance(x, Tensor)]
        if any(x.is_meta or _torch.is_fake(x) for x in (*tensors, *self.model.parameters())):
            return None
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
                self._plain(**batch)
        except FxseekError as error:
            return error
        except torch.OutOfMemoryError:
            return None  # a capture needs no memory
        except Exception as error:
            error.add_note(
                f"Raised by the code of {type(self.model).__name__}, its hooks or loss=, when "
                "fxseek captured a training step, and without fxseek too. The call was given "
                f"{', '.join(batch)}."
            )
            return error
        return None

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


_CACHES = ("past_key_values", "cache_params", "past_buckets_states")


@contextlib.contextmanager
def _quiet(batch: dict[str, Any]) -> Iterator[None]:
    """Dynamo looks at an input's .grad; torch warns about that of an alias of a trained input."""
    if not any(isinstance(x, Tensor) and x.requires_grad for x in batch.values()):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def _input_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks that make embeddings' outputs require grad (transformers and peft name them so)."""
    return [
        (module._forward_hooks, key)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if "make_inputs_require_grad" in getattr(hook, "__name__", "")
    ]


def _scalar(loss: Any) -> Tensor:
    """What `loss=` returned, if it can be trained on."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise InputError(
        f"loss= must return a tensor with one element, the loss to train on; it returned {found}"
    )


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    """The model's output with the loss in it: as ``["loss"]`` of a mapping, else first."""
    if isinstance(outputs, dict):
        outputs["loss"] = loss
        return outputs
    if isinstance(outputs, tuple):
        return (loss, *outputs)
    return loss, outputs

"""What `fxseek.compile` puts in the place of a model's call."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxseek import _torch
from fxseek.capture.alike import alike_layers
from fxseek.capture.backend import CallInfo, Made, Recorder, make_backend
from fxseek.capture.call import Calls
from fxseek.capture.counted import Counted
from fxseek.capture.encoders import OUTSIDE, Encoders
from fxseek.capture.limits import refuse_model, refuse_uncaptured
from fxseek.capture.lora import traceable_target_parameters
from fxseek.capture.patches import capture_settings, quiet
from fxseek.capture.progress import Captures
from fxseek.capture.quantised import trace_dequantisation
from fxseek.capture.recorders import install_recorders
from fxseek.capture.returned import scalar_of, with_loss
from fxseek.capture.sharded import Shards, config_for_shards
from fxseek.capture.switches import Switches
from fxseek.capture.trl import refuse_untraceable, traceable_log_probs
from fxseek.capture.uncomputed import Uncomputed, cleared
from fxseek.config import SeekConfig
from fxseek.errors import CaptureError, ConfigError, FxseekError, InputError, lacks_memory
from fxseek.run.assemble import Step

__all__ = ["SeekStep", "compiled_step", "step_of"]

log = logging.getLogger("fxseek")

Fit = Callable[[nn.Module, SeekConfig, int, int], SeekConfig]

_NUMBERS = itertools.count()

# What a step of one model may be captured for: dtypes, adapters, one row or many, ...
_CAPTURES = 64


def step_of(model: nn.Module) -> SeekStep | None:
    """The compiled step of a model, or None."""
    call = _torch.compiled_call(model)
    return call if isinstance(call, SeekStep) else None


def compiled_step(model: nn.Module) -> SeekStep:
    """The compiled step of a model.

    Raises:
        InputError: it has none, or is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    step = step_of(model)
    if step is None:
        raise InputError("the model is not compiled by fxseek: call fxseek.compile first")
    return step


class SeekStep:
    """What `nn.Module.__call__` runs instead of the module's own call.

    `fit` picks how a step is run within a memory budget, for a model, a configuration, and a number
    of tokens and rows. `run` makes the function of a captured step; by default the step itself.
    With another one the call is captured and not run, so that any device will do
    (`fxseek.explain`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: SeekConfig,
        *,
        fit: Fit | None = None,
        run: Callable[[Step, Made], Callable[..., Any]] | None = None,
    ) -> None:
        self.model = model
        self.config = self.given = config
        self.counted = Counted(model)
        self.encoders = Encoders(model)
        self.calls = Calls(model, config, self.counted, self._tell)
        self.fit = fit
        self.run = run
        self.recorder = Recorder()
        self.captures = Captures(type(model).__name__)
        self.shards = Shards(model)
        self.switches = Switches()
        self._buffers: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        """Each module's buffers as they were at a capture, until its first step is done."""
        self._told: set[str] = set()
        self._alike = True
        """Whether layers that look alike are traced once: a capture in this way has not failed."""
        self._sharded = False
        """Whether the step is one of a sharded model."""
        self._one_thread = threading.RLock()
        """What a step knows of its call is the model's: threads that share one take turns."""
        self._functions: list[Callable[..., Any]] = []
        """What Dynamo was given weak references to."""
        self._fitted = (0, 0)
        """The most rows, and the most tokens of one, that a memory budget was asked for."""
        self._prepare()

    def _prepare(self) -> None:
        """Let the model's call be captured anew when it is called next."""
        self._global_hooks = _torch.global_hooks()
        model, loss = self.model, self.config.loss
        backend = make_backend(
            self.config,
            self.recorder,
            full_outputs=False,
            token_inputs=self.calls.token_inputs,
            run=self.run,
            shards=self.shards if self.shards.exist else None,
        )
        call = _torch.eager_call(model)
        options: dict[str, Any] = {"fullgraph": True}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
            options["isolate_recompiles"] = True  # models share code: each counts its own captures

        name = type(model).__name__

        def with_loss(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                refuse_uncaptured(name)
            # a function of ours: Dynamo would break a bare call up at the model's own hooks
            outputs = call(*args, **kwargs)
            return None if loss is None else scalar_of(loss(outputs, kwargs)), outputs

        # Dynamo remembers by the name of a function which sizes and numbers have changed: other
        # models' would be taken for variables, attention's scale among them.
        code = with_loss.__code__
        with_loss.__code__ = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")

        def capture(gm: fx.GraphModule, examples: Any) -> Callable[..., Any]:
            self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
            step = self.captures.done(backend(gm, examples))
            self._functions.append(step)
            return _weak(step)

        self._functions = [capture]
        self._code = with_loss.__code__
        self._compiled = torch.compile(with_loss, backend=_weak(capture), **options)

    # ---- the call ------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The training step where there is something to train on, else the original call."""
        model = self.model
        if not (model.training and torch.is_grad_enabled()):
            return _torch.eager_call(model)(*args, **kwargs)
        if not self.shards.exist:
            return self._train(args, kwargs)
        self._run_sharded()
        together = self.shards.together() if self.run is None else contextlib.nullcontext()
        with self.shards.standing_in(), together:
            return self._train(*self.shards.moved(args, kwargs))

    def _run_sharded(self) -> None:
        """Let the step be one of a sharded model, if it is not yet."""
        if self._sharded:
            return
        config = config_for_shards(self.config, InputError)
        if config.recompute != self.config.recompute:
            log.warning(
                'fxseek: recompute="block" is chosen, since the model is sharded: backward gathers '
                "the parameters of one block at a time again"
            )
        self.config = config
        self._sharded = True
        self._prepare()

    @torch.compiler.disable(reason="fxseek compiles the training step by itself")
    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The compiled step; a `torch.compile` around the model leaves it alone."""
        with self._one_thread:
            return self._train_alone(args, kwargs)

    def _train_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        modules = list(self.model.named_modules())
        refuse_model(modules, InputError)
        calls = self.calls
        batch = calls.bind(args, kwargs)
        if batch.get("fused_lm_head"):
            refuse_untraceable()
        self.switches.off(modules)
        calls.refuse_cache(batch)
        calls.without_cache(batch)
        if self._global_hooks != _torch.global_hooks():
            self._prepare()
        marked = self._marked(batch)
        if self.run is None:
            self._fit_budget(batch)
        labelled = self.config.loss is not None or calls.has_labels(batch)
        with self.recorder.serving(CallInfo(calls.padding_mask(batch), labelled)):
            return self._run_encoded(batch, marked)

    def _run_encoded(self, batch: dict[str, Any], marked: dict[str, Any]) -> Any:
        """The step, with encoders of images outside where it cannot be captured with them."""
        taken_out = False
        while True:
            try:
                result = self._run(marked)
            except CaptureError:
                self.encoders.outside &= not taken_out
                if taken_out or self._sharded or not self.encoders.take_out(batch):
                    raise
            else:
                if self.encoders.outside:
                    self._tell(OUTSIDE)
                return result
            taken_out = True
            marked = self._marked(batch)

    def _marked(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.calls.marked(self.encoders.encoded(batch), any_device=self.run is not None)

    def _tell(self, message: str) -> None:
        """Log a warning, once for each model."""
        if message not in self._told:
            self._told.add(message)
            log.warning("fxseek: %s", message)

    def _fit_budget(self, batch: dict[str, Any]) -> None:
        """Pick how the first batch is run, and one with more rows or longer ones than before."""
        if self.config.budget is None:
            return
        if self.calls.in_autocast(batch):
            self._tell(
                "memory_budget_bytes= is estimated without autocast, which keeps activations in "
                "half precision and copies of weights: a step may need more or less than that"
            )
        config = self.config_for(batch)
        self._fitted = self._largest(batch)
        if config != self.config:
            self.config = config
            self._prepare()

    def config_for(self, batch: dict[str, Any]) -> SeekConfig:
        """The configuration, with what a memory budget asks for with such a batch."""
        if self.config.budget is None or self.fit is None:
            return self.config
        rows, tokens = largest = self._largest(batch)
        if largest == self._fitted:
            return self.config
        try:
            return self.fit(self.model, self.given, tokens, rows)
        except ConfigError as error:
            if largest == self._extent(batch):
                raise
            raise ConfigError(
                f"{error} These are the most rows and the greatest length so far, of different "
                "batches: one configuration has to serve both."
            ) from error

    def _largest(self, batch: dict[str, Any]) -> tuple[int, int]:
        """The most rows, and the most tokens of one, of this batch and those before."""
        rows, tokens = map(max, zip(self._fitted, self._extent(batch), strict=True))
        return rows, tokens

    def _extent(self, batch: dict[str, Any]) -> tuple[int, int]:
        """The rows and the tokens of a batch; 0 of one without any."""
        for name in self.calls.primary_names(batch)[:1]:
            return batch[name].shape[0], batch[name].shape[self.config.token_dim]
        return 0, 0

    def _run(self, batch: dict[str, Any]) -> Any:
        try:
            first = not self.recorder.steps
            once = None if self.run is None else self._code
            with (
                capture_settings(captures=_CAPTURES, first=first, once=once),
                traceable_log_probs(),
                traceable_target_parameters(),
                quiet(batch),
                self.captures.watched(),
            ):
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
        return with_loss(outputs, loss)

    def _cleared(self, result: Any) -> Any:
        """The model's output with None for activations; says so where somebody else keeps one."""
        met: list[Uncomputed] = []
        loss, outputs = result
        result = loss, cleared(outputs, met)
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
        # What the passes raise has the backend's name: no hook kept them from the graph.
        if not isinstance(error, _torch.CaptureFailure) or isinstance(
            error, _torch.BackendCompilerFailed
        ):
            return None
        names = _torch.backward_hooked(self.model)
        hooked = [repr(name) if name else "the model" for name in names]
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
            image = batch[self.calls.primary_names(batch)[0]]
            known, called = len(self.recorder.steps), self.captures.called
            wanted = self._alike and not self._sharded
            with alike_layers(self.model, wanted=wanted, guarded=self.run is None) as regions:
                try:
                    with self.counted.on(image), self.encoders.unchecked(batch):
                        return self._compiled(**batch)
                except Exception as error:
                    if len(self.recorder.steps) > known:
                        if self.captures.called > called:
                            raise  # it was captured
                        self.recorder.steps.pop()  # its guards can't be built: nothing will run it
                        self._functions.pop()
                    if self.counted.found(error, image):
                        self._prepare()
                    elif not install_recorders(self.model, error):
                        if not regions.begun:
                            raise
                        log.debug("fxseek: captured without regions, which fails with %r", error)
                        self._alike = False

    def _own_error(self, batch: dict[str, Any]) -> Exception | None:
        """What the model, or `loss=`, raises for this batch by itself; None if it raises nothing.

        Dynamo reads code that raises as code that it cannot capture. So the call is run once more
        without it, keeping nothing for backward. Shapes alone do not run.
        """
        tensors = [x for x in batch.values() if isinstance(x, Tensor)]
        if self._sharded:
            return None  # its parameters exist in a step only
        if not all(map(_torch.has_values, (*tensors, *self.model.parameters()))):
            return None
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
                outputs = _torch.eager_call(self.model)(**batch)
                if self.config.loss is not None:
                    scalar_of(self.config.loss(outputs, batch))
        except FxseekError as error:
            return error
        except Exception as error:
            if lacks_memory(error):
                return None  # a capture needs none
            error.add_note(
                f"Raised by the code of {type(self.model).__name__}, its hooks or loss=, when "
                "fxseek captured a training step, and without fxseek too. The call was given "
                f"{', '.join(batch)}."
            )
            return error
        return None


def _weak(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for Dynamo, which must not keep it, since the function holds the model.

    Dynamo keeps a backend until `torch._dynamo.reset()`, and what a backend returns in the globals
    of the code that was captured for as long as that code is there.
    """
    reference = weakref.ref(function)

    def call(*args: Any) -> Any:
        called = reference()
        assert called is not None
        return called(*args)

    return call

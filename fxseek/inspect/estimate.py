"""`fxseek.estimate`: the memory of a training step, without weights and without the device.

The model is made on the meta device and captured as `fxseek.compile` captures it. The program's
own stages, the backward and the optimiser's step then run on meta tensors, which have shapes and
storages and no memory, while a `Tracker` follows the storages.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxseek import _torch
from fxseek.capture.limits import refuse_model, uses_cache
from fxseek.capture.patches import resting
from fxseek.capture.sharded import refuse_shards
from fxseek.capture.step import SeekStep
from fxseek.checks import choice, integer
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError
from fxseek.inspect.calls import Calls
from fxseek.inspect.explain import capture
from fxseek.inspect.kernels import WORKSPACES, Kernels
from fxseek.inspect.memory import (
    StepMemory,
    Tracker,
    following,
    formatted,
    loss_of,
    module_tensors,
    saved_as_activations,
)
from fxseek.inspect.meta import batch_of, check_tuning, checkpointed, name_of, on_meta, tuned
from fxseek.inspect.shards import as_sharded
from fxseek.ops.attention import aligns_on_cpu, aligns_on_cuda, kernel
from fxseek.ops.masks import read_tokens
from fxseek.run.assemble import Step

__all__ = ["Estimate", "estimate"]

DEVICES = {"cuda": 512, "hopper": 512, "cpu": 1}
"""Devices whose attention kernels are known, and the bytes that their allocators round up to."""

_ORDINARY: dict[bool | str, str] = {
    False: "",
    True: ", ordinary training",
    "checkpointing": ", gradient checkpointing",
}

Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Estimate(StepMemory):
    """The predicted memory of one training step; print it. See `StepMemory` for its figures.

    `tokens` and `kept` of each of `batch` rows (`kept` is `tokens` for ordinary training);
    `parameters` and `trainable`: how many numbers the model has and trains; `device`: the type of
    the device; `description`: the model, and how it is trained.
    """

    tokens: int
    kept: int
    batch: int
    parameters: int
    trainable: int
    device: str
    description: str

    def fits(self, available_bytes: int) -> bool:
        """Whether the peak is at most so many bytes.

        Leave room: the allocator's fragments, the device's context (about 0.5 GiB on CUDA) and
        libraries' workspaces are not in the peak.
        """
        return self.peak_bytes <= available_bytes

    def __str__(self) -> str:
        """A page for a person."""
        rows = f"{self.batch} row{'s' if self.batch > 1 else ''} of {self.tokens} tokens"
        stages = ", ".join(f"{name} {formatted(size)}" for name, size in self.stage_peaks.items())
        return "\n".join(
            [
                f"fxseek estimate: {self.description}, {rows}, {self.kept} kept, on {self.device}",
                f"  {self.parameters / 1e9:.2f} billion parameters, "
                f"{self.trainable / 1e6:.1f} million of them trained",
                f"  peak {formatted(self.peak_bytes)} in {self.peak_stage}",
                "",
                *self._table(),
                "",
                f"  peak of each stage: {stages}",
            ]
        )


@resting()
def estimate(
    config_or_model: Any,
    tokens: int,
    batch: int = 1,
    ratio: float | str | Callable[[int], float] | SeekConfig = 0.1,
    *,
    tuning: str = "full",
    optimizer: str | Optimiser | None = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int = 16,
    ordinary: bool | str = False,
    device: str = "cuda",
    shards: int = 1,
    **options: Any,
) -> Estimate:
    """Predict the memory of a training step of a causal language model; nothing is computed.

    Args:
        config_or_model: a transformers configuration, the name or folder of one, or a module
            (on any device; it is copied without its weights and left as it is) that takes
            input_ids and labels.
        tokens: tokens of a row, 2 or more. All rows are full, without padding.
        batch: rows.
        ratio: share of tokens to keep, or a `SeekConfig`. A ratio that varies stands for the most
            that it lets a row keep: ``"mass:0.9"`` for the upper of ``ratio_bounds``, a schedule
            for its largest, ``"labelled"`` and a function for all tokens.
        tuning: ``"full"`` trains what requires grad, ``"lora"`` puts adapters on all linear layers
            but the head (peft), ``"qlora"`` also stores those layers in 4 bits (bitsandbytes NF4
            with double quantisation).
        optimizer: ``"adamw"`` (torch's fused one, its state there before the step), None, or a
            function of the trained parameters that makes an optimiser.
        dtype: of weights that are not quantised and of activations, where a configuration is given.
        lora_rank: rank of the adapters.
        ordinary: estimate training on all tokens, without fxseek, instead; ``"checkpointing"`` is
            that with gradient checkpointing of every layer, as transformers does it.
        device: whose attention kernels, and whose rounding: ``"cuda"``, ``"hopper"`` (CUDA on
            compute capability 9.0 and 10.0, where cuDNN's attention comes first) or ``"cpu"``.
        shards: over how many GPUs FSDP2 shards parameters, gradients and optimiser state; the
            memory is that of one of them. "whole parameters" are those that are gathered.
        options: fields of `SeekConfig`, but for ``memory_budget_bytes``; ``backend`` must be
            ``"eager"``.

    Raises:
        ConfigError: an argument is out of range or of the wrong type, or a package that it needs
            is not installed.
        CaptureError, GraphError: as the training step would.
    """
    config = SeekConfig.make(ratio, **options)
    sizes = {"tokens": tokens, "batch": batch, "lora_rank": lora_rank, "shards": shards}
    _check(config, optimizer, ordinary, device, dtype, sizes)
    check_tuning(config_or_model, tuning)
    if shards > 1 and ordinary:
        raise ConfigError(
            f"shards={shards!r} with ordinary={ordinary!r}: FSDP2 without fxseek can't be "
            "estimated, since its hooks run on real tensors only. Leave one of them out"
        )
    if shards > 1:
        config = dataclasses.replace(config, recompute="block")
    most = config.ratio_range[1]
    shown = most if config.ratio_range == (most, most) else f"up to {most}"
    config = _estimated(config, device)
    if isinstance(config_or_model, nn.Module):
        refuse_shards(config_or_model, "estimate")
    model = tuned(on_meta(config_or_model, dtype), tuning, lora_rank, dtype).train()
    inputs = batch_of(model, tokens, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError(
            "no parameter of the model requires grad: let those that are to be trained require it"
        )
    about = {
        "tokens": tokens,
        "batch": batch,
        "parameters": sum(_count(p) for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "device": device,
        "description": f"{name_of(config_or_model)}, {tuning}"
        + (_ORDINARY[ordinary] or f", ratio {shown}")
        + (f", a shard of {shards}" if shards > 1 else ""),
    }
    run = _Run(device, optimizer)
    if ordinary:
        model = checkpointed(model) if ordinary == "checkpointing" else model
        run.ordinary(model, inputs)
        return Estimate(**run.tracker.result(), kept=tokens, **about)
    captured = capture(_step(model, config), inputs)
    held, step, given = model, captured.step, captured.inputs
    if shards > 1:
        noted = partial(run.tracker.label, category="whole parameters")
        held, step, given = as_sharded(captured, model, config, shards, device != "cpu", noted)
    kept = run.selective(held, step, given, inputs)
    return Estimate(**run.tracker.result(), kept=kept, **about)


def _step(model: nn.Module, config: SeekConfig) -> SeekStep:
    refuse_model(model.named_modules(), ConfigError)
    return SeekStep(model, config)


class Peaks:
    """The peak bytes of a step by its configuration, without optimiser state.

    The model is captured once, with `config`; a call runs the passes, and the stages on meta
    tensors. `in_parts`: whether the last step that was followed is learned in parts.
    """

    def __init__(
        self, model: nn.Module, config: SeekConfig, tokens: int, batch: int, device: str
    ) -> None:
        self.model = on_meta(model, torch.float32).train()
        self.tokens, self.batch, self.device = tokens, batch, device
        self.inputs = batch_of(self.model, tokens, batch)
        self.in_parts = False
        self._known: list[tuple[SeekConfig, int]] = []
        self.captured = capture(_step(self.model, _estimated(config, device)), self.inputs)

    @resting()
    def __call__(self, config: SeekConfig) -> int:
        """The peak of a step with a configuration; each is followed once."""
        for known, peak in self._known:
            if known == config:
                return peak
        step = self.captured.made(_estimated(config, self.device))
        self.in_parts = not isinstance(step.program.parts, str)
        run = _Run(self.device, None)
        run.selective(self.model, step, self.captured.inputs, self.inputs)
        peak = StepMemory(**run.tracker.result()).peak_bytes
        self._known.append((config, peak))
        return peak


def _estimated(config: SeekConfig, device: str) -> SeekConfig:
    """The configuration whose step is followed: a ratio that varies counts as its largest."""
    config = config.on(device)
    chunk = config.learn_chunk if config.backend == "eager" else None
    ratio: float | str = config.ratio_range[1]
    if ratio == 1.0 and config.is_scored:
        ratio = "1.0->1.0"  # of which tokens are scored
    return dataclasses.replace(
        config, ratio=ratio, ratio_steps=1, backend="eager", learn_chunk=chunk
    )


def _check(
    config: SeekConfig,
    optimizer: object,
    ordinary: object,
    device: str,
    dtype: object,
    sizes: Mapping[str, object],
) -> None:
    problems = [
        problem
        for name, value in sizes.items()
        for problem in integer(name, value, 2 if name == "tokens" else 1, None)
    ]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        problems.append(
            f"dtype={dtype!r} must be a torch.dtype of floating point, such as torch.bfloat16"
        )
    if ordinary not in (False, True, "checkpointing"):
        problems.append(f"ordinary={ordinary!r} must be False, True or 'checkpointing'")
    problems += choice("device", device, tuple(DEVICES))
    if optimizer not in ("adamw", None) and not callable(optimizer):
        problems.append(
            f"optimizer={optimizer!r} must be 'adamw', None, or a function of the trained "
            "parameters that makes an optimiser"
        )
    if config.memory_budget_bytes is not None:
        problems.append(
            f"memory_budget_bytes={config.memory_budget_bytes!r} picks how a step is run, and an "
            "estimate is of what is given: leave the budget out, and ask fits() of the result"
        )
    if config.backend != "eager":
        problems.append(
            f"backend={config.backend!r} cannot be estimated: compiled stages run on real tensors "
            "only. Estimate backend='eager'; the others save no more than it does"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _count(parameter: Tensor) -> int:
    """Numbers of a parameter; a quantised one says in its state what it was."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else torch.Size(shape).numel()


# ---- the step ------------------------------------------------------------------------------


class _FakeTracker(Tracker):
    """A tracker of tensors without values, which answers what is read out of them.

    What is asked of all of them holds and what is asked of any of them does not, as in a step of
    full rows: all of the mask is 1, no score is infinite. Numbers are 0.
    """

    def __init__(self, device: str, rounding: int) -> None:
        super().__init__(device, rounding)
        self._true = WeakTensorKeyDictionary()
        self._calls = Calls()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _torch.is_item(func):
            return self._answer(args[0])
        if func in WORKSPACES:
            self.passing(WORKSPACES[func](*args))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _ALL:
            self._true[out] = True
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation gives; it may be what it gave before."""
        return self._calls(func, args, kwargs)

    def _answer(self, asked: Tensor) -> bool | float | int:
        if _torch.has_values(asked):
            return asked.item()
        if asked.dtype is torch.bool:
            return asked in self._true
        return 0.0 if asked.dtype.is_floating_point else 0


def _alias(tensor: Tensor) -> Tensor:
    """A leaf on the same storage: gradients are its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


_ALL = {torch.ops.aten.all.default, torch.ops.aten.all.dim, torch.ops.aten.all.dims}


class _Run:
    """One step on tensors without memory, followed by `tracker`."""

    def __init__(self, device: str, optimizer: str | Optimiser | None) -> None:
        self.device = device
        self.optimizer = optimizer
        self.tracker = _FakeTracker("meta", DEVICES[device])
        self.moments: list[Tensor] = []

    def selective(
        self,
        model: nn.Module,
        step: Step,
        arguments: Sequence[Any],
        batch: dict[str, Tensor],
    ) -> int:
        """The stages, backward and the optimiser's step; returns how many tokens are kept."""
        mode, made = contextlib.nullcontext(), _alias
        if step.program.config.kv == "offload":  # fakes are slower, and can leave for the CPU
            mode = _torch.fake_mode()
            made = mode.from_tensor
        known: dict[int, Tensor] = {}

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:  # tied parameters stay one
                known[id(value)] = made(value)
            return known[id(value)]

        inputs = tuple(map(stand_in, arguments))
        mask = batch.get("attention_mask")
        with mode:
            padding_mask = None if mask is None else read_tokens(stand_in(mask))
        trained = [stand_in(p) for p in model.parameters() if p.requires_grad]
        optimiser = self._start(
            map(stand_in, module_tensors(model)), map(stand_in, batch.values()), trained
        )
        with mode, self._running(), following(step, self.tracker):
            ratio = step.program.config.ratio_at(0)
            outputs, selection, *_ = step.run(inputs, 0, padding_mask, ratio)
            self._finish(loss_of(outputs), trained, optimiser)
        return int(selection.kept.shape[1])

    def ordinary(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """The model's own forward on all tokens, backward and the optimiser's step.

        On plain meta tensors, without a mask: transformers looks into one, to drop it where rows
        are full, only if it is not fake, and asks for its sum, which nothing can answer here.
        """
        batch = {name: x for name, x in batch.items() if name != "attention_mask"}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = self._start(module_tensors(model), batch.values(), trained)
        if uses_cache(model) is not None:
            batch = {**batch, "use_cache": False}
        with self._running():
            self.tracker.stage("forward")
            with saved_as_activations(self.tracker):
                loss = loss_of(model(**batch))
            self._finish(loss, trained, optimiser)

    def _start(
        self, parameters: Iterable[Tensor], batch: Iterable[Tensor], trained: Sequence[Tensor]
    ) -> torch.optim.Optimizer | None:
        """Count what is there before the step; returns the caller's own optimiser, after a step.

        Fused AdamW need not be run: it keeps two moments, and its step makes no tensors.
        """
        self.tracker.hold(parameters, "parameters")
        self.tracker.hold(batch, "constants")
        if self.optimizer is None or not trained:
            return None
        if isinstance(self.optimizer, str):
            self.moments = [torch.empty_like(p) for p in trained for _ in range(2)]
            self.tracker.hold(self.moments, "optimiser state")
            return None
        optimiser = self.optimizer(list(trained))
        if not all(hasattr(optimiser, name) for name in ("step", "zero_grad", "state")):
            raise ConfigError(
                f"optimizer= gave a {type(optimiser).__name__}: it must make an optimiser of the "
                "parameters, such as a torch.optim.Optimizer"
            )
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimiser.step()
        optimiser.zero_grad()
        state = [x for values in optimiser.state.values() for x in values.values()]
        self.tracker.hold(state, "optimiser state")
        return optimiser

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        grouped = ("cpu", "meta") if self.device == "cpu" else ("cpu",)  # what meta stands for
        aligned = {"meta": aligns_on_cpu if self.device == "cpu" else aligns_on_cuda}
        kernels = Kernels(self.device)
        with kernel(kernels.attend, grouped, aligned), self.tracker, kernels:
            yield
        self.tracker.stop()

    def _finish(
        self, loss: Tensor, trained: Iterable[Tensor], optimiser: torch.optim.Optimizer | None
    ) -> None:
        self.tracker.stage("backward")
        loss.backward()
        self.tracker.label((p.grad for p in trained), "gradients")
        if self.moments or optimiser is not None:
            self.tracker.stage("optimiser")
        if optimiser is not None:
            optimiser.step()

"""`fxseek.estimate`: the memory of a training step, without weights and without the device.

The model is made on the meta device and captured as `fxseek.compile` captures it. The program's
own stages, the backward and the optimiser's step then run on fake tensors, which have shapes and
storages and no memory, while a `Tracker` follows the storages.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fxseek import _torch
from fxseek.capture.limits import uses_cache
from fxseek.capture.step import SeekStep
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError
from fxseek.inspect.explain import capture
from fxseek.inspect.memory import (
    StepMemory,
    Tracker,
    following,
    formatted,
    loss_of,
    module_tensors,
    saved_as_activations,
)
from fxseek.ops.attention import kernel, read_tokens
from fxseek.run.assemble import Step

__all__ = ["Estimate", "estimate"]

TUNINGS = ("full", "lora", "qlora")
DEVICES = {"cuda": 512, "hopper": 512, "cpu": 1}
"""Devices whose attention kernels are known, and the bytes that their allocators round up to."""

Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Estimate(StepMemory):
    """The predicted memory of one training step; print it. See `StepMemory` for its figures.

    `tokens` and `kept` of each of `batch` rows (`kept` is `tokens` for ordinary training);
    `parameters` and `trainable`: how many numbers the model has and trains.
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


def estimate(
    config_or_model: Any,
    tokens: int,
    batch: int = 1,
    ratio: float | str | SeekConfig = 0.1,
    *,
    tuning: str = "full",
    optimizer: str | Optimiser | None = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int = 16,
    ordinary: bool = False,
    device: str = "cuda",
    **options: Any,
) -> Estimate:
    """Predict the memory of a training step of a causal language model; nothing is computed.

    Args:
        config_or_model: a transformers configuration, the name or folder of one, or a module
            (on any device; it is copied without its weights and left as it is) that takes
            input_ids and labels.
        tokens: tokens of a row. All rows are full, without padding.
        batch: rows.
        ratio: share of tokens to keep, or a `SeekConfig`. A ratio such as ``"mass:0.9"`` stands for
            the most that ``ratio_bounds`` lets a row keep.
        tuning: ``"full"`` trains what requires grad, ``"lora"`` puts adapters on all linear layers
            but the head (peft), ``"qlora"`` also stores those layers in 4 bits (bitsandbytes NF4
            with double quantisation).
        optimizer: ``"adamw"`` (torch's fused one, its state there before the step), None, or a
            function of the trained parameters that makes an optimiser.
        dtype: of weights that are not quantised and of activations, where a configuration is given.
        lora_rank: rank of the adapters.
        ordinary: estimate training on all tokens, without fxseek, instead.
        device: whose attention kernels, and whose rounding: ``"cuda"``, ``"hopper"`` (CUDA on
            compute capability 9.0 and 10.0, where cuDNN's attention comes first) or ``"cpu"``.
        options: fields of `SeekConfig`, but for ``memory_budget_bytes``; ``backend`` must be
            ``"eager"``.

    Raises:
        ConfigError: an argument is out of range or of the wrong type, or a package that it needs
            is not installed.
        CaptureError, GraphError: as the training step would.
    """
    config = SeekConfig.make(ratio, **options)
    _check(config, tokens, batch, tuning, optimizer, lora_rank, device)
    if config.mass_share is not None:
        config = dataclasses.replace(config, ratio=config.ratio_bounds[1])
    model = _tuned(_on_meta(config_or_model, dtype), tuning, lora_rank, dtype).train()
    inputs = _batch(model, tokens, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    about = {
        "tokens": tokens,
        "batch": batch,
        "parameters": sum(_count(p) for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "device": device,
        "description": f"{_name(config_or_model)}, {tuning}"
        + (", ordinary training" if ordinary else f", ratio {config.ratio}"),
    }
    run = _Run(device, optimizer)
    if ordinary:
        run.ordinary(model, inputs)
        return Estimate(**run.tracker.result(), kept=tokens, **about)
    kept = run.selective(model, *capture(SeekStep(model, config), inputs), inputs)
    return Estimate(**run.tracker.result(), kept=kept, **about)


def peak_of_ratios(
    model: nn.Module, config: SeekConfig, tokens: int, batch: int, *, device: str
) -> Callable[[float], int]:
    """A function from a ratio to the peak bytes of a step, without optimiser state.

    The model is captured once; each call runs the stages on fake tensors.
    """
    model = _on_meta(model, torch.float32).train()
    inputs = _batch(model, tokens, batch)
    step, arguments = capture(SeekStep(model, config), inputs)

    def peak(ratio: float) -> int:
        run = _Run(device, None)
        run.selective(model, step.with_ratio(ratio), arguments, inputs)
        return Estimate(
            **run.tracker.result(), tokens=tokens, kept=0, batch=batch, parameters=0, trainable=0,
            device=device, description="",
        ).peak_bytes  # fmt: skip

    return peak


def _check(
    config: SeekConfig,
    tokens: int,
    batch: int,
    tuning: str,
    optimizer: object,
    rank: int,
    device: str,
) -> None:
    problems = [
        f"{name}={value!r} must be an integer of at least {least}"
        for name, value, least in (
            ("tokens", tokens, 2),
            ("batch", batch, 1),
            ("lora_rank", rank, 1),
        )
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]
    if tuning not in TUNINGS:
        problems.append(f"tuning={tuning!r} must be one of {', '.join(map(repr, TUNINGS))}")
    if device not in DEVICES:
        problems.append(f"device={device!r} must be one of {', '.join(map(repr, DEVICES))}")
    if optimizer not in ("adamw", None) and not callable(optimizer):
        problems.append(
            f"optimizer={optimizer!r} must be 'adamw', None, or a function of the trained "
            "parameters that makes an optimiser"
        )
    if config.memory_budget_bytes is not None:
        problems.append(
            f"memory_budget_bytes={config.memory_budget_bytes!r} picks the ratio of a step, and an "
            "estimate is of a ratio that is given: leave the budget out, and ask fits() of the "
            "result"
        )
    if config.backend != "eager":
        problems.append(
            f"backend={config.backend!r} cannot be estimated: compiled stages run on real tensors "
            "only. Estimate backend='eager'; the others save no more than it does"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _name(config_or_model: Any) -> str:
    if isinstance(config_or_model, str):
        return config_or_model
    if isinstance(config_or_model, nn.Module):
        return type(config_or_model).__name__
    return str(getattr(config_or_model, "name_or_path", "") or config_or_model.model_type)


def _count(parameter: Tensor) -> int:
    """Numbers of a parameter; a quantised one says in its state what it was."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else torch.Size(shape).numel()


# ---- the model ------------------------------------------------------------------------------


def _on_meta(config_or_model: Any, dtype: torch.dtype) -> nn.Module:
    """The model without weights."""
    if isinstance(config_or_model, nn.Module):
        return _weightless(config_or_model)
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    config = config_or_model
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"config_or_model is a {type(config).__name__}: pass a transformers configuration, "
            "the name of one, or a torch.nn.Module"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except ValueError as error:
        raise ConfigError(
            f"{type(config).__name__} is of no causal language model of transformers ({error}); "
            "make the model on the meta device yourself, and pass the module"
        ) from error


def _weightless(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; its weights are neither copied nor read."""
    known: dict[int, Any] = {}
    for tensor in module_tensors(model):
        known.setdefault(id(tensor), _meta_of(tensor))
    for tensor in model.parameters():  # what a quantised one carries has its copy by now
        twin = known[id(tensor)]
        vars(twin).update(copy.deepcopy(vars(tensor), known))
    return copy.deepcopy(model, known)


def _meta_of(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return torch.Tensor._make_subclass(type(tensor), twin, tensor.requires_grad)
    return twin


def _tuned(model: nn.Module, tuning: str, rank: int, dtype: torch.dtype) -> nn.Module:
    """The model with adapters, and with weights of 4 bits, where the tuning asks for them."""
    if tuning == "full":
        return model
    if tuning == "qlora":
        _quantise(model, dtype)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f'tuning={tuning!r} needs peft, which is not installed: pip install "fxseek[peft]"'
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.device("meta"):
        return get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do


def _quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers but the head, in place, as bitsandbytes stores them in NF4."""
    try:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError as error:
        raise ConfigError(
            "tuning='qlora' needs bitsandbytes, which is not installed: "
            'pip install "fxseek[peft]"'
        ) from error

    def empty(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    kind: dict[str, Any] = {"quant_type": "nf4", "bnb_quantized": True}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        with torch.device("meta"):
            new = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype,
                quant_type="nf4",
            )  # fmt: skip
        blocks = -(-layer.weight.numel() // 64)
        inner = QuantState(
            absmax=empty(-(-blocks // 256), torch.float32), code=empty(256, torch.float32),
            blocksize=256, dtype=torch.float32,
        )  # fmt: skip
        state = QuantState(
            absmax=empty(blocks, torch.uint8), shape=layer.weight.shape, blocksize=64,
            code=empty(16, torch.float32), quant_type="nf4", dtype=layer.weight.dtype,
            offset=empty(1, torch.float32)[0], state2=inner,
        )  # fmt: skip
        packed = empty(-(-layer.weight.numel() // 2), torch.uint8).unsqueeze(1)
        attributes: dict[str, Any] = {
            "weight": Params4bit(packed, **{**kind, "quant_state": state, "module": new}),
            "bias": layer.bias,
            "quant_state": state,
        }
        for name, value in attributes.items():
            setattr(new, name, value)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _batch(model: nn.Module, tokens: int, batch: int) -> dict[str, Tensor]:
    """Full rows of tokens, with the arguments that the model takes."""
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if not open_ended and not {"input_ids", "labels"} <= set(parameters):
        raise ConfigError(
            f"{type(model).__name__}.forward takes {', '.join(parameters)}: an estimate is of a "
            "causal language model, which takes input_ids and labels"
        )
    return {name: x for name, x in inputs.items() if open_ended or name in parameters}


# ---- the step ---------------------------------------------------------------------------------


class _FakeTracker(Tracker):
    """A tracker of tensors without values, which answers what is read out of them.

    What is asked of all of them holds and what is asked of any of them does not, as in a step of
    full rows: all of the mask is 1, no score is infinite. Numbers are 0.
    """

    def __init__(self, device: str, rounding: int) -> None:
        super().__init__(device, rounding)
        self._true = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _torch.is_item(func):
            return self._answer(args[0])
        if func in _WORKSPACES:
            self.passing(_WORKSPACES[func](*args))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _ALL:
            self._true[out] = True
        return out

    def _answer(self, asked: Tensor) -> bool | float | int:
        if not (asked.is_meta or _torch.is_fake(asked)):
            return asked.item()
        if asked.dtype is torch.bool:
            return asked in self._true
        return 0.0 if asked.dtype.is_floating_point else 0


_ALL = {torch.ops.aten.all.default, torch.ops.aten.all.dim, torch.ops.aten.all.dims}


def _flash_workspace(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """The float32 gradient of the queries; and those of keys and values for each query head."""
    repeated = 0 if query.shape[1] == key.shape[1] else 2 * key[:, :1].numel() * query.shape[1]
    return 4 * query.numel() + repeated * query.element_size()


def _efficient_workspace(grad: Tensor, query: Tensor, *_: Any) -> int:
    """The float32 gradient of the queries."""
    return 0 if query.dtype is torch.float32 else 4 * query.numel()


_WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_workspace,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_workspace,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default: _efficient_workspace,
}
"""Bytes that kernels allocate inside, where they are not small beside their operands."""


class _Kernels(TorchFunctionMode):
    """`scaled_dot_product_attention` by the kernel that a device takes, on meta tensors.

    Torch itself would choose the plain one for the meta device, with a map of tokens × tokens.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.attend = {"cuda": _attend_cuda, "hopper": _attend_hopper, "cpu": _attend_cpu}[device]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash without a mask in half precision, else the memory-efficient kernel where it can."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    plain = query.dim() == 4 and query.dtype is not torch.float64
    if plain and half and attn_mask is None and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if plain and not grouped:
        mask = _additive(attn_mask, query)
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, _needs_grad(query, key, value), dropout_p, is_causal,
            scale=scale,
        )[0]  # fmt: skip
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attend_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Half precision by cuDNN: with a mask, and with keys and values for groups of heads."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.dim() != 4 or not half or query.shape[-1] > 256 or query.shape[-1] % 8:
        return _attend_cuda(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    mask = _additive(attn_mask, query)
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, _needs_grad(query, key, value), dropout_p, is_causal, scale=scale
    )[0]


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Whichever kernel torch takes for such tensors on the CPU."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    chosen = _torch.sdpa_backend(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
    )
    if chosen == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=_additive(attn_mask, query),
            scale=scale,
        )[0]  # fmt: skip
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )[0]


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as the fused kernels want it; torch makes one in each call."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned(mask: Tensor) -> Tensor:
    """A mask whose rows begin at multiples of 16 elements, as the kernel wants them."""
    keys = mask.shape[-1]
    if keys % 16 == 0:
        return mask
    return torch.nn.functional.pad(mask, (0, 16 - keys % 16))[..., :keys]


class _Run:
    """One step on tensors without memory, followed by `tracker`."""

    def __init__(self, device: str, optimizer: str | Optimiser | None) -> None:
        self.device = device
        self.optimizer = optimizer
        self.tracker = _FakeTracker("meta", DEVICES[device])

    def selective(
        self,
        model: nn.Module,
        step: Step,
        arguments: Sequence[Any],
        batch: dict[str, Tensor],
    ) -> int:
        """The stages, backward and the optimiser's step; returns how many tokens are kept."""
        mode = _torch.fake_mode()
        known: dict[int, Tensor] = {}

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:  # tied parameters stay one
                known[id(value)] = mode.from_tensor(value)
            return known[id(value)]

        fakes = tuple(map(fake, arguments))
        mask = batch.get("attention_mask")
        with mode:
            padding_mask = None if mask is None else read_tokens(fake(mask))
        trained = [fake(p) for p in model.parameters() if p.requires_grad]
        optimiser = self._start(
            map(fake, module_tensors(model)), map(fake, batch.values()), trained
        )
        with mode, self._running(), following(step, self.tracker):
            outputs, selection, *_ = step.run(fakes, 0, padding_mask)
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
        """Count what is there before the step; returns the optimiser, after a first step."""
        self.tracker.hold(parameters, "parameters")
        self.tracker.hold(batch, "constants")
        if self.optimizer is None or not trained:
            return None
        if isinstance(self.optimizer, str):
            optimiser: torch.optim.Optimizer = torch.optim.AdamW(trained, foreach=False)
        else:
            optimiser = self.optimizer(list(trained))
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
        kernels = _Kernels(self.device)
        with kernel(kernels.attend, grouped), self.tracker, kernels:
            yield

    def _finish(
        self, loss: Tensor, trained: Iterable[Tensor], optimiser: torch.optim.Optimizer | None
    ) -> None:
        self.tracker.stage("backward")
        loss.backward()
        self.tracker.label((p.grad for p in trained), "gradients")
        if optimiser is not None:
            self.tracker.stage("optimiser")
            if not isinstance(self.optimizer, str):  # fused AdamW makes no tensors in its step
                optimiser.step()

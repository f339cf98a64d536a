"""Models and batches without memory, for `fxseek.estimate`."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxseek.capture.trl import rebind_fused_heads
from fxseek.checks import choice, shown
from fxseek.errors import ConfigError
from fxseek.inspect.memory import module_tensors

__all__ = [
    "TUNINGS",
    "batch_of",
    "check_tuning",
    "checkpointed",
    "name_of",
    "on_meta",
    "tuned",
    "tunings_of",
]

TUNINGS = ("full", "lora", "qlora")


def on_meta(config_or_model: Any, dtype: torch.dtype) -> nn.Module:
    """The model without weights.

    Raises:
        ConfigError: there is no causal language model to be made, or transformers cannot run it.
    """
    _refuse_autocast()
    if isinstance(config_or_model, nn.Module):
        return _weightless(config_or_model)
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    config = config_or_model
    if isinstance(config, str):
        try:
            config = AutoConfig.from_pretrained(config)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config_or_model={config!r}: its configuration can't be loaded "
                f"({_first_line(error)}). Pass a name of the hub, or a folder with a config.json"
            ) from error
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"config_or_model={shown(config)} is of type {type(config).__name__}: pass a "
            "transformers configuration, the name of one, or a torch.nn.Module"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except ValueError as error:
        raise ConfigError(
            f"{type(config).__name__} is of no causal language model of transformers "
            f"({_first_line(error)}); make the model on the meta device yourself, and pass the "
            "module"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, without the lists that may follow."""
    return str(error).strip().partition("\n")[0]


def name_of(config_or_model: Any) -> str:
    """The class of a model, or the name of its configuration."""
    if isinstance(config_or_model, str):
        return config_or_model
    if isinstance(config_or_model, nn.Module):
        return type(config_or_model).__name__
    return str(getattr(config_or_model, "name_or_path", "") or config_or_model.model_type)


def _refuse_autocast() -> None:
    """Models of transformers before 5.4 ask autocast about the meta device, which it refuses."""
    generic = sys.modules.get("transformers.utils.generic")
    if generic is None:
        return
    try:
        with generic.maybe_autocast("meta", enabled=False):
            return
    except RuntimeError as error:
        raise ConfigError(
            "an estimate runs the model on the meta device, which this release of transformers "
            f"cannot do ({error}): upgrade to transformers 5.4 or later"
        ) from error


def _weightless(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; its weights are neither copied nor read."""
    known: dict[int, Any] = {}
    for tensor in module_tensors(model):
        known.setdefault(id(tensor), _meta_of(tensor))
    for tensor in model.parameters():  # what a quantised one carries has its copy by now
        twin = known[id(tensor)]
        vars(twin).update(copy.deepcopy(vars(tensor), known))
    twin = copy.deepcopy(model, known)
    rebind_fused_heads({module: known[id(module)] for module in model.modules()})
    return twin


def _meta_of(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return torch.Tensor._make_subclass(type(tensor), twin, tensor.requires_grad)
    return twin


def check_tuning(config_or_model: Any, tuning: str) -> None:
    """There is such a tuning, what it needs is installed, and the model can have it.

    Raises:
        ConfigError: one of these isn't so.
    """
    if problems := choice("tuning", tuning, TUNINGS):
        raise ConfigError(problems[0])
    for package in {"lora": ("peft",), "qlora": ("peft", "bitsandbytes")}.get(tuning, ()):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"tuning={tuning!r} needs {package}, which is not installed: "
                'pip install "fxseek[peft]"'
            ) from error
    if tuning != "full" and _has_adapters(config_or_model):
        raise ConfigError(
            f"tuning={tuning!r} would put adapters on a {type(config_or_model).__name__} that has "
            "its own: pass 'full', which trains what requires grad"
        )
    if tuning == "qlora" and _has_quantised(config_or_model):
        raise ConfigError(
            "tuning='qlora' stores weights in 4 bits, and bitsandbytes has quantised this "
            f"{type(config_or_model).__name__} already: pass 'lora', or 'full' for what requires "
            "grad"
        )


def tunings_of(config_or_model: Any) -> tuple[str, ...]:
    """The tunings that a model can have, whatever is installed."""
    if _has_adapters(config_or_model):
        return ("full",)
    return ("full", "lora") if _has_quantised(config_or_model) else TUNINGS


def _has_adapters(config_or_model: Any) -> bool:
    """Whether peft has put something into a model, or around it."""
    layers, peft = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft")
    if layers is None or peft is None or not isinstance(config_or_model, nn.Module):
        return False
    kinds = (layers.BaseTunerLayer, peft.PeftModel)
    return any(isinstance(module, kinds) for module in config_or_model.modules())


def _has_quantised(config_or_model: Any) -> bool:
    """Whether bitsandbytes stores weights of a model."""
    library = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(config_or_model, nn.Module):
        return False
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    return any(isinstance(module, kinds) for module in config_or_model.modules())


def tuned(model: nn.Module, tuning: str, rank: int, dtype: torch.dtype) -> nn.Module:
    """The model with adapters, and with weights of 4 bits, where the tuning asks for them."""
    if tuning == "full":
        return model
    if tuning == "qlora":
        _quantise(model, dtype)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.device("meta"):
        return get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with every layer checkpointed, as transformers does it."""
    names = "activation_checkpointing", "gradient_checkpointing"  # the newer one first
    name = next((x for x in names if hasattr(model, f"{x}_enable")), None)
    try:
        if name is None:
            raise ValueError(f"it has no {names[0]}_enable")
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise ConfigError(
            f"ordinary='checkpointing' needs a model that transformers can checkpoint, and "
            f"{type(model).__name__} is none ({error})"
        ) from error
    return model


def _quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers but the head, in place, as bitsandbytes stores them in NF4."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    def empty(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    kind: dict[str, Any] = {"quant_type": "nf4", "bnb_quantized": True}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        with torch.device("meta"):
            new: Any = Linear4bit(
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
        new.weight = Params4bit(packed, **{**kind, "quant_state": state, "module": new})
        new.bias, new.quant_state = layer.bias, state
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def batch_of(model: nn.Module, tokens: int, batch: int) -> dict[str, Tensor]:
    """Full rows of tokens, with the arguments that the model takes."""
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    image = "pixel_values" in parameters and "input_ids" not in parameters
    if image or (not open_ended and not {"input_ids", "labels"} <= set(parameters)):
        raise ConfigError(
            f"{type(model).__name__}.forward takes {', '.join(parameters)}: an estimate is of a "
            "causal language model, which takes input_ids and labels"
        )
    return {name: x for name, x in inputs.items() if open_ended or name in parameters}

"""What a model says of itself: whether a step can be compiled for it, whether it has a cache."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

from torch import nn
from torch.nn import functional as F

from fxseek.capture.quantised import refuse_packed
from fxseek.capture.sharded import refuse_sharded
from fxseek.errors import CaptureError, FxseekError

__all__ = ["refuse_model", "refuse_uncaptured", "uses_cache"]

# In the names of attention implementations that take whole sequences in a layout of their own.
_WHOLE_ONLY = ("flash", "flex")
_CONTEXT = "torch.distributed.tensor.experimental"
"""Where `context_parallel` has what it puts in the place of SDPA."""
_NEFTUNE = "neftune_post_forward_hook"
"""Of transformers.integrations.neftune."""
_LIGER = "liger_kernel"
"""The package whose forwards are put into the modules of a model, or are those of their classes."""


def refuse_model(modules: Iterable[tuple[str, nn.Module]], kind: type[FxseekError]) -> None:
    """Refuse what no step can be compiled for, given the model's `named_modules()`.

    Wrappers for parallel training call the model; they are not compiled with it. Kernels that take
    whole sequences in a layout of their own have no selected-rows form, nor have Liger's kernels.
    NEFTune's noise can't be captured. Weights that bitsandbytes has packed for inference have no
    gradient.
    """
    flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    modules = list(modules)
    refuse_sharded(modules, kind)
    if (getattr(F.scaled_dot_product_attention, "__module__", "") or "").startswith(_CONTEXT):
        raise kind(
            "context parallelism is on: a process holds a part of each row, whose attention reads "
            "the others' keys. Give each process whole rows; learn_chunk= and prefill_chunk= bound "
            "the memory of long ones."
        )
    configs = set()
    for name, module in modules:
        if isinstance(module, nn.DataParallel):
            raise kind(
                f"{_named(name)} is wrapped by DataParallel, whose copies of a model cannot be "
                "compiled. Use DistributedDataParallel, one process for each device (torchrun), or "
                "show the process one device alone (CUDA_VISIBLE_DEVICES)."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise kind(
                f"{_named(name)} is wrapped by {type(module).__name__}: compile the inner module "
                "before wrapping, fxseek.compile(model.module)"
            )
        if isinstance(module, flat) or "_flat_param" in module._parameters:
            raise kind(
                f"{_named(name)} is sharded by FullyShardedDataParallel, the first FSDP: its "
                "parameters exist only inside its own hooks, which one graph cannot hold. Use "
                "FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 of accelerate)."
            )
        if any(getattr(x, "__name__", "") == _NEFTUNE for x in module._forward_hooks.values()):
            raise kind(
                f"NEFTune adds noise to what {_named(name)} returns, by a hook that draws between "
                "bounds which are tensors: that cannot be captured. Leave out neftune_noise_alpha."
            )
        if (getattr(module.forward, "__module__", "") or "").partition(".")[0] == _LIGER:
            raise kind(
                f"{_named(name)} runs Liger's forward, whose kernels have no form for selected "
                "rows. Leave out use_liger_kernel, and load the model without Liger; fxseek itself "
                'never holds the logits of all tokens, and recompute="block" saves least.'
            )
        refuse_packed(name, module, kind)
        config = module.__dict__.get("config")
        if config is None or id(config) in configs:
            continue
        configs.add(id(config))  # as a rule the modules of a model share one
        implementation = getattr(config, "_attn_implementation", None)
        if isinstance(implementation, str) and any(x in implementation for x in _WHOLE_ONLY):
            raise kind(
                f"attn_implementation={implementation!r} in {_named(name)}: queries of "
                "selected tokens cannot be handed to it. Load the model with "
                'attn_implementation="sdpa" or "eager", or call '
                'model.set_attn_implementation("sdpa").'
            )


def refuse_uncaptured(model: str) -> NoReturn:
    """Refuse a step that Dynamo leaves to Python: it would train on all tokens.

    Raises:
        CaptureError: always.
    """
    raise CaptureError(
        f"{model} was not captured: torch.compile captures nothing under a TorchDispatchMode, such "
        "as FlopCounterMode or a tracker of memory, or where it is switched off "
        "(torch.compiler.set_stance, TORCHDYNAMO_DISABLE). Run the step outside of the mode, or "
        "switch torch.compile on; fxseek.profile(model, ...) measures the time and memory of a "
        "step, and fxseek.uncompile(model) gives the model its ordinary step back."
    )


def uses_cache(model: nn.Module) -> bool | None:
    """Whether a model makes a cache unless it is told otherwise; None where it knows none.

    A model of images and text has the choice in the part of its configuration that is for text.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    for part in (config, text(decoder=True) if callable(text) else None):
        if (choice := getattr(part, "use_cache", None)) is not None:
            return choice
    return None


def _named(name: str) -> str:
    return repr(name) if name else "the model"

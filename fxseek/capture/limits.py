"""What a model says of itself: whether a step can be compiled for it, whether it has a cache."""

from __future__ import annotations

import sys

from torch import nn

from fxseek.errors import FxseekError

__all__ = ["refuse_attention", "refuse_wrapper", "uses_cache"]

# In the names of attention implementations that take whole sequences in a layout of their own.
_WHOLE_ONLY = ("flash", "flex")


def refuse_wrapper(model: nn.Module, kind: type[FxseekError]) -> None:
    """Wrappers for parallel training call the model; they are not compiled with it."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, parallel):
        raise kind(
            f"the model is wrapped by {type(model).__name__}: compile the inner module before "
            "wrapping, fxseek.compile(model.module)"
        )
    for name, module in model.named_modules():
        if isinstance(module, _sharded()) or "_flat_param" in module._parameters:
            raise kind(
                f"{_named(name)} is sharded by FSDP: its parameters exist only inside its own "
                "hooks, which one graph cannot hold. Use DistributedDataParallel around a model "
                "that fxseek.compile was given."
            )


def _sharded() -> tuple[type, ...]:
    """FSDP's classes, both generations, if anyone has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FullyShardedDataParallel", "FSDPModule")
    return tuple(kind for name in names if (kind := getattr(fsdp, name, None)) is not None)


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


def refuse_attention(model: nn.Module, kind: type[FxseekError]) -> None:
    """Kernels that take whole sequences of their own layout have no selected-rows form."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if isinstance(implementation, str) and any(x in implementation for x in _WHOLE_ONLY):
            raise kind(
                f"attn_implementation={implementation!r} in {_named(name)}: queries of "
                "selected tokens cannot be handed to it. Load the model with "
                'attn_implementation="sdpa" or "eager", or call '
                'model.set_attn_implementation("sdpa").'
            )


def _named(name: str) -> str:
    return repr(name) if name else "the model"

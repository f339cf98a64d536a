"""Quantised weights: what Dynamo traces where PEFT reads one, and what stands for a sharded one."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fxseek.errors import FxseekError

__all__ = ["holds_packed", "packed_weight", "refuse_packed", "trace_dequantisation"]

_done = False


def trace_dequantisation() -> None:
    """Let Dynamo trace PEFT's functions that dequantise a weight, once they are imported.

    `dequantize_module_weight` and `dequantize_bnb_weight` of `peft.utils.integrations` ask for the
    name of the weight's class, and on the CPU the former puts the weight back into its module.
    Neither can be captured. `torch.compiler.substitute_in_graph` has Dynamo, and it alone, take
    other ones for them.
    """
    global _done
    module = sys.modules.get("peft.utils.integrations")
    if module is None or _done:
        return
    _done = True

    def dequantize_module_weight(module: torch.nn.Module) -> torch.nn.Parameter:
        if hasattr(module, "W_q"):  # HQQ
            return module.dequantize()  # type: ignore[operator]
        weight: Any = module.weight
        if type(weight).__module__.startswith("torchao."):
            return weight.dequantize()
        return dequantize_bnb_weight(weight, getattr(module, "state", None))

    def dequantize_bnb_weight(weight: Any, state: Any = None) -> Any:
        own = getattr(weight, "quant_state", None)
        if own is not None:  # 4 bits
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight, own)
        if hasattr(weight, "SCB"):  # 8 bits
            from bitsandbytes.functional import int8_vectorwise_dequant

            scales = None if state is None else state.SCB
            return int8_vectorwise_dequant(weight, weight.SCB if scales is None else scales)
        return weight

    for traced in (dequantize_module_weight, dequantize_bnb_weight):
        original = getattr(module, traced.__name__, None)
        if original is not None:
            torch.compiler.substitute_in_graph(original)(traced)


def refuse_packed(name: str, module: torch.nn.Module, kind: type[FxseekError]) -> None:
    """Refuse a module whose weights of 4 bits are in the layout for a CPU's inference.

    On CPUs with AVX512-BF16, bitsandbytes puts them there in the first evaluation. Its product with
    such a weight has no gradient: what flows through it would be lost, with or without fxseek.
    """
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise kind(
            f"the 4-bit weight of {name!r} is in the layout that bitsandbytes makes for inference "
            "on this CPU, in the first evaluation: products with it have no gradient. Load the "
            "model again, and compile it before it is evaluated; a compiled model keeps its layout."
        )


def holds_packed(module: torch.nn.Module, name: str) -> bool:
    """Whether a parameter of a module holds numbers of 4 bits of bitsandbytes, packed."""
    return name == "weight" and getattr(module, "quant_state", None) is not None


def packed_weight(
    module: torch.nn.Module, name: str, empty: torch.Tensor
) -> torch.nn.Parameter | None:
    """A parameter of 4 bits that has the module's state, as a shard has not; None for others.

    bitsandbytes would make one of a plain parameter in the module's forward.
    """
    if not holds_packed(module, name):
        return None
    from bitsandbytes.nn.modules import Params4bit

    state: Any = module.quant_state
    kind: dict[str, Any] = {
        "quant_state": state, "blocksize": state.blocksize, "compress_statistics": state.nested,
        "quant_type": state.quant_type, "quant_storage": empty.dtype, "bnb_quantized": True,
    }  # fmt: skip
    return Params4bit(empty, **kind)

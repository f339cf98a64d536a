"""What Dynamo traces where PEFT reads a quantised weight, as DoRA does."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["trace_dequantisation"]

_done = False


def trace_dequantisation() -> None:
    """Let Dynamo trace `peft.utils.integrations.dequantize_module_weight`, once it is imported.

    The function asks for the name of the weight's class, and on the CPU puts the weight back into
    its module, neither of which can be captured. `torch.compiler.substitute_in_graph` has Dynamo,
    and it alone, take another one for it.
    """
    global _done
    module = sys.modules.get("peft.utils.integrations")
    original = getattr(module, "dequantize_module_weight", None)
    if original is None or _done:
        return
    _done = True

    def dequantize_module_weight(module: torch.nn.Module) -> torch.nn.Parameter:
        if hasattr(module, "W_q"):  # HQQ
            return module.dequantize()  # type: ignore[operator]
        weight: Any = module.weight
        if type(weight).__module__.startswith("torchao."):
            return weight.dequantize()
        state = getattr(weight, "quant_state", None)
        if state is not None:  # 4 bits
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight, state)  # type: ignore[return-value]
        if hasattr(weight, "SCB"):  # 8 bits
            from bitsandbytes.functional import int8_vectorwise_dequant

            scales: Any = module.state.SCB  # type: ignore[union-attr]
            return int8_vectorwise_dequant(weight, weight.SCB if scales is None else scales)
        return weight

    torch.compiler.substitute_in_graph(original)(dequantize_module_weight)

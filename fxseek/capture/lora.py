"""PEFT's adapters on stacked weights of experts, written so that Dynamo can trace them.

`LoraConfig(target_parameters=...)` wraps a module in a `ParamWrapper`, whose forward registers a
parametrization for as long as the module runs: that changes the module's class and writes to the
parameter by `set_`, neither of which Dynamo can trace. While a step of fxseek is run, the adapted
weight itself takes the parameter's place. It is the same number: the weight and what the adapters
add to it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fxseek.capture.stand_ins import StandIns

__all__ = ["traceable_target_parameters"]

_REPLACED = StandIns()
_WRAPPER = ("_activate_lora", "get_param", "get_base_layer", "get_delta_weight")


@contextlib.contextmanager
def traceable_target_parameters() -> Iterator[None]:
    """PEFT's wrapper of parameters can be traced, where PEFT is imported and has it."""
    wrapper: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    if not all(hasattr(wrapper, name) for name in _WRAPPER):
        yield
        return
    with _REPLACED.on(lambda: [(wrapper, "_activate_lora", _in_place_of)]):
        yield


def _in_place_of(activate: Any) -> Any:
    @contextlib.contextmanager
    def adapted(self: Any, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        weight = self.get_param()
        if not adapters or weight.dtype not in _PLAIN:
            with activate(self, active_adapters):
                yield
            return
        parameters, name = self.get_base_layer()._parameters, self.parameter_name
        parameters[name] = _adapted(self, weight, adapters)
        try:
            yield
        finally:
            parameters[name] = weight

    return adapted


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _adapted(wrapper: Any, weight: torch.Tensor, adapters: list[str]) -> torch.Tensor:
    """A weight with what its adapters add to it, as PEFT computes it."""
    if len(adapters) == 1 and wrapper.num_experts > 1 and hasattr(wrapper, "get_delta_factors"):
        up, down, scale = wrapper.get_delta_factors(adapters[0])
        if weight.device.type == "meta":  # which has no autocast
            return torch.baddbmm(weight, up, down, alpha=scale)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return torch.baddbmm(weight, up, down, alpha=scale)
    for name in adapters:
        weight = weight + wrapper.get_delta_weight(name)
    return weight

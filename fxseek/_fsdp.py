"""The one place where fxseek touches FSDP2 (`torch.distributed.fsdp.fully_shard`) by private names.

What a module was sharded with is public nowhere: its policy of mixed precision, the factor by which
gradients are divided, and the hooks by which it makes parameters whole. Nothing here imports the
rest of fxseek.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_HOOKS = "torch.distributed.fsdp."


# Torch 2.13 has deprecated one name of each.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sharded_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that `fully_shard` was called on; none where nobody has imported it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]


def is_sharded(parameter: Any) -> bool:
    """Whether a parameter is a `DTensor`."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(parameter, kind)


def state_of(module: nn.Module) -> Any:
    """The state that `fully_shard` gave a module (`fully_shard.state`, which its stub lacks)."""
    from torch.distributed.fsdp import fully_shard

    return vars(fully_shard)["state"](module)


def groups_of(module: nn.Module) -> list[Any]:
    """The groups of parameters that a module gathers; several since torch 2.12."""
    state = state_of(module)
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None:
        found = [state._fsdp_param_group]
    return [group for group in found if group is not None]


def begin(modules: Iterable[nn.Module]) -> None:
    """Let FSDP finish its set-up, as its first forward does, with its checks."""
    for module in modules:
        state_of(module)._lazy_init()


def policy_of(module: nn.Module) -> Any:
    """The `MixedPrecisionPolicy` of a module."""
    return state_of(module)._mp_policy


def reduces(module: nn.Module) -> bool:
    """Whether FSDP's backward reduces a module's gradients (`set_requires_gradient_sync`)."""
    return all(group.reduce_grads for group in groups_of(module))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its parameters may wait elsewhere."""
    return state_of(module)._device


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """A module's forward pre-hooks and forward hooks, which are called in their order."""
    return module._forward_pre_hooks, module._forward_hooks


def own_hooks(table: dict[int, Any]) -> list[int]:
    """The keys of the hooks in such a table that are FSDP's."""
    names = {key: getattr(hook, "__module__", None) or "" for key, hook in table.items()}
    return [key for key, name in names.items() if name.startswith(_HOOKS)]


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register another parameter in the place of one, past hooks and checks of `__setattr__`."""
    module._parameters[name] = parameter

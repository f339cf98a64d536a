"""What is switched off on a model while it is compiled, and switched on again afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Switches"]

log = logging.getLogger("fxseek")

Modules = list[tuple[str, nn.Module]]


class Switches:
    """Switches things of a model off. `restore` undoes it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def off(self, modules: Modules) -> None:
        """Switch off what stands in the way of a step, given the model's `named_modules()`.

        That is gradient checkpointing, the input-require-grads hook, and the packing of 4-bit
        weights for a CPU's inference.
        """
        if self._set(modules, "gradient_checkpointing"):
            log.warning(
                "fxseek: gradient checkpointing is switched off; the compiled step keeps the "
                "activations of selected tokens only, so there is nothing left to checkpoint"
            )
        hooks = _input_hooks(modules)
        for table, key in hooks:
            self._undo.append(partial(table.__setitem__, key, table.pop(key)))
        if hooks:
            log.warning(
                "fxseek: the input-require-grads hook is removed; only gradient checkpointing "
                "needs it, and it cannot be captured"
            )
        # bitsandbytes would pack the weights in the first evaluation, for good (`refuse_packed`)
        self._set(modules, "support_avx512bf16_for_cpu")

    def _set(self, modules: Modules, name: str) -> bool:
        """Set a flag that is on to False; answers whether it was on anywhere."""
        found = False
        for _, module in modules:
            # getattr on a module that has no such attribute is slow
            flag = module.__dict__.get(name, getattr(type(module), name, None))
            if isinstance(flag, int) and flag:
                setattr(module, name, False)
                self._undo.append(partial(setattr, module, name, flag))
                found = True
        return found

    def restore(self) -> None:
        """Switch everything on again."""
        while self._undo:
            self._undo.pop()()


def _input_hooks(modules: Modules) -> list[tuple[dict[int, Any], int]]:
    """The hooks that make embeddings' outputs require grad (transformers and peft name them so)."""
    return [
        (module._forward_hooks, key)
        for _, module in modules
        for key, hook in module._forward_hooks.items()
        if "make_inputs_require_grad" in getattr(hook, "__name__", "")
    ]

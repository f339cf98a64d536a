"""What stands in the place of an activation that a training step doesn't compute."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from torch import Tensor, nn

from fxseek.errors import InputError

__all__ = ["Uncomputed", "cleared"]


class Uncomputed:
    """An activation of all tokens that a training step doesn't compute.

    Where the model returns one, its output has None. Whoever else keeps one (a forward hook, the
    model in an attribute) gets this object.

    Raises:
        InputError: at any use but `repr`, copying and pickling.
    """

    def __repr__(self) -> str:
        return "<an activation that a training step does not compute>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, pickle and inspect
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse()

    @classmethod
    def _refuse(cls, *_: Any) -> NoReturn:
        raise InputError(
            "this activation was kept by a hook or by the model in a training step, which computes "
            'no activations of all tokens: fxseek.compile(model, ..., outputs="full") makes it '
            'keep them, outputs="selected" their selected rows. In eval mode hooks get all.'
        )


for _name in (
    *("bool", "len", "iter", "getitem", "setitem", "contains", "float", "int", "array", "call"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul"),
    *("pow", "neg", "abs", "lt", "le", "gt", "ge"),
):
    setattr(Uncomputed, f"__{_name}__", Uncomputed._refuse)


def cleared(value: Any, seen: list[Uncomputed]) -> Any:
    """A model's output with None for each `Uncomputed`; those that were met are added to `seen`."""
    if isinstance(value, Uncomputed):
        seen.append(value)
        return None
    if isinstance(value, dict):
        for key, part in value.items():
            if (other := cleared(part, seen)) is not part:
                value[key] = other
    elif isinstance(value, list):
        value[:] = [cleared(part, seen) for part in value]
    elif isinstance(value, tuple):
        parts = [cleared(part, seen) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if (other := cleared(part, seen)) is not part:
                object.__setattr__(value, field.name, other)
    elif _holds(value, seen, set()):
        return None
    return value


def _holds(value: Any, seen: list[Uncomputed], met: set[int]) -> bool:
    """Whether an object keeps an `Uncomputed`, as a cache of keys and values does."""
    if isinstance(value, Uncomputed):
        seen.append(value)
        return True
    if id(value) in met or isinstance(value, (Tensor, nn.Module, type)):
        return False
    met.add(id(value))
    kept = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    parts = value if isinstance(value, (list, tuple)) else kept.values()
    return sum(_holds(part, seen, met) for part in parts) > 0

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


def cleared(value: Any, seen: list[Uncomputed], *, inside: bool = False) -> Any:
    """A model's output with None for each `Uncomputed`; those that were met are added to `seen`.

    An object `inside` an output that keeps one, as a cache of keys and values does, is None too.
    """
    if isinstance(value, Uncomputed):
        seen.append(value)
        return None
    if isinstance(value, dict):
        for key, part in value.items():
            if (other := cleared(part, seen, inside=True)) is not part:
                value[key] = other
    elif isinstance(value, list):
        value[:] = [cleared(part, seen, inside=True) for part in value]
    elif isinstance(value, tuple):
        parts = [cleared(part, seen, inside=True) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif names := _names(value, inside):
        for name in names:
            part = getattr(value, name)
            if (other := cleared(part, seen, inside=True)) is not part:
                object.__setattr__(value, name, other)
    elif _holds(value, seen):
        return None
    return value


def _names(value: Any, inside: bool) -> list[str]:
    """The attributes that are outputs: those of a dataclass, and of an output of any class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value)]
    return [] if inside else list(getattr(value, "__dict__", {}))


def _holds(value: Any, seen: list[Uncomputed]) -> bool:
    """Whether an object keeps an `Uncomputed`, however deep."""
    before, met, queue = len(seen), set[int](), [value]
    while queue:
        part = queue.pop()
        if isinstance(part, Uncomputed):
            seen.append(part)
        elif id(part) not in met and not isinstance(part, (Tensor, nn.Module, type)):
            met.add(id(part))
            if isinstance(part, (list, tuple, set)):
                queue.extend(part)
            else:
                kept = part if isinstance(part, dict) else getattr(part, "__dict__", {})
                queue.extend(kept.values())
    return len(seen) > before

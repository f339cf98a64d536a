"""Operations on meta tensors that were run before: the layers of a model repeat them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.passes.facts import tensors_of

__all__ = ["Calls"]


class Calls:
    """Runs operations; one that makes new meta tensors runs once for operands of the same kind.

    What torch finds out of operands in Python, even for a sum, takes many times as long as to make
    a tensor of the shape that it found. Views, writes, and results that share memory run each time.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, _Result | None] = {}
        self._functional: dict[Any, bool] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation gives for these arguments."""
        if func not in self._functional:
            self._functional[func] = _is_functional(func)
        operands = [*args, *kwargs.values()]
        kinds = [_kind(x) for x in operands] if self._functional[func] else [None]
        if None in kinds:
            return func(*args, **kwargs)
        call = (func, *kwargs, *kinds)
        known = self._found.get(call)
        if known is not None:
            return known.again()
        out = func(*args, **kwargs)
        if call not in self._found:
            self._found[call] = _Result.of(out, operands)
        return out


def _is_functional(func: Any) -> bool:
    """Whether an operation says that its results are tensors, new ones, and that it writes none."""
    schema = func._schema
    return all(str(result.type) == "Tensor" for result in schema.returns) and not any(
        x.alias_info for x in (*schema.arguments, *schema.returns)
    )


def _kind(value: Any) -> Hashable:
    """Equal for arguments for which results are of one kind; None where that isn't known."""
    if isinstance(value, Tensor):
        if (
            type(value) not in (Tensor, nn.Parameter)
            or not value.is_meta
            or value.is_conj()
            or value.is_neg()
        ):
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        kinds = tuple(map(_kind, value))
        return None if None in kinds else (type(value), kinds)
    plain = value is None or isinstance(value, _PLAIN)
    return (type(value), value) if plain else None  # True, 1 and 1.0 are equal


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Result(NamedTuple):
    """What an operation has made."""

    several: type | None
    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]

    @staticmethod
    def of(out: Any, operands: list[Any]) -> _Result | None:
        """None where it is more than new tensors without gaps in their memory."""
        several = None if isinstance(out, Tensor) else type(out)
        tensors = (out,) if several is None else tuple(out)
        if not all(type(x) is Tensor and x.is_meta for x in tensors):
            return None
        result = _Result(several, tuple((x.shape, x.stride(), x.dtype) for x in tensors))
        own = {_torch.storage_key(x) for x in tensors}
        shared = own & {_torch.storage_key(x) for x in tensors_of(operands)}
        made = result.again()
        alike = zip(tensors, (made,) if several is None else made, strict=True)
        if (
            len(own) < len(tensors)
            or shared
            or any(x.untyped_storage().nbytes() != y.untyped_storage().nbytes() for x, y in alike)
        ):
            return None
        return result

    def again(self) -> Any:
        """The same of new memory."""
        made = [torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in self.tensors]
        return made[0] if self.several is None else self.several(made)

"""Operations on meta tensors that are not run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxseek import _torch
from fxseek.inspect.calls import Calls

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shown(out: Any) -> Any:
    if not isinstance(out, Tensor):
        return type(out), [shown(x) for x in out]
    memory = out.storage_offset(), out.untyped_storage().nbytes()
    return out.shape, out.stride(), out.dtype, *memory


X, HALF, WHOLE = meta(3, 5), meta(3, 1, dtype=torch.bfloat16), meta(3, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.mul.Tensor, (X, HALF), {}),
        (aten.add.Tensor, (X.t(), 2.0), {"alpha": 3}),
        (aten.mean.dim, (X, [-1], True), {}),
        (aten.cat.default, ([X, HALF], 1), {}),
        (aten._to_copy.default, (X,), {"dtype": torch.float64}),
        (aten.native_layer_norm.default, (X, [5], None, None, 1e-5), {}),
        (aten.mm.default, (X, X.t()), {}),
        (aten.index_copy.default, (X, 0, meta(2, dtype=torch.int64), X[:2]), {}),
    ],
)
def test_what_a_second_call_makes(func: Any, args: Any, kwargs: Any):
    calls, ran = Calls(), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return func(*args, **kwargs)

    counted._schema = func._schema  # type: ignore[attr-defined]
    found = [calls(counted, args, kwargs) for _ in range(3)]
    assert len(ran) == 1
    assert [shown(x) for x in found] == [shown(func(*args, **kwargs))] * 3
    parts = [part for x in found for part in ([x] if isinstance(x, Tensor) else x)]
    assert len({_torch.storage_key(part) for part in parts}) == len(parts)


def test_operands_that_are_equal_and_of_another_kind():
    calls = Calls()
    kinds = [calls(aten.add.Tensor, (WHOLE, number), {}).dtype for number in (1, 1.0, True)]
    assert kinds == [torch.int64, torch.float32, torch.int64]
    powers = [calls(aten.sum.dim_IntList, (X, [0], keep), {}).shape for keep in (False, True)]
    assert powers == [(5,), (1, 5)]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten._unsafe_view.default, (X, [15])),
        (aten.view.default, (X, [15])),
        (aten.detach.default, (X,)),
        (aten.add_.Tensor, (X, 1)),
    ],
)
def test_memory_that_is_shared(func: Any, args: Any):
    calls = Calls()
    for _ in range(3):
        assert _torch.storage_key(calls(func, args, {})) == _torch.storage_key(X)


def test_values_are_made_again():
    calls, one = Calls(), torch.ones(2)
    found = [calls(aten.add.Tensor, (one, number), {}) for number in (one, one + 1)]
    assert [x.tolist() for x in found] == [[2.0, 2.0], [3.0, 3.0]]

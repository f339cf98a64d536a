"""The cross-entropy of a chunk: its gradient in the score stage is autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxseek.ops.loss import Scratch, cross_entropy_parts, cross_entropy_slope

ROWS, CLASSES = 11, 7


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some of which do not count) and weights of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[[0, 4]] = -100
    weights = torch.ones(1, ROWS)
    weights[0, [2, 4]] = 0
    return logits.to(dtype), target, weights


def by_autograd(logits: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    total, _ = cross_entropy_parts(logits, *rest, **options)
    (slope,) = torch.autograd.grad(total, logits)
    return slope, total.detach()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_slope(label_smoothing: float, ignore_index: int, weighted: bool):
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    logits, target, weights = given()
    if weighted:
        weights *= torch.linspace(0.5, 4, ROWS)
    target[target == -100] = ignore_index
    before = logits.clone()
    slope, total, labelled = cross_entropy_slope(logits, target, weights, **options)
    wanted_slope, wanted = by_autograd(logits, target, weights, **options)
    assert labelled == cross_entropy_parts(logits, target, weights, **options)[1]
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(total, wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(logits, before)


def test_slope_of_classes_in_the_second_dimension():
    logits, target, weights = given()
    wide = logits.view(1, ROWS, CLASSES).transpose(1, 2)
    slope, total, _ = cross_entropy_slope(wide, target[None], weights)
    wanted_slope, wanted = by_autograd(wide, target[None], weights)
    torch.testing.assert_close(slope, wanted_slope)
    torch.testing.assert_close(total, wanted)


def test_slope_of_one_token():
    logits, target, _ = given()
    slope, total, _ = cross_entropy_slope(logits[1], target[1], torch.ones(1, 1))
    wanted_slope, wanted = by_autograd(logits[1], target[1], torch.ones(1, 1))
    torch.testing.assert_close(slope, wanted_slope)
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slope_in_less_precision(dtype: torch.dtype):
    logits, target, weights = given(dtype)
    slope, total, _ = cross_entropy_slope(logits, target, weights)
    wanted_slope, wanted = by_autograd(logits.double(), target, weights)
    assert slope.dtype == dtype and total.dtype == torch.float32
    close: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(slope.double(), wanted_slope, check_dtype=False, **close)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_slopes_in_memory_of_their_own():
    """One chunk after the other, of other sizes and types: the same numbers, one memory."""
    scratch = Scratch()
    for rows, dtype in ((4, torch.float32), (3, torch.float32), (5, torch.float64)):
        logits, target, weights = (x[..., :rows] if x.dim() == 1 else x for x in given(dtype))
        logits, weights = logits[:rows], weights[:, :rows]
        wanted, total, _ = cross_entropy_slope(logits, target, weights)
        slope, again, _ = cross_entropy_slope(logits, target, weights, scratch=scratch)
        assert torch.equal(slope, wanted) and torch.equal(again, total)
        assert scratch.memory is not None
        assert slope.data_ptr() == scratch.memory.data_ptr()
    assert scratch.memory.numel() == 5 * CLASSES  # type: ignore[union-attr]


def test_what_does_not_count_may_be_anything():
    logits, target, weights = given()
    wanted_slope, wanted, _ = cross_entropy_slope(logits, target, weights)
    logits[[0, 2, 4]] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None].double()
    slope, total, _ = cross_entropy_slope(logits, target, weights)
    assert torch.equal(slope, wanted_slope) and torch.equal(total, wanted)


def test_classes_that_cannot_be():
    """A masked vocabulary: logits of minus infinity have no gradient."""
    logits, target, weights = given()
    target.fill_(2)
    logits[:, 5:] = -torch.inf
    slope, total, _ = cross_entropy_slope(logits, target, weights)
    assert torch.isfinite(slope).all() and torch.isfinite(total)
    assert not slope[:, 5:].any()

"""A ratio from a memory budget."""

from __future__ import annotations

import pytest
from models import batch, tiny_llama

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.budget import ratio_within
from fxseek.inspect.estimate import peak_of_ratios

BOUNDS = (0.05, 0.9)
SIZES = {"hidden_size": 24, "intermediate_size": 40}
WIDE = {**SIZES, "num_hidden_layers": 3, "vocab_size": 37}


@pytest.fixture(scope="module")
def peaks() -> tuple[int, int]:
    config = fxseek.SeekConfig(BOUNDS[1], ratio_bounds=BOUNDS, chunk_bytes=1 << 12)
    peak = peak_of_ratios(tiny_llama("sdpa", **WIDE), config, 61, 3, device="cpu")
    return peak(BOUNDS[0]), peak(BOUNDS[1])


def config_for(budget: int) -> fxseek.SeekConfig:
    return fxseek.SeekConfig(
        0.1, ratio_bounds=BOUNDS, memory_budget_bytes=budget, chunk_bytes=1 << 12
    )


def test_the_largest_ratio_that_fits(peaks: tuple[int, int]):
    least, most = peaks
    assert least < most
    config = config_for((least + most) // 2)
    model = tiny_llama("sdpa", **WIDE).train()
    ratio = ratio_within(model, config, 61, 3)
    assert BOUNDS[0] < ratio < BOUNDS[1]
    peak = peak_of_ratios(model, config_for(most), 61, 3, device="cpu")
    assert peak(ratio) <= (least + most) // 2 < peak(min(BOUNDS[1], ratio + 0.1))


def test_a_step_takes_it_and_larger_batches_pick_anew(peaks: tuple[int, int]):
    least, most = peaks
    model = fxseek.compile(tiny_llama("sdpa", **WIDE).train(), config_for((least + most) // 2))
    model(**batch(37, batch=2, tokens=31)).loss.backward()
    assert fxseek.report(model).selected.shape[1] == -(-31 * 9 // 10)
    model(**batch(37, batch=3, tokens=61)).loss.backward()
    kept = fxseek.report(model).selected.shape[1]
    assert kept < -(-61 * 9 // 10)
    step = step_of(model)
    assert step is not None and BOUNDS[0] < step.config.ratio < BOUNDS[1]  # type: ignore[operator]
    model(**batch(37, batch=2, tokens=31)).loss.backward()
    assert fxseek.report(model).selected.shape[1] < -(-31 * 9 // 10)


def test_before_the_first_step(peaks: tuple[int, int]):
    """What is explained and measured is the step that the budget will allow."""
    model = fxseek.compile(tiny_llama("sdpa", **WIDE).train(), config_for(peaks[1]))
    inputs = batch(37, batch=3, tokens=61)
    kept = fxseek.explain(model, **inputs).kept
    assert fxseek.profile(model, **inputs).kept == kept
    model(**inputs).loss.backward()
    assert fxseek.report(model).selected.shape[1] == kept == -(-61 * 9 // 10)


def test_out_of_reach(peaks: tuple[int, int]):
    model = fxseek.compile(tiny_llama("sdpa", **WIDE).train(), config_for(peaks[0] // 2))
    inputs = batch(37, batch=3, tokens=61)
    with pytest.raises(fxseek.ConfigError, match=r"cannot be reached.*recompute=.block"):
        model(**inputs)
    fxseek.uncompile(model)
    model(**inputs).loss.backward()


@pytest.mark.parametrize("options", [{"memory_budget_bytes": 0}, {"memory_budget_bytes": 1.5}])
def test_bad_budgets(options: dict[str, float]):
    with pytest.raises(fxseek.ConfigError, match="memory_budget_bytes"):
        fxseek.SeekConfig(0.1, **options)  # type: ignore[arg-type]


def test_two_that_pick_the_ratio():
    with pytest.raises(fxseek.ConfigError, match="leave one out"):
        fxseek.SeekConfig("mass:0.9", memory_budget_bytes=1 << 30)

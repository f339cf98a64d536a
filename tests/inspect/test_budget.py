"""What a memory budget picks: how a step is run, and never what it learns."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import pytest
import torch
from models import batch, tiny_llama, without_casts

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect import budget as budgets
from fxseek.inspect.budget import within_budget
from fxseek.inspect.estimate import Peaks

TOKENS, ROWS = 56, 2
SIZES = (28, 14, 7)
MODEL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}


def model() -> torch.nn.Module:
    return without_casts(tiny_llama("sdpa", **MODEL).double()).train()


def config(budget: int | str, **options: Any) -> fxseek.SeekConfig:
    options = {"chunk_bytes": 1 << 12, "memory_budget_bytes": budget, **options}
    return fxseek.SeekConfig(options.pop("ratio", 1.0), **options)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_SIZES", SIZES)
    monkeypatch.setattr(budgets, "_PREFILL", 16)
    monkeypatch.setattr(budgets, "_SMALL", 28)
    monkeypatch.setattr(budgets, "_MULTIPLE", 8)


@pytest.fixture(scope="module")
def peaks() -> Peaks:
    return Peaks(model(), config(1), TOKENS, ROWS, "cpu")


def ways(given: fxseek.SeekConfig, device: str = "cpu") -> list[fxseek.SeekConfig]:
    return [way for group in budgets._ladder(given, SIZES, TOKENS, device) for way in group]


def shown(given: fxseek.SeekConfig, device: str = "cpu") -> list[tuple[Any, ...]]:
    return [(x.learn_chunk, x.prefill_chunk, x.recompute, x.kv) for x in ways(given, device)]


def test_what_usually_costs_less_time_comes_first():
    assert shown(config(1)) == [
        (size, prefill, recompute, "device")
        for prefill, recompute in ((None, "selective"), (16, "selective"), (16, "block"))
        for size in SIZES
    ]
    gpu = shown(config(1), "cuda")
    assert gpu.index((28, 16, "block", "device")) < gpu.index((14, None, "selective", "device"))
    assert gpu[-3:] == [(size, 16, "block", "offload") for size in SIZES]
    encoder = budgets._ladder(config(1), (), TOKENS, "cuda")
    assert [(x.learn_chunk, x.prefill_chunk, x.recompute, x.kv) for (x,) in encoder] == [
        (None, 16, "selective", "device"), (None, 16, "block", "device"),
        (None, 16, "block", "offload"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"recompute": "none"},
        {"recompute": "block", "learn_chunk": 5},
        {"prefill_chunk": 7, "ratio": 0.3},
        {"backend": "inductor"},
    ],
    ids=str,
)
def test_what_is_given_stays(given: dict[str, Any]):
    for way in ways(config(1, **given), "cuda"):
        assert all(getattr(way, name) == value for name, value in given.items())
        assert way.ratio == given.get("ratio", 1.0)


def test_the_first_way_that_fits(peaks: Peaks):
    """Of each group of part sizes, the largest; the budgets are the ways' own peaks."""
    given = config(1)
    some = [given, *(dataclasses.replace(given, learn_chunk=size) for size in SIZES)]
    by_peak = {way: peaks(way) for way in some}
    assert [*by_peak.values()] == sorted(by_peak.values(), reverse=True)
    for asked in (some[0], some[2]):
        found = within_budget(model(), config(by_peak[asked]), TOKENS, ROWS)
        assert found == dataclasses.replace(asked, memory_budget_bytes=by_peak[asked])


def test_it_is_asked_for_more_rows_and_for_longer_ones(monkeypatch: pytest.MonkeyPatch):
    """Always for the most of both: parts have tokens of a row, however many rows there are."""
    asked: list[tuple[int, int]] = []

    def fit(model: Any, given: fxseek.SeekConfig, tokens: int, rows: int) -> fxseek.SeekConfig:
        asked.append((rows, tokens))
        return given

    monkeypatch.setattr("fxseek.api.within_budget", fit)
    compiled = fxseek.compile(model(), config("20GiB"))
    for rows, tokens in ((2, 8), (2, 8), (1, 4), (4, 4), (3, 8), (1, 9)):
        compiled(**batch(37, batch=rows, tokens=tokens))
    assert asked == [(2, 8), (4, 8), (4, 9)]


def test_what_two_batches_need_together_is_told(peaks: Peaks):
    """The most rows and the greatest length, which came apart."""
    budget = min(peaks(way) for way in ways(config(1), "cpu")) - 1
    bound = fxseek.compile(model(), config(budget))
    bound(**batch(37, batch=ROWS, tokens=8))
    with pytest.raises(fxseek.ConfigError, match=r"cannot be reached.* of different batches"):
        bound(**batch(37, batch=1, tokens=TOKENS))
    with pytest.raises(fxseek.ConfigError, match="cannot be reached") as caught:
        bound(**batch(37, batch=ROWS, tokens=TOKENS))
    assert "different batches" not in str(caught.value)


def test_autocast_is_told(caplog: pytest.LogCaptureFixture):
    bound = fxseek.compile(model(), config("20GiB"))
    with torch.autocast("cpu", torch.bfloat16):
        bound(**batch(37, batch=1, tokens=8))
    assert "estimated without autocast" in caplog.text


def test_a_step_learns_the_same(peaks: Peaks, caplog: pytest.LogCaptureFixture):
    """And a larger batch picks anew, a smaller one does not."""
    budget = peaks(config(1)) - 1
    inputs = batch(37, batch=ROWS, tokens=TOKENS)
    plain = fxseek.compile(model(), 1.0, chunk_bytes=1 << 12)
    plain(**inputs).loss.backward()
    bound = fxseek.compile(model(), config(budget))
    small = batch(37, batch=1, tokens=12)
    bound(**small)
    step = step_of(bound)
    assert step is not None and step.config.learn_chunk is None
    with caplog.at_level(logging.INFO, "fxseek"):
        bound(**inputs).loss.backward()
    assert step.config.ratio == 1.0
    assert step.config.learn_chunk == 28
    assert "estimated to peak at" in caplog.text
    chosen = step.config
    wanted, found = ({n: p.grad for n, p in x.named_parameters()} for x in (plain, bound))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    bound(**small)
    assert step.config is chosen


def test_before_the_first_step(peaks: Peaks):
    """What is explained and measured is the step that the budget will allow."""
    budget = peaks(config(1, learn_chunk=14))
    compiled = fxseek.compile(model(), config(budget))
    inputs = batch(37, batch=ROWS, tokens=TOKENS)
    assert fxseek.profile(compiled, **inputs).peak_bytes <= 1.02 * budget


def test_out_of_reach(peaks: Peaks):
    groups = budgets._ladder(config(1), SIZES, TOKENS, "cpu")
    least = min(map(peaks, [config(1), *(group[-1] for group in groups)]))
    given = config(least - 1)
    compiled = fxseek.compile(model(), given)
    inputs = batch(37, batch=ROWS, tokens=TOKENS)
    with pytest.raises(fxseek.ConfigError, match=r"cannot be reached.*What would fit") as raised:
        compiled(**inputs)
    text = str(raised.value)
    length = re.search(r"What would fit: .*rows of (\d+) tokens", text)
    assert length is not None
    fits = int(length[1])
    assert TOKENS // 2 < fits < TOKENS
    within_budget(model(), given, fits, ROWS)
    ratio = re.search(r"What would fit: ratio=(0\.\d+), or", text)
    assert ratio is not None
    within_budget(model(), dataclasses.replace(given, ratio=float(ratio[1])), TOKENS, ROWS)
    fxseek.uncompile(compiled)
    compiled(**inputs).loss.backward()


def test_no_room_for_the_weights():
    with pytest.raises(fxseek.ConfigError, match="weights and gradients alone"):
        within_budget(model(), config(1 << 10), TOKENS, ROWS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("9" * 400 + "KiB", int("9" * 400) * 1024),
        ("20GiB", 20 << 30),
        ("1.5 KiB", 1536),
        ("24 GB", 24 * 10**9),
        ("7mib", 7 << 20),
        ("9B", 9),
    ],
)
def test_budgets_with_a_unit(text: str, count: int):
    assert fxseek.SeekConfig(0.1, memory_budget_bytes=text).memory_budget_bytes == count


@pytest.mark.parametrize("budget", [0, 1.5, "20", "GiB", "-1GiB", "0GiB", "20 apples", True])
def test_bad_budgets(budget: Any):
    with pytest.raises(fxseek.ConfigError, match="memory_budget_bytes"):
        fxseek.SeekConfig(0.1, memory_budget_bytes=budget)
    with pytest.raises(fxseek.ConfigError, match="memory_budget_bytes"):
        fxseek.SeekConfig.make(0.1, memory_budget_bytes=budget, unknown=1)

"""Profiles: what is measured is what another meter sees, and the model is as before."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from models import batch, tiny_gpt2, tiny_llama, tiny_lora
from peaks import allocated_peak
from sweeps import thinned
from torch import nn

import fxseek
from fxseek.inspect.memory import CATEGORIES
from fxseek.inspect.state import accelerator_of

STAGES = ["prefill", "score", "select", "gather", "learn", "backward"]


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return fxseek.compile(model, **{"ratio": 0.3, **options})


def adapted() -> nn.Module:
    return tiny_lora(tiny_llama())


@pytest.mark.parametrize(
    ("make", "options"),
    thinned([tiny_llama, tiny_gpt2, adapted], [{}, {"ratio": 0.9, "score": "random"}]),
)
def test_the_peak_is_the_profilers(make, options):
    model = compiled(make(), **options)
    given = batch(37, tokens=53)
    model(**given).loss.backward()
    model.zero_grad()
    found = fxseek.profile(model, **given)
    peak = allocated_peak(
        lambda: model(**given).loss.backward(),
        [*model.parameters(), *model.buffers(), *given.values()],
    )
    assert found.peak_bytes == pytest.approx(peak, rel=0.03)


def test_categories_and_stages():
    model = compiled(tiny_llama())
    given = batch(37, tokens=53)
    found = fxseek.profile(model, **given)
    weights = sum(x.numel() * 4 for x in [*model.parameters(), *model.buffers()])
    assert found.largest["parameters"] == weights
    assert found.largest["gradients"] == sum(p.numel() * 4 for p in model.parameters())
    assert found.largest["optimiser state"] == 0
    keys_and_values = 2 * 2 * (2 * 2 * 6 * 53) * 4  # two layers; batch, heads, width, tokens
    assert keys_and_values <= found.largest["K/V"] <= 3 * keys_and_values
    assert set(found.at_peak) == set(CATEGORIES)
    assert sum(found.at_peak.values()) == found.peak_bytes == max(found.stage_peaks.values())
    assert [name for name, _ in found.stages] == STAGES
    assert list(found.seconds) == STAGES
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert (found.tokens, found.kept, found.batch, found.device) == (53, 16, 2, "cpu")
    assert found.allocated_bytes is None or found.allocated_bytes > 0
    assert {len(values) for values in found.over_time().values()} == {len(found.changes)}


def test_an_accelerator_is_asked_about_its_own_models_alone(monkeypatch: pytest.MonkeyPatch):
    here = torch.accelerator.current_accelerator() or torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: here)
    second = torch.device(here.type, 1)
    assert accelerator_of(second) == second
    assert accelerator_of(torch.device("cpu")) is None


def test_saved_bytes_are_the_reports():
    model = compiled(tiny_llama())
    given = batch(37, tokens=53)
    model(**given).loss.backward()
    assert fxseek.profile(model, **given).saved_bytes == fxseek.report(model).saved_bytes


def test_fewer_tokens_save_less():
    given = batch(37, tokens=53)
    few, many = (
        fxseek.profile(compiled(tiny_llama(), ratio=ratio), **given) for ratio in (0.1, 0.8)
    )
    assert few.largest["activations"] < 0.5 * many.largest["activations"]


def test_the_model_is_as_before():
    model = compiled(tiny_llama(), score="random")
    given = batch(37, tokens=23)
    model(**given).loss.backward()
    report = fxseek.report(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    values = {name: None if g is None else g.clone() for name, g in gradients.items()}
    state = torch.get_rng_state()
    model.eval()
    fxseek.profile(model, **given)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert fxseek.report(model) is report
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        if p.grad is not None:
            assert torch.equal(p.grad, values[name])  # type: ignore[arg-type]
    model.train()
    model(**given)
    assert fxseek.report(model).step == report.step + 1


def test_it_prints_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    found = fxseek.profile(compiled(tiny_llama()), **batch(37, tokens=23))
    text = str(found)
    assert "2 rows of 23 tokens, 7 kept, on cpu" in text
    assert all(name in text for name in [*STAGES, "parameters", "K/V", "activations"])
    assert found.plot(tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    drawn = found.plot(str(tmp_path / "step.SVG")).read_text()
    assert all(f"<!-- {name} -->" in drawn for name in [*STAGES, "K/V"])


def test_errors(tmp_path, monkeypatch):
    given = batch(37, tokens=23)
    with pytest.raises(fxseek.InputError, match="not compiled by fxseek"):
        fxseek.profile(tiny_llama(), **given)
    model = compiled(tiny_llama())
    with pytest.raises(fxseek.GraphError, match="Pass labels"):
        fxseek.profile(model, input_ids=given["input_ids"])
    with pytest.raises(fxseek.InputError, match="backend='aot_eager'"):
        fxseek.profile(compiled(tiny_llama(), backend="aot_eager"), **given)
    found = fxseek.profile(model, **given)
    with pytest.raises(fxseek.InputError, match=r"must end in \.png or \.svg"):
        found.plot(tmp_path / "step.pdf")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(fxseek.InputError, match=r'pip install "fxseek\[demo\]"'):
        found.plot(tmp_path / "step.png")

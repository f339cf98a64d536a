"""Models that make their tokens themselves: patches of images, which no argument counts."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import Tensor, nn
from tuners import spread

import fxseek
from fxseek.capture.step import step_of


class Block(nn.Module):
    """Each of the patches attends to all, or to pairs of them."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.q, self.mlp = nn.Linear(12, 12), nn.Linear(12, 12)
        self.kv = nn.Linear(24 if pairs else 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        read = x[:, :24].reshape(x.shape[0], -1, 24) if self.pairs else x
        q, kv = self.q(x).unsqueeze(1), self.kv(read).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, kv, kv).squeeze(1)
        return x + self.mlp(x).tanh()


class Seeing(nn.Module):
    """A class token and the patches of an image of any size."""

    def __init__(self, pairs: bool = False, bypass: bool = False) -> None:
        super().__init__()
        self.bypass = bypass
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.linspace(-1, 1, 12).reshape(1, 1, 12))
        self.blocks = nn.Sequential(Block(pairs), Block(pairs))
        self.head = nn.Linear(12, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
        logits = self.head(self.blocks(x)[:, 0] + (x.mean(1) if self.bypass else 0))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def model_of(**options: bool) -> Seeing:
    torch.manual_seed(0)
    return Seeing(**options).double().train()


def batch(size: int = 20, rows: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(size)
    pixels = torch.randn(rows, 3, size, size, generator=draw, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.arange(rows)}


def gradients(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**given)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_patches_are_selected():
    model = fxseek.compile(model_of(), 0.3)
    found, ordinary = gradients(model, batch()), gradients(model_of(), batch())
    report = fxseek.report(model)
    assert (report.tokens, report.selected.shape) == (26, (2, 8))
    assert (report.selected[:, 0] == 0).all()  # the class token
    for name in ("patch.weight", "blocks.0.kv.weight"):
        assert not torch.allclose(found[name], ordinary[name])
    assert "8 of 26 tokens" in str(fxseek.explain(model, **batch()))


def test_every_patch_is_ordinary_training():
    found = gradients(fxseek.compile(model_of(), 1.0), batch())
    for name, wanted in gradients(model_of(), batch()).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_images_of_other_sizes_are_counted_anew():
    model = fxseek.compile(model_of(), 0.3)
    for size, tokens in ((20, 26), (28, 50), (20, 26)):
        fxseek.check_gradients(model, 1e-9, **batch(size))
        gradients(model, batch(size))
        assert fxseek.report(model).tokens == tokens
    fxseek.check_gradients(model, 1e-9, **batch(rows=1))
    step = step_of(model)
    assert step is not None
    assert len(step.recorder.steps) <= 4


def test_adapters_alone():
    config = peft.LoraConfig(r=3, target_modules=["q", "kv", "mlp"], modules_to_save=["head"])
    model = peft.get_peft_model(model_of(), config).double()
    spread(model)
    fxseek.compile(model, 0.3, recompute="block")
    fxseek.check_gradients(model, 1e-9, **batch())


def test_a_step_leaves_no_hook():
    model = fxseek.compile(model_of(), 0.3, score="random")
    model(**batch())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    assert torch.equal(model(**batch())["logits"], model_of().eval()(**batch())["logits"])


def test_other_ways_are_refused_with_a_reason():
    options: dict[str, Any] = {"ratio": 0.3}
    backend = torch.compile(model_of(), backend="fxseek", dynamic=True, options=options)
    with pytest.raises(Exception, match=r"fxseek.compile\(model\) counts them"):
        backend(**batch())
    with pytest.raises(fxseek.ConfigError, match="takes pixel_values"):
        fxseek.estimate(FAMILIES["vit"].make(), tokens=26)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("pairs", "nor fewer keys than patches"),
        ("bypass", "have gradient that comes from elsewhere"),
    ],
)
def test_other_sequences_are_refused(option, reason):
    model = fxseek.compile(model_of(**{option: True}), 0.3, score="random")
    with pytest.raises(fxseek.GraphError, match=reason):
        model(**batch())

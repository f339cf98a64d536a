"""Mistakes that were made once: each still trains, or trained, with wrong gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import VOCAB, WIDTH, Model, assert_exact, inputs_of, model_of
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek

# ---- constants of trained weights ----------------------------------------------------------------


def scaled(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.scale * 2
    return x * scale


def bit_linear(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.last.weight.abs().mean()
    return x * scale


def weight_norm(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = F.normalize(m.last.weight, dim=1)
    return F.linear(x, weight)


@pytest.mark.parametrize("body", [scaled, bit_linear, weight_norm], ids=lambda b: b.__name__)
def test_constants_of_trained_weights_get_no_gradient(body):
    assert_exact(model_of(body))


def test_a_constant_keeps_the_precision_that_it_was_made_in():
    def body(m: Model, x: Tensor) -> Tensor:
        frozen = m.get_buffer("frozen")
        weight = frozen @ frozen
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, weight)
        return x + y.to(x.dtype)

    model = model_of(body).float()
    model.register_buffer("frozen", torch.randn(WIDTH, WIDTH))
    wanted = model(**inputs_of())["loss"]
    fxseek.compile(model, 1.0, score="random")
    torch.testing.assert_close(model(**inputs_of())["loss"], wanted, rtol=1e-6, atol=1e-6)


# ---- writes without grad, and after the step -----------------------------------------------------


def doubled(m: Model, x: Tensor) -> Tensor:
    y = x * 1.5
    with torch.no_grad():
        y.mul_(2)
    return y


def cleared(m: Model, x: Tensor) -> Tensor:
    y = x * 1.5
    with torch.no_grad():
        y[..., :2] = 0
    return y


@pytest.mark.parametrize("body", [doubled, cleared], ids=lambda b: b.__name__)
def test_a_write_without_grad_is_refused(body):
    model = fxseek.compile(model_of(body), 0.4, score="random")
    with pytest.raises(fxseek.GraphError, match=r"torch\.no_grad\(\) to a tensor that carries"):
        model(**inputs_of())


def test_a_write_to_a_constant_without_grad_is_none_to_refuse():
    def body(m: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.zeros_like(x)
            table[..., 0] = 1
        return x + table * m.scale

    assert_exact(model_of(body))


def test_weights_changed_before_backward_are_noticed():
    model = fxseek.compile(model_of(lambda m, x: m.last(x).tanh()), 0.4, score="random")
    loss = model(**inputs_of())["loss"]
    with torch.no_grad():
        model.last.weight.mul_(10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- sizes ---------------------------------------------------------------------------------------


class Columns(nn.Module):
    """A loss on [batch, classes, tokens] and targets of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids).tanh())
        return {"loss": F.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


def test_a_batch_of_one_has_the_loss_of_its_selection():
    torch.manual_seed(0)
    model = fxseek.compile(Columns().double(), 0.4, score="random")
    inputs = inputs_of(1)
    loss = model(**inputs)["loss"]
    kept = fxseek.report(model).selected[0]
    fxseek.uncompile(model)
    logits = model(**inputs)["logits"]
    wanted = F.cross_entropy(logits[0, kept], inputs["labels"][0, kept])
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)


class Memory(nn.Module):
    """Attention to values that are no tokens of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.keys = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, memory: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, k = self.embed(input_ids), self.keys(memory)
        x = x + F.scaled_dot_product_attention(x[:, None], k[:, None], k[:, None])[:, 0]
        logits = self.head(x)
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
        return {"loss": loss, "logits": logits}


def test_lengths_that_are_equal_by_chance_may_differ_later():
    torch.manual_seed(0)
    model = fxseek.compile(Memory().double(), 0.4, score="random")
    inputs = inputs_of(3)
    tokens = inputs["input_ids"].shape[1]
    wide = []
    for length in (tokens, tokens - 4, tokens + 8):
        memory = torch.randn(3, length, WIDTH).double()
        model.zero_grad()
        loss = model(memory=memory, **inputs)["loss"]
        loss.backward()
        wide.append(loss.isfinite())
        kept = fxseek.report(model).selected
        fresh = Memory().double()
        fresh.load_state_dict(model.state_dict())
        logits = fresh(memory=memory, **inputs)["logits"]
        losses = F.cross_entropy(logits.transpose(1, 2), inputs["labels"], reduction="none")
        chosen = inputs["labels"].gather(1, kept) != -100
        wanted = losses.gather(1, kept).sum() / chosen.sum()
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    assert all(wide)


# ---- pooled places -------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.pick = pick

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.first(self.embed(input_ids)).tanh()
        picked = self.pick(x)
        return {"loss": (picked.sum(1) if picked.dim() > 2 else picked).square().mean()}


@pytest.mark.parametrize(
    ("pick", "places"),
    [
        (lambda x: x[:, 0], {0}),
        (lambda x: x[:, -1], {10}),
        (lambda x: x[:, :2], {0, 1}),
        (lambda x: x[:, -2:], {9, 10}),
        (lambda x: x.select(1, 3), {3}),
        (lambda x: x.select(dim=-2, index=0), {0}),
        (lambda x: x.narrow(1, 4, 2), {4, 5}),
        (lambda x: x[:, torch.tensor([2, 7])], {2, 7}),
        (lambda x: x[:, 0] + x[:, 3] + x[:, 5] + x[:, 9], {0, 3, 5, 9}),
    ],
)
def test_places_that_the_model_reads_are_kept(pick, places):
    torch.manual_seed(0)
    model = fxseek.compile(Pooled(pick).double(), 0.2, score="random")
    inputs: dict[str, Any] = inputs_of(4)
    for _ in range(3):
        fxseek.check_gradients(model, 1e-9, **inputs)
        model(**inputs)["loss"].backward()
        for row in fxseek.report(model).selected.tolist():
            assert places <= set(row)

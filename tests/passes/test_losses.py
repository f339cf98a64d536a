"""Losses of a caller's own: the cross-entropy that is returned, over the selected tokens.

Wanted values are written out for each position by hand, from logits that `oracle.Marked` gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TinyConfig, TinyDecoder, batch
from oracle import Marked
from sweeps import thinned
from torch import Tensor, nn

import fxseek
from fxseek import _torch
from fxseek.inspect.compare import compare
from fxseek.ops import loss as loss_ops
from fxseek.ops.loss import cross_entropy_parts, scaled_cross_entropy

ROWS, TOKENS, VOCAB = 3, 17, 37
CLASSES = torch.linspace(0.2, 3.0, VOCAB, dtype=torch.float64)
Loss = Callable[[Any, dict[str, Any]], Tensor]


def model_of(**config: Any) -> TinyDecoder:
    return TinyDecoder(TinyConfig(**config)).double().train()


def inputs_of(padding: str = "right") -> dict[str, Any]:
    given = batch(VOCAB, ROWS, TOKENS, padding=padding, labels="some")
    dropped = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.2
    given["labels"] = given["input_ids"].masked_fill(dropped, -100)
    if padding != "none":
        given["labels"][given["attention_mask"] == 0] = -100
    return given


# ---- what is wanted, position by position ----------------------------------------------------


@dataclass
class Terms:
    """[batch, tokens]: losses, what each is divided by in a mean, and the selection's weights.

    `counted`: each labelled token counts as 1, and the selection's weights are made for that.
    """

    losses: Tensor
    masses: Tensor
    weights: Tensor
    chosen: Tensor
    counted: bool = True

    def mean(self) -> Tensor:
        picked = (self.losses * self.weights)[self.chosen].sum()
        masses = self.masses if self.counted else self.masses * self.weights
        return picked / masses[self.chosen].sum()

    def sum(self) -> Tensor:
        return self.mean() * self.masses.sum()


def next_ones(labels: Tensor) -> Tensor:
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1)


def spelled_out(
    logits: Tensor, labels: Tensor, classes: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each position and its class weight, both 0 without a label."""
    weights = torch.ones(VOCAB, dtype=torch.float64) if classes is None else classes
    logs = logits.log_softmax(-1)
    own = labels.clamp(min=0)
    nll = -logs.gather(-1, own[..., None])[..., 0] * weights[own]
    spread = -(logs * weights).sum(-1) / VOCAB
    losses = (1 - smoothing) * nll + smoothing * spread
    return losses * (labels != -100), weights[own] * (labels != -100)


def flat(o: Any, x: Any) -> tuple[Tensor, Tensor]:
    return o.logits.view(-1, VOCAB), x["labels"].view(-1)


def second(o: Any, x: Any) -> tuple[Tensor, Tensor]:
    return o.logits.transpose(1, 2), x["labels"]


def cut(o: Any, x: Any) -> tuple[Tensor, Tensor]:
    return o.logits[:, :-1].reshape(-1, VOCAB), x["labels"][:, 1:].reshape(-1)


def cut_second(o: Any, x: Any) -> tuple[Tensor, Tensor]:
    return o.logits[..., :-1, :].permute(0, 2, 1), x["labels"][..., 1:]


def places(x: Any) -> Tensor:
    """A weight for each place in a row, not the same for any two."""
    return 0.5 + 0.1 * torch.arange(x["labels"].shape[1], dtype=torch.float64)


def mask_of(x: Any) -> Tensor:
    """Some tokens that have a label are not to count."""
    return (x["input_ids"] % 3 != 0).double()


@dataclass
class Case:
    """A loss, and what it is to be: of the terms, whose labels are shifted or not."""

    loss: Loss
    wanted: Callable[[Terms, Any], Tensor]
    shift: bool = False
    classes: Tensor | None = None
    smoothing: float = 0.0
    scale: Callable[[Any], Tensor] | None = None


def each(o: Any, x: Any, operands: Any = flat, **options: Any) -> Tensor:
    return F.cross_entropy(*operands(o, x), reduction="none", **options)


def masked_rows(o: Any, x: Any) -> Tensor:
    losses, mask = each(o, x).view(x["labels"].shape), mask_of(x)
    return (losses * mask).sum() / mask.sum()


def masked_cut(o: Any, x: Any) -> Tensor:
    mask = mask_of(x)[:, 1:].reshape(-1)
    return (each(o, x, cut) * mask).sum() / mask.sum()


def count(x: Any) -> Tensor:
    return (x["labels"] != -100).sum()


def mean(terms: Terms, _: Any) -> Tensor:
    return terms.mean()


CASES = {
    "weight": Case(
        lambda o, x: F.cross_entropy(*flat(o, x), weight=CLASSES), mean, classes=CLASSES
    ),
    "weight, classes second": Case(
        lambda o, x: F.cross_entropy(*second(o, x), weight=CLASSES), mean, classes=CLASSES
    ),
    "weight and smoothing": Case(
        lambda o, x: F.cross_entropy(*flat(o, x), CLASSES, label_smoothing=0.2),
        mean,
        classes=CLASSES,
        smoothing=0.2,
    ),
    "a weighted sum by hand": Case(
        lambda o, x: (
            F.cross_entropy(*flat(o, x), CLASSES, reduction="sum")
            / (CLASSES[x["labels"].clamp(min=0)] * (x["labels"] != -100)).sum()
        ),
        mean,
        classes=CLASSES,
    ),
    "a sum by hand": Case(
        lambda o, x: F.cross_entropy(*second(o, x), reduction="sum") / count(x), mean
    ),
    "weight, cut": Case(
        lambda o, x: F.cross_entropy(*cut(o, x), weight=CLASSES), mean, shift=True, classes=CLASSES
    ),
    "smoothing, cut, classes second": Case(
        lambda o, x: F.cross_entropy(*cut_second(o, x), label_smoothing=0.1),
        mean,
        shift=True,
        smoothing=0.1,
    ),
    "terms, sum": Case(lambda o, x: each(o, x).sum() / count(x), mean),
    "terms, mean": Case(
        lambda o, x: each(o, x, second).mean(), lambda t, x: t.sum() / x["labels"].numel()
    ),
    "terms, mean, cut": Case(
        lambda o, x: each(o, x, cut_second).mean(),
        lambda t, x: t.sum() / x["labels"][:, 1:].numel(),
        shift=True,
    ),
    "terms, moved, mean": Case(
        lambda o, x: each(o, x, second).view(-1).mean(), lambda t, x: t.sum() / x["labels"].numel()
    ),
    "terms of their own dtype, mean": Case(
        lambda o, x: each(o, x).to(torch.float64).mean(), lambda t, x: t.sum() / x["labels"].numel()
    ),
    "terms by a number, mean": Case(
        lambda o, x: (0.5 * each(o, x)).mean(),
        lambda t, x: t.sum() / x["labels"].numel(),
        scale=lambda x: torch.full(x["labels"].shape, 0.5),
    ),
    "terms by a mask": Case(masked_rows, lambda t, x: t.sum() / mask_of(x).sum(), scale=mask_of),
    "terms by a mask, cut": Case(
        masked_cut,
        lambda t, x: t.sum() / mask_of(x)[:, 1:].sum(),
        shift=True,
        scale=lambda x: torch.cat((mask_of(x)[:, 1:], torch.zeros(len(mask_of(x)), 1)), 1),
    ),
    "terms where a mask is, class weights": Case(
        lambda o, x: torch.where(mask_of(x) > 0, each(o, x, second, weight=CLASSES), 0.0).sum(),
        lambda t, x: t.sum(),
        classes=CLASSES,
        scale=mask_of,
    ),
    "terms masked in place, by place": Case(
        lambda o, x: each(o, x, second).mul_(places(x)).masked_fill_(mask_of(x) == 0, 0).sum() / 7,
        lambda t, x: t.sum() / 7,
        scale=lambda x: mask_of(x) * places(x),
    ),
    "terms, both signs": Case(  # advantages: no mean of them may be divided by
        lambda o, x: -(each(o, x, second) * (places(x) - 1)).mean(),
        lambda t, x: t.sum() / x["labels"].numel(),
        scale=lambda x: (1 - places(x)).expand(x["labels"].shape),
    ),
}


def selection(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Which positions the last step chose, and their weights, [batch, tokens]."""
    last = fxseek.report(model)
    chosen = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    weights = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    for row, (positions, shares) in enumerate(zip(last.selected, last.weights, strict=True)):
        for position, share in zip(positions.tolist(), shares.tolist(), strict=True):
            if position >= 0:
                chosen[row, position], weights[row, position] = True, share
    return chosen, weights


def wanted_of(case: Case, logits: Tensor, x: Any, chosen: Tensor, weights: Tensor) -> Tensor:
    labels = next_ones(x["labels"]) if case.shift else x["labels"]
    losses, masses = spelled_out(logits, labels, case.classes, case.smoothing)
    scale = torch.ones_like(losses) if case.scale is None else case.scale(x)
    counted = case.classes is None and case.scale is None
    return case.wanted(Terms(losses * scale, masses * scale.abs(), weights, chosen, counted), x)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_step(model: nn.Module, loss: Tensor, wanted: Callable[..., Tensor], x: Any) -> None:
    """The compiled step's loss and gradients are those of `wanted(logits, chosen, weights)`."""
    loss.backward()
    chosen, weights = selection(model)
    with Marked(fxseek.report(model).selected, TOKENS):
        logits = _torch.eager_call(model)(**x).logits
    expected = wanted(logits, chosen, weights)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    given = {name: p.grad for name, p in model.named_parameters()}
    found = compare(given, gradients_of(model, expected))
    assert found.error <= 1e-9, found


OPTIONS: list[dict[str, Any]] = [
    {"score": "tokenseek"},
    {"score": "gradient", "select": "sample", "chunk_bytes": 4096},
]


@pytest.mark.parametrize(("name", "options"), thinned(CASES, OPTIONS))
def test_over_selected_tokens(name: str, options: dict[str, Any], caplog: Any):
    case, x = CASES[name], inputs_of()
    model = model_of(attention="eager" if options["score"] == "gradient" else "sdpa")
    fxseek.compile(model, 0.4, loss=case.loss, **options)
    with caplog.at_level(logging.WARNING, "fxseek"):
        loss = model(**x).loss
    assert not caplog.text
    assert_step(model, loss, lambda *given: wanted_of(case, given[0], x, *given[1:]), x)
    assert fxseek.check_gradients(model, **x).error <= 1e-9


@pytest.mark.parametrize("name", CASES)
def test_all_tokens_are_ordinary_training(name: str):
    case, x = CASES[name], inputs_of()
    model = model_of()
    fxseek.compile(model, 1.0, loss=case.loss, score="random")
    loss = model(**x).loss
    loss.backward()
    outputs = _torch.eager_call(model)(**x)
    ordinary = case.loss(outputs, x)
    torch.testing.assert_close(loss, ordinary, rtol=1e-9, atol=0)
    found = compare(
        {name: p.grad for name, p in model.named_parameters()}, gradients_of(model, ordinary)
    )
    assert found.error <= 1e-9, found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["weight and smoothing", "terms by a mask", "a sum by hand"])
def test_scores_by_the_loss_that_is_minimised(name: str, attention: str):
    """The gradient score is that of the returned loss, and the full loss its mean over all."""
    case, x = CASES[name], inputs_of()
    model = model_of(attention=attention)
    fxseek.compile(model, 0.4, score="gradient", loss=case.loss, chunk_bytes=4096)
    model(**x)
    report = fxseek.report(model)
    hidden: list[Tensor] = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    outputs = _torch.eager_call(model)(**x)
    hook.remove()
    everything = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    labels = x["labels"]
    losses, masses = spelled_out(outputs.logits, labels, case.classes, case.smoothing)
    scale = torch.ones_like(losses) if case.scale is None else case.scale(x)
    full = Terms(losses * scale, masses * scale, everything.double(), everything).mean()
    assert report.full_loss is not None and report.gradient is not None
    torch.testing.assert_close(report.full_loss, full.detach())
    (slope,) = torch.autograd.grad(full, hidden[0])
    torch.testing.assert_close(report.gradient, slope.abs().sum(-1))


@pytest.mark.parametrize("name", ["weight", "a weighted sum by hand", "terms by a mask"])
def test_the_mean_of_many_samples_is_ordinary_training(name: str):
    """Large masses are drawn more often; the mean over what is drawn has to make up for that."""
    case, x = CASES[name], inputs_of()
    model = model_of()
    ordinary = case.loss(_torch.eager_call(model)(**x), x).detach()
    fxseek.compile(model, 0.4, loss=case.loss, score="gradient", select="sample", uniform=0.1)
    found = torch.stack([model(**x).loss.detach() for _ in range(300)]) / ordinary
    assert (found.mean() - 1).abs() < 0.015
    assert 0.01 < found.std() < 0.1


# ---- what changes from step to step, and what the loss is given back as --------------------------


@pytest.mark.parametrize("options", [*OPTIONS, {"score": "random", "learn_chunk": 8}], ids=str)
def test_an_option_that_changes(options: dict[str, Any]):
    """Dynamo makes a number that has changed an input of the graph."""
    now = {"label_smoothing": 0.1, "ignore_index": -100}
    model, x = model_of(), inputs_of()
    fxseek.compile(model, 0.4, loss=lambda o, x: F.cross_entropy(*flat(o, x), **now), **options)
    for smoothing in (0.1, 0.05, 0.3):
        now["label_smoothing"] = smoothing
        model.zero_grad()
        case = Case(lambda *_: None, mean, smoothing=smoothing)  # type: ignore[arg-type]
        loss = model(**x).loss
        assert_step(model, loss, lambda *given, c=case: wanted_of(c, given[0], x, *given[1:]), x)
    for ignored in (5, 7):
        now["ignore_index"] = ignored
        y = {**x, "labels": x["labels"].masked_fill(x["labels"] == -100, ignored)}
        model.zero_grad()
        if options.get("select") == "sample":
            with pytest.raises(fxseek.GraphError, match="no cross-entropy over tokens that fxseek"):
                model(**y)
            return
        model(**y).loss.backward()
        assert fxseek.check_gradients(model, **y).error <= 1e-9


@pytest.mark.parametrize("options", OPTIONS, ids=["tokenseek", "sample"])
def test_a_loss_of_one_element_is_that_of_none(options: dict[str, Any], caplog: Any):
    case, x = CASES["smoothing, cut, classes second"], inputs_of()
    for shape in ((1,), (1, 1)):
        model = model_of()
        fxseek.compile(model, 0.4, loss=lambda o, x, s=shape: case.loss(o, x).reshape(s), **options)
        outputs = model(**x)
        assert not caplog.text and outputs.loss.dim() == 0 and outputs.logits is None
        assert_step(model, outputs.loss, lambda *y: wanted_of(case, y[0], x, *y[1:]), x)


@pytest.mark.parametrize("classes", [None, CLASSES.half()], ids=["plain", "class weights"])
@pytest.mark.parametrize("chunk_bytes", [None, 4096])
def test_sums_leave_the_range_of_float16(classes: Tensor | None, chunk_bytes: int | None):
    """Whose largest number is 65504: the mean that ordinary training computes is finite."""

    def loss(o: Any, x: Any) -> Tensor:
        logits = o.logits.flatten(0, 1) * 1000
        of_classes = None if classes is None else classes.to(logits.dtype)
        return F.cross_entropy(logits, x["labels"].flatten(), of_classes)

    x, model = inputs_of("none"), model_of().half()
    ordinary = float(loss(_torch.eager_call(model.float())(**x), x).detach())
    assert ordinary < 65504 < ordinary * (x["labels"] != -100).sum()
    fxseek.compile(model.half(), 1.0, loss=loss, chunk_bytes=chunk_bytes)
    found = model(**x).loss
    assert found.dtype == torch.float16
    assert float(found.detach()) == pytest.approx(ordinary, rel=0.01)
    found.backward()


def test_sums_of_parts_leave_the_range_of_float16(caplog: Any):
    x, model = inputs_of("none"), model_of().half()
    with torch.no_grad():
        model.head.weight *= 1000
    ordinary = float(_torch.eager_call(model.float())(**x).loss.detach())
    assert ordinary < 65504 < ordinary * (x["labels"] != -100).sum()
    fxseek.compile(model.half(), 1.0, learn_chunk=8)
    found = model(**x).loss
    assert "one part" not in caplog.text and found.dtype == torch.float16
    assert float(found.detach()) == pytest.approx(ordinary, rel=0.01)
    found.backward()


# ---- probabilities as targets ----------------------------------------------------------------


def soft(x: Any) -> Tensor:
    return 0.7 * F.one_hot(x["input_ids"], VOCAB).double() + 0.3 / VOCAB


SOFT: dict[str, tuple[Loss, Callable[[Terms], Tensor]]] = {
    "mean": (
        lambda o, x: F.cross_entropy(o.logits.view(-1, VOCAB), soft(x).view(-1, VOCAB)),
        lambda t: t.losses[t.chosen].mul(t.weights[t.chosen]).sum() / t.chosen.sum(),
    ),
    "sum, classes second": (
        lambda o, x: F.cross_entropy(
            o.logits.transpose(1, 2), soft(x).transpose(1, 2), reduction="sum"
        ),
        lambda t: t.sum(),
    ),
    "terms": (
        lambda o, x: F.cross_entropy(
            o.logits.transpose(1, 2), soft(x).transpose(1, 2), reduction="none"
        ).mean(),
        lambda t: t.mean(),
    ),
}


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("options", OPTIONS, ids=["tokenseek", "sample"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_probabilities(name: str, options: dict[str, Any], padding: str):
    (loss, wanted), x = SOFT[name], inputs_of(padding)
    model = model_of()
    fxseek.compile(model, 0.4, loss=loss, **options)

    def over(logits: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        losses = -(soft(x) * logits.log_softmax(-1)).sum(-1)
        return wanted(Terms(losses, torch.ones_like(losses), weights, chosen))

    assert_step(model, model(**x).loss, over, x)
    assert fxseek.check_gradients(model, **x).error <= 1e-9


# ---- several terms, and what is none over tokens -----------------------------------------------


def test_the_loss_that_is_returned_and_not_the_models_own():
    """The model computes its own from the labels, and nothing minimises that."""
    x, model = inputs_of(), model_of()
    fxseek.compile(model, 0.4, loss=lambda o, x: o.logits.square().mean(), score="gradient")
    model(**x).loss.backward()
    square = _torch.eager_call(model)(**x).logits.square().mean()
    full = fxseek.report(model).full_loss
    assert full is not None
    torch.testing.assert_close(full, square.detach())


def test_a_sample_needs_losses_to_weigh():
    x, model = inputs_of(), model_of()

    def pooled(o: Any, x: Any) -> Tensor:
        return F.cross_entropy(o.logits[:, -1], x["labels"][:, 0].clamp(min=0))

    fxseek.compile(model, 0.4, loss=pooled, score="random", select="sample")
    with pytest.raises(fxseek.GraphError, match="select='sample' weighs each token's loss"):
        model(**x)


def test_two_cross_entropies():
    x, model = inputs_of(), model_of()

    def both(o: Any, x: Any) -> Tensor:
        return F.cross_entropy(*cut(o, x)) + 0.3 * F.cross_entropy(*flat(o, x), weight=CLASSES)

    fxseek.compile(model, 0.4, loss=both)

    def wanted(logits: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        shifted = spelled_out(logits, next_ones(x["labels"]), None, 0.0)
        own = spelled_out(logits, x["labels"], CLASSES, 0.0)
        first = Terms(shifted[0], shifted[1], weights, chosen).mean()
        other = Terms(own[0], own[1], weights, chosen).mean()
        return first + 0.3 * other

    assert_step(model, model(**x).loss, wanted, x)
    full = fxseek.report(model).full_loss
    assert full is not None
    torch.testing.assert_close(full, both(_torch.eager_call(model)(**x), x).detach())
    assert fxseek.check_gradients(model, **x).error <= 1e-9


def rows_mean(o: Any, x: Any) -> Tensor:
    losses = each(o, x).view(x["labels"].shape)
    return (losses.sum(1) / (x["labels"] != -100).sum(1)).mean()


def focal(o: Any, x: Any) -> Tensor:
    losses = each(o, x)
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def several_for_a_token(o: Any, x: Any) -> Tensor:
    logits = torch.stack((o.logits, -o.logits), 2)
    return F.cross_entropy(logits.reshape(-1, VOCAB), x["labels"].repeat_interleave(2, 1).view(-1))


UNRESTRICTED = {
    "rows": rows_mean,
    "focal": focal,
    "several": several_for_a_token,
    "squares": lambda o, x: o.logits.square().mean(),
}


@pytest.mark.parametrize(("name", "added"), thinned(UNRESTRICTED, [False, True]))
def test_what_is_not_restricted_is_said(name: str, added: bool, caplog: Any):
    """It keeps its value over all tokens, alone or beside a loss that is restricted."""
    x, model, loss = inputs_of("none"), model_of(), UNRESTRICTED[name]

    def total(o: Any, x: Any) -> Tensor:
        return loss(o, x) + o.loss if added else loss(o, x)

    fxseek.compile(model, 0.4, loss=total, score="random")
    with caplog.at_level(logging.WARNING, "fxseek"):
        found = model(**x).loss
    said = "a part of the loss is no cross-entropy" if added else "no cross-entropy over tokens"
    assert said in caplog.text and "full-token value" in caplog.text
    assert said in str(fxseek.explain(model, **x))
    if added:
        assert __file__ in caplog.text

    def wanted(logits: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        value = loss(type("Outputs", (), {"logits": logits}), x)
        if not added:
            return value
        own = spelled_out(logits, next_ones(x["labels"]), None, 0.0)
        return value + Terms(own[0], own[1], weights, chosen).mean()

    assert_step(model, found, wanted, x)
    assert fxseek.check_gradients(model, **x).error <= 1e-9


def test_a_regulariser_beside_the_models_own_loss():
    x, model = inputs_of(), model_of()
    fxseek.compile(
        model, 0.3, loss=lambda o, x: o.loss + 0.01 * o.logits.logsumexp(-1).pow(2).mean()
    )
    assert fxseek.check_gradients(model, **x).error <= 1e-9


def test_a_wrong_gradient_of_such_a_loss_is_found(monkeypatch: Any):
    def unweighted(logits: Tensor, target: Tensor, weights: Tensor, *rest: Any, **options: Any):
        return parts(logits, target, weights, None, None, **options)

    parts = loss_ops._parts
    monkeypatch.setattr(loss_ops, "_parts", unweighted)
    model = model_of()
    fxseek.compile(model, 0.4, score="random", loss=CASES["weight"].loss)
    with pytest.raises(fxseek.GradientMismatch):
        fxseek.check_gradients(model, **inputs_of())


# ---- what the reference of the check can't see ---------------------------------------------------


class OwnKeys(nn.Module):
    """Keys by a product with a parameter, which is the result of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Embedding(VOCAB, 12), nn.Linear(12, 12)
        self.keys = nn.Parameter(0.3 * torch.randn(12, 12))
        self.head = nn.Linear(12, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        query, key, value = (y[:, None] for y in (self.query(x), x @ self.keys, x))
        x = x + F.scaled_dot_product_attention(query, key, value)[:, 0]
        return {"loss": F.cross_entropy(self.head(x).view(-1, VOCAB), labels.view(-1))}


def keys_of_positions() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "relative_attention": True,
        "max_relative_positions": 8,
        "position_buckets": 4,
        "pos_att_type": ["c2p", "p2c"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": VOCAB,
    }
    return DebertaV2ForTokenClassification(DebertaV2Config(**sizes))


@pytest.mark.parametrize("make", [OwnKeys, keys_of_positions])
def test_the_check_says_where_it_cannot_tell(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    model = make().double().train()
    fxseek.compile(model, 0.4, score="random")
    x = inputs_of("none")
    with pytest.raises(fxseek.InputError, match=r"can't tell for this model: \w+ in .*File .*line"):
        fxseek.check_gradients(model, **x)


def test_the_check_says_so_of_a_mask_of_rows():
    """Doge's mask has a number for each key, which a parameter makes of the key's value."""
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(
        vocab_size=37, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model: Any = DogeForCausalLM(config).double().train()
    for module in model.modules():
        if hasattr(module, "A"):
            torch.nn.init.normal_(module.A)
    fxseek.compile(model, 0.3)
    with pytest.raises(fxseek.InputError, match=r"can't tell for this model: mul in .*self_attn"):
        fxseek.check_gradients(model, 1e-9, **batch(37))


# ---- a classifier of tokens ------------------------------------------------------------------


def test_class_weights_of_a_token_classifier():
    """transformers' own, with its labels in the batch: a loss of its own, and the caller's."""
    from transformers import BertConfig, BertForTokenClassification

    classes = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 20,
        "intermediate_size": 29,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 5,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**sizes)).double().train()
    x = inputs_of()
    x["labels"] = torch.where(x["labels"] < 0, -100, x["labels"] % 5)

    def loss(o: Any, x: Any) -> Tensor:
        return F.cross_entropy(o.logits.view(-1, 5), x["labels"].view(-1), weight=classes)

    fxseek.compile(model, 0.3, loss=loss)

    def wanted(logits: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        own = x["labels"].clamp(min=0)
        share = classes[own] * (x["labels"] != -100) * chosen
        losses = -logits.log_softmax(-1).gather(-1, own[..., None])[..., 0]
        return (losses * share * weights).sum() / share.sum()

    assert_step(model, model(**x).loss, wanted, x)
    full = fxseek.report(model).full_loss
    assert full is not None
    torch.testing.assert_close(full, loss(_torch.eager_call(model)(**x), x).detach())


# ---- the operation ---------------------------------------------------------------------------


def test_a_scale_of_nothing_hides_a_loss_that_is_not_finite():
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[1] = torch.nan
    scale = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)
    target = torch.tensor([0, 1, -100, 3])
    found = scaled_cross_entropy(logits, target, scale=scale)
    wanted = F.cross_entropy(logits[:1], target[:1]) - F.cross_entropy(logits[3:], target[3:])
    torch.testing.assert_close(found, wanted)
    total, mass = cross_entropy_parts(logits, target, torch.ones(1, 4), None, scale)
    torch.testing.assert_close(total, wanted)
    assert mass == 2

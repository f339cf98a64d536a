"""Values that differ between prefill and learn, and gradients that don't add up.

A replayed draw is another one, and a replayed loss is that of selected tokens: what is made from
them without gradient is theirs too. A backward that isn't linear must run once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    IGNORED,
    VOCAB,
    Marked,
    Model,
    assert_exact,
    inputs_of,
    model_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.compare import compare
from fxseek.program import Program

# Dynamo makes an instance of an autograd function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def attention(m: Model, x: Tensor) -> Tensor:
    q = (x * m.scale)[:, None]
    k, v = m.first(x)[:, None], x[:, None]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def program_of(model: nn.Module) -> Program:
    step = step_of(model)
    assert step is not None
    return step.recorder.steps[-1].program


def weight_of(m: Model) -> Tensor:
    (layer,) = m.layers
    assert isinstance(layer, nn.Linear)
    return layer.weight


def plain(m: Model, x: Tensor) -> Tensor:
    return x + attention(m, x)


# ---- of a loss -----------------------------------------------------------------------------------


def focal(loss: Tensor) -> Tensor:
    with torch.no_grad():
        sure = torch.exp(-loss)
    return (1 - sure) ** 2 * loss


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda loss: loss / loss.detach(),
    "focal": focal,
    "halved above": lambda loss: torch.where(loss > 2.76, loss, loss * 0.5),
}


class LossOf(Model):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__(plain)
        self.function = function

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(input_ids).reshape(-1, VOCAB)
        loss = F.cross_entropy(logits, labels.reshape(-1))
        return {"loss": self.function(loss), "logged": loss.detach()}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_detached_loss_is_that_of_selected_tokens(name, chunk):
    model, inputs = LossOf(FUNCTIONS[name]).double().train(), inputs_of()
    fxseek.compile(model, 0.4, score="random", select="sample", learn_chunk=chunk)
    found = model(**inputs)
    found["loss"].backward()
    report = fxseek.report(model)
    targets = inputs["labels"]
    weights = torch.zeros(targets.shape).scatter_(1, report.selected, report.weights)
    chosen = torch.zeros(targets.shape).scatter_(1, report.selected, 1.0) * (targets != IGNORED)
    with Marked(report.selected, targets.shape[1]):
        logits = model.logits(inputs["input_ids"])
    terms = F.cross_entropy(logits.mT, targets, reduction="none") * weights
    mean = terms.sum() / chosen.sum()
    loss = model.function(mean)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["logged"], mean, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert compare(gradients, dict(zip(names, wanted, strict=True))).error <= 1e-9


# ---- of a draw -----------------------------------------------------------------------------------


def chosen_by_sign(m: Model, x: Tensor) -> Tensor:
    h = F.dropout(x * m.scale * 3, 0.5)
    return plain(m, x) + torch.where(h > 0, h, -h) - h.abs()


def masked_by_sign(m: Model, x: Tensor) -> Tensor:
    h = F.dropout(x * m.scale * 3, 0.5)
    return plain(m, x) + h * (h > 0) - F.relu(h)


def rounded(m: Model, x: Tensor) -> Tensor:
    h = F.dropout(x * m.scale * 3, 0.5)
    return plain(m, x) + (h.round() - h.detach()).detach() - (h.detach().round() - h.detach())


def detached(m: Model, x: Tensor) -> Tensor:
    h = F.dropout(x * m.scale, 0.5).detach() * m.scale
    return plain(m, x) + h - h.detach()


def of_a_weight(m: Model, x: Tensor) -> Tensor:
    w = F.dropout(m.first.weight, 0.5)
    return plain(m, x) + F.linear(x, w.detach()) - F.linear(x, w).detach()


@pytest.mark.parametrize(
    "options",
    [{}, {"learn_chunk": 2}, {"ratio": 1.0, "learn_chunk": 4, "recompute": "block"}],
    ids=str,
)
@pytest.mark.parametrize(
    "body",
    [chosen_by_sign, masked_by_sign, rounded, detached, of_a_weight],
    ids=lambda b: b.__name__,
)
def test_what_is_made_of_a_draw_is_of_the_same_draw(body, options):
    """What each body adds is 0 if all of it is made of one draw."""
    losses = []
    for each in (plain, body):
        torch._dynamo.reset()
        model = fxseek.compile(model_of(each), **{"ratio": "labelled", **options})
        losses.append(model(**inputs_of())["loss"])
    if "learn_chunk" in options and body in (chosen_by_sign, masked_by_sign):
        assert not isinstance(program_of(model).parts, str)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


# ---- backwards that aren't linear ----------------------------------------------------------------


class Copied(torch.autograd.Function):
    """The forward that those below have in common; the copy's backward is each one's own."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w)
        return w.clone()


class Clipped(Copied):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope.clamp(-1e-3, 1e-3)


class Decayed(Copied):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope + 0.01 * ctx.saved_tensors[0]


class Replaced(Copied):
    """A backward that gives what isn't made of its slope, beside one that is."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return 0.01 * ctx.saved_tensors[0]


class WithTerm(torch.autograd.Function):
    """As DeepSeek's models add the slope of another loss: 1, whatever the first one's is."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, term: Tensor) -> Tensor:  # type: ignore[override]
        return w.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return slope, slope.new_ones(1)


class Divided(Copied):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return torch.div(slope, 1e-3, rounding_mode="floor") * 1e-3


class Biased(Copied):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return torch.add(slope, other=ctx.saved_tensors[0], alpha=0.01)


class Straight(torch.autograd.Function):
    """A straight-through estimator, whose backward is linear."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w)
        return w.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        kept = torch.where(w.abs() < 0.3, slope, torch.zeros_like(slope))
        return kept.masked_fill(w.abs() < 0.01, 0.0) + torch.zeros_like(slope)


class Halved(torch.autograd.Function):
    """A backward that is linear, and may run for each part."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return (slope * ctx.saved_tensors[0]).reshape(slope.shape) * 2


def hooked(w: Tensor) -> Tensor:
    w = w * 1
    w.register_hook(lambda slope: slope.clamp(-1e-3, 1e-3))
    return w


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": Clipped.apply,
    "decayed": Decayed.apply,
    "hooked": hooked,
    "replaced": Replaced.apply,
    "with a term": lambda w: WithTerm.apply(w, w.sum().reshape(1)),  # type: ignore[return-value]
    "divided": Divided.apply,
    "biased": Biased.apply,
    "halved": Halved.apply,
    "straight": Straight.apply,
}
LINEAR = ("halved", "straight")
OPTIONS = [{"learn_chunk": 2}, {"chunk_bytes": 1000}, {"learn_chunk": 2, "recompute": "block"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_with_a_backward_of_its_own(name, options):
    def body(m: Model, x: Tensor) -> Tensor:
        return x + attention(m, F.linear(x, WEIGHTS[name](weight_of(m))))

    torch.manual_seed(1)
    model = model_of(body, nn.Linear(6, 6))
    assert_exact(model, **options)
    if "learn_chunk" in options:
        assert isinstance(program_of(model).parts, str) is (name not in LINEAR)


class OwnHead(Model):
    def __init__(self, weight: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]):
        torch.manual_seed(0)
        super().__init__(plain)
        self.weight, self.value = weight, value

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.value(self.last(plain(self, self.first(self.embed(input_ids)))))
        return F.linear(x.tanh(), self.weight(self.head.weight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("of_tokens", [True, False])
def test_a_head_with_a_backward_of_its_own(name, of_tokens, options):
    function = WEIGHTS[name]
    made = OwnHead(torch.clone, function) if of_tokens else OwnHead(function, torch.clone)
    assert_exact(made.double().train(), **options)
    program = program_of(made)
    if not (of_tokens and name == "straight"):  # its function has no rule
        assert (program.head is not None) is (name in LINEAR)
    if "learn_chunk" in options and name not in LINEAR:
        assert re.search(r"or \w.* at .*test_other_values.* acts on gradients", str(program.parts))


# ---- draws that no rule knows --------------------------------------------------------------------


class Gate(torch.autograd.Function):
    """A weight that is there or isn't."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        on = (torch.rand_like(w[:1, :1]) > 0.5).to(w)
        ctx.save_for_backward(on)
        return w * on

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    "drawn", [Gate.apply, lambda w: F.rrelu(w, 0.1, 0.9, training=True)], ids=["function", "rrelu"]
)
def test_a_weight_that_is_drawn_is_drawn_once(drawn):
    def body(m: Model, x: Tensor) -> Tensor:
        return x + attention(m, F.linear(x, drawn(weight_of(m))))

    model = fxseek.compile(model_of(body, nn.Linear(6, 6)), 0.4, learn_chunk=2)
    model(**inputs_of())["loss"].backward()
    assert "would draw anew in each part" in str(program_of(model).parts)


# ---- sizes ---------------------------------------------------------------------------------------


def averaged_copies(m: Model, x: Tensor) -> Tensor:
    return m.first(x[:, None].expand(-1, x.shape[1], -1, -1)).mean(1) + attention(m, x)


def differences(m: Model, x: Tensor) -> Tensor:
    return (m.first((x[:, :, None] - x[:, None]).tanh()) * m.scale).sum(1)


@pytest.mark.parametrize("body", [averaged_copies, differences], ids=lambda b: b.__name__)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_size_that_is_a_division_without_rest(body, batch):
    """torch gives the result of a linear layer ``tokens**2 // tokens`` tokens here."""
    assert_exact(model_of(body), batch=batch)

"""Statistics of tokens, and their gradients, as autograd has them from logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxseek
from fxseek.ops import log_probs
from fxseek.ops.log_probs import IGNORED, STATISTICS, token_statistics

WIDTH, CLASSES = 3, 7


def spelled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: dict[str, Any]
) -> Tensor:
    """The columns from logits of all tokens."""
    logits = F.linear(hidden, weight, bias) * how.get("scale", 1.0)
    if "softcap" in how:
        logits = torch.tanh(logits / how["softcap"]) * how["softcap"]
    logits = logits / how.get("temperature", 1.0)
    index = labels.clamp_min(0).unsqueeze(-1)
    shares = logits.softmax(-1)
    columns = [
        logits.log_softmax(-1).gather(-1, index).squeeze(-1),
        torch.special.entr(shares).sum(-1),
        shares.square().sum(-1).log().detach(),
        logits.mean(-1).detach(),
        (logits.argmax(-1) == labels).to(logits.dtype),
    ]
    return torch.stack(columns, -1).masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs, and the options of both."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    labels = torch.randint(CLASSES, (batch, tokens))
    labels[torch.rand(batch, tokens) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = IGNORED
    inputs = {
        "hidden": torch.randn(batch, tokens, WIDTH, dtype=torch.float64),
        "weight": torch.randn(CLASSES, WIDTH, dtype=torch.float64),
        "bias": torch.randn(CLASSES, dtype=torch.float64) if draw(st.booleans()) else None,
        "labels": labels,
    }
    how = {
        name: value
        for name, value in (("temperature", 0.7), ("softcap", 2.0), ("scale", 3.0))
        if draw(st.booleans())
    }
    return inputs, how


@settings(max_examples=60)
@given(cases(), st.sampled_from([1, 100, 2**26]), st.booleans())
def test_as_autograd_has_them(
    case: tuple[dict[str, Any], dict[str, Any]], chunk_bytes: int, known: bool
):
    inputs, how = case
    names = [name for name in ("hidden", "weight", "bias") if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    wanted = spelled(**inputs, how=how)
    slope = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, leaves, slope)
    options: dict[str, Any] = {**how, "chunk_bytes": chunk_bytes}
    if known:
        options["known"] = wanted.detach()
    found = token_statistics(**inputs, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    again = torch.autograd.grad(found, leaves, slope)
    torch.testing.assert_close(again, grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("column", range(len(STATISTICS)))
def test_one_column(column: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, WIDTH).double(), torch.randn(CLASSES, WIDTH).double()
    labels = torch.tensor([3, IGNORED, 0, 6])
    wanted = spelled(hidden, weight, None, labels, {})
    found = token_statistics(hidden, weight, None, labels, wanted=("log_probs", STATISTICS[column]))
    torch.testing.assert_close(found[:, column], wanted[:, column])
    others = [at for at in range(len(STATISTICS)) if at not in (0, column)]
    assert not found[:, others].any()


def test_second_derivatives_are_refused():
    """Those of a sum, too: the gradient that arrives has no graph."""
    hidden = torch.randn(2, WIDTH, requires_grad=True)
    found = token_statistics(hidden, torch.randn(CLASSES, WIDTH), None, torch.tensor([0, 1]))
    with pytest.raises(fxseek.InputError, match=r"create_graph=True.*log-probabilities"):
        torch.autograd.grad(found.sum(), hidden, create_graph=True)


def test_the_first_of_equal_logits_is_the_likeliest():
    hidden, weight = torch.ones(2, WIDTH), torch.ones(CLASSES, WIDTH)
    found = token_statistics(hidden, weight, None, torch.tensor([0, 1]))
    assert found[:, STATISTICS.index("is_top1")].tolist() == [1.0, 0.0]


def test_classes_that_cannot_be():
    """A bias of minus infinity: no probability, no part in the entropy, no gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    bias[4:] = -torch.inf
    labels = torch.tensor([0, 1, 2, IGNORED])
    columns = [0, 1, 2, 4]  # a mean of logits is minus infinity
    found = token_statistics(hidden, weight, bias, labels)[:, columns]
    wanted = token_statistics(hidden, weight[:4], None, labels)[:, columns]
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, hidden, slope), torch.autograd.grad(wanted, hidden, slope)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_less_precision(dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(5, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.tensor([3, IGNORED, 0, 6, 2])
    found = token_statistics(hidden, weight, None, labels)
    wanted = spelled(hidden.double(), weight.double(), None, labels, {})
    assert found.dtype == torch.float32
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found[:, :4].double(), wanted[:, :4], **close)
    slope = torch.randn_like(found)
    grads = torch.autograd.grad(found, (hidden, weight), slope)
    again = torch.autograd.grad(wanted, (hidden, weight), slope.double())
    torch.testing.assert_close(grads, again, check_dtype=False, **close)


def test_autocast_makes_logits_of_its_precision():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, WIDTH), torch.randn(CLASSES, WIDTH)
    labels = torch.tensor([3, IGNORED, 0, 6, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = token_statistics(hidden, weight, None, labels)
    wanted = token_statistics(hidden.bfloat16(), weight.bfloat16(), None, labels)
    assert torch.equal(found, wanted)


def test_traced():
    """What a compiler makes of it has the same numbers: as one operation, or looked into."""
    torch.manual_seed(0)
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    labels = torch.tensor([3, IGNORED, 0, 6])
    how = log_probs._Logits(0.7, 2.0, 3.0, torch.float32)

    def whole(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return token_statistics(x, w, None, y, 0.7, 2.0, 3.0)

    def inside(x: Tensor, w: Tensor, y: Tensor) -> Any:
        return log_probs._Statistics.apply(x, w, None, y, how, STATISTICS, 2**26, None)

    wanted = whole(hidden, weight, labels)
    slope = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (hidden, weight), slope)
    for run in (whole, inside):
        compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
        found = compiled(hidden, weight, labels)
        torch.testing.assert_close(found, wanted)
        again = torch.autograd.grad(found, (hidden, weight), slope)
        torch.testing.assert_close(again, grads)

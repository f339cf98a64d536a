"""A step of a compiled model, held against the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxseek
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop

__all__ = ["EXACT", "exact_step"]

EXACT = 1e-9


def exact_step(model: nn.Module, inputs: dict[str, Any]) -> fxseek.StepReport:
    """One step; its loss and gradients are those of masked full backprop."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    report = fxseek.report(model)
    reference = masked_backprop(model, inputs, report.selected, weights=report.weights)
    torch.testing.assert_close(loss.detach(), reference.loss, rtol=EXACT, atol=EXACT)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = compare(grads, reference.gradients)
    assert found.error <= EXACT, found
    assert any(g is not None and bool(g.any()) for g in grads.values()) or loss == 0
    return report

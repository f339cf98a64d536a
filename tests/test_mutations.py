"""Each part of the rewriting is needed: leaving one out is found by the gradient check.

These are the mistakes that still train. A key that is not scattered back leaves the loss
bit-identical and the gradients wrong, so that no test of the loss would find it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TinyConfig, TinyDecoder, batch
from torch import Tensor, nn

import fxseek
from fxseek.ops.attention import MaskRows
from fxseek.ops.loss import cross_entropy_parts
from fxseek.ops.rows import Rows, gather_rows


def model_of(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return TinyDecoder(TinyConfig(heads=4, kv_heads=2, positions="learned", **config)).double()


def compiled(select: str = "topk", ratio: float = 0.4, **config: Any) -> nn.Module:
    return fxseek.compile(model_of(**config).train(), ratio, score="random", select=select)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return batch(37, tokens=13, padding="left", labels="some")


def check(model: nn.Module, inputs: dict[str, Any]) -> None:
    fxseek.check_gradients(model, None, **inputs)


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_left_out(attention, select, inputs):
    check(compiled(select, attention=attention), inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_not_scattered_back(attention, inputs, monkeypatch):
    whole = compiled(attention=attention)
    loss = whole(**inputs).loss
    monkeypatch.setattr("fxseek.passes.ditch.scatter_rows", lambda base, *_: base)
    model = compiled(attention=attention)
    torch.testing.assert_close(model(**inputs).loss, loss, rtol=0, atol=0)  # blind to it
    with pytest.raises(fxseek.GradientMismatch):
        check(model, inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_constants_gathered_at_the_wrong_place(attention, inputs, monkeypatch):
    def off_by_one(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
        return gather_rows(x, (kept - 1).clamp(min=0), at)

    monkeypatch.setattr("fxseek.run.stages.gather_rows", off_by_one)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(attention=attention), inputs)


@pytest.mark.parametrize("attention", ["sdpa_float", "eager"])
def test_mask_rows_of_the_first_positions(attention, inputs, monkeypatch):
    def first_rows(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
        if x.dim() == 4 and x.shape[-1] == x.shape[-2]:
            kept = torch.arange(kept.shape[1]).expand_as(kept)
        return gather_rows(x, kept, at)

    monkeypatch.setattr("fxseek.run.stages.gather_rows", first_rows)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(attention=attention), inputs)


def test_rows_of_a_boolean_mask_of_the_first_positions(inputs, monkeypatch):
    rows_of = MaskRows.rows

    def first_rows(self: MaskRows, kept: Tensor) -> Tensor:
        return rows_of(self, torch.arange(kept.shape[1]).expand_as(kept))

    monkeypatch.setattr(MaskRows, "rows", first_rows)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(attention="sdpa"), inputs)


def test_the_causal_flag_as_if_selected_tokens_were_neighbours(inputs, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def flagged(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, **options: Any) -> Tensor:
        options.pop("batch_dim")
        return attend(query, key, value, options.pop("mask", None), **options)

    monkeypatch.setattr("fxseek.passes.rules.attention.attend_rows", flagged)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(attention="sdpa_causal"), inputs)


def test_labels_not_shifted(inputs, monkeypatch):
    def unshifted(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
        if x.dtype == torch.int64 and x.dim() == 1:  # targets, batch × tokens
            kept = (kept - 1).clamp(min=0)
        return gather_rows(x, kept, at)

    monkeypatch.setattr("fxseek.passes.ditch.gather_rows", unshifted)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(), inputs)


def test_weights_left_out(inputs, monkeypatch):
    def unweighted(logits: Tensor, target: Tensor, weights: Tensor, *rest: Any, **options: Any):
        return cross_entropy_parts(logits, target, torch.ones_like(weights), *rest, **options)

    monkeypatch.setattr("fxseek.passes.head.cross_entropy_parts", unweighted)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled("sample", 0.2), {**inputs, "labels": inputs["input_ids"]})


def test_the_embedding_of_the_wrong_tokens(inputs, monkeypatch):
    def last_tokens(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
        if x.dtype == torch.int64 and x.dim() == 2:  # ids and positions
            kept = x.shape[1] - 1 - kept
        return gather_rows(x, kept, at)

    monkeypatch.setattr("fxseek.run.stages.gather_rows", last_tokens)
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(), inputs)

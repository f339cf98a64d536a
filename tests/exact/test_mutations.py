"""Each part of the rewriting is needed: leaving one out is found by the gradient check.

These are the mistakes that still train. A key that is not scattered back leaves the loss
bit-identical and the gradients wrong, so that no test of the loss would find it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TinyConfig, TinyDecoder, batch
from oracle import Model, assert_exact
from oracle import model_of as oracle_model
from torch import Tensor, fx, nn

import fxseek
from fxseek.ops.loss import cross_entropy_parts
from fxseek.ops.masks import MaskRows
from fxseek.ops.parts import Joint
from fxseek.ops.rows import Rows, gather_rows, scatter_rows
from fxseek.passes.ditch import _Ditch
from fxseek.passes.rules import RowsOf
from fxseek.passes.rules.registry import RULES
from fxseek.run import parts as run_parts


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


# ---- parts -------------------------------------------------------------------------------------


def in_parts(attention: str) -> nn.Module:
    """Of the six tokens that are kept, three at a time."""
    model = model_of(attention=attention).train()
    return fxseek.compile(model, 0.4, score="random", learn_chunk=3)


ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "sdpa_causal", "eager"])


@ATTENTIONS
def test_no_part_left_out(attention, inputs):
    check(in_parts(attention), inputs)


@ATTENTIONS
def test_parts_in_the_wrong_order(attention, inputs, monkeypatch):
    few = run_parts.few
    monkeypatch.setattr(run_parts, "few", lambda parts, like: few(parts[::-1], like))
    with pytest.raises(fxseek.GradientMismatch):
        check(in_parts(attention), inputs)


@ATTENTIONS
def test_gradients_for_earlier_parts_dropped(attention, inputs, monkeypatch):
    monkeypatch.setattr(Joint, "_add", lambda *_: None)
    with pytest.raises(fxseek.GradientMismatch):
        check(in_parts(attention), inputs)


@ATTENTIONS
def test_keys_and_values_of_a_part_itself_left_out(attention, inputs, monkeypatch):
    receive = Joint.receive

    def of_later_parts(self: Joint, slope: Tensor, slots: slice) -> Tensor:
        own = gather_rows(slope, self.part.kept[:, slots], self.at)
        return receive(self, slope, slots) - own

    monkeypatch.setattr(Joint, "receive", of_later_parts)
    with pytest.raises(fxseek.GradientMismatch):
        check(in_parts(attention), inputs)


@ATTENTIONS
def test_a_part_whose_loss_is_a_mean_of_its_own(attention, inputs, monkeypatch):
    rows_of = run_parts.rows_of_chunk

    def of_half(slope: Tensor, at: Rows, batch: int, slots: slice) -> Tensor:
        return 2 * rows_of(slope, at, batch, slots)

    monkeypatch.setattr(run_parts, "rows_of_chunk", of_half)
    with pytest.raises(fxseek.GradientMismatch):
        check(in_parts(attention), inputs)


# ---- the plans, and what the passes decide ---------------------------------------------------


def test_keys_of_the_selected_tokens_alone(inputs, monkeypatch):
    """An attention that takes rows where it must take all keys and values."""
    monkeypatch.setattr(
        "fxseek.passes.rules.attention.Full", lambda node: RowsOf(node, Rows(2, 0), 4)
    )
    with pytest.raises(fxseek.GradientMismatch):
        check(compiled(attention="sdpa_causal"), {**inputs, "attention_mask": None})


def test_gradient_at_slots_that_fill_a_row_up(monkeypatch):
    def unfilled(base: Tensor, rows: Tensor, kept: Tensor, at: Rows, filled: Any = None) -> Tensor:
        return scatter_rows(base, rows, kept, at)

    def by_place(given: fxseek.ScoreInputs) -> Tensor:  # the first tokens are the last to be kept
        rows, tokens = given.valid.shape
        return torch.arange(1.0, tokens + 1) ** torch.arange(1.0, 4 * rows, 4)[:, None]

    options = {"score": by_place, "ratio_bounds": (0.05, 0.9)}
    inputs = batch(37, tokens=13, padding="none", labels="some")
    check(fxseek.compile(model_of().train(), "mass:0.6", **options), inputs)
    monkeypatch.setattr("fxseek.passes.ditch.scatter_rows", unfilled)
    with pytest.raises(fxseek.GradientMismatch):
        check(fxseek.compile(model_of().train(), "mass:0.6", **options), inputs)


class Sliced(TinyDecoder):
    """Its labels are shifted by slicing."""

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids, **rest).logits
        assert logits is not None
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def test_labels_shifted_by_two(inputs, monkeypatch):
    def shifted(labels: Tensor, ignored: int) -> Tensor:
        return torch.nn.functional.pad(labels[..., 2:], (0, 2), value=ignored)

    def step() -> Tensor:
        torch.manual_seed(0)
        model = Sliced(TinyConfig(vocab=37)).double().train()
        loss = fxseek.compile(model, 0.4, score="random")(**inputs)["loss"]
        return loss.detach()

    wanted = step()
    monkeypatch.setattr("fxseek.passes.unshift.next_labels", shifted)
    assert not torch.allclose(step(), wanted, rtol=1e-6)


def test_tokens_and_batch_taken_for_each_other(monkeypatch):
    def swapped(x: Tensor, kept: Tensor, at: Rows) -> Tensor:
        if at.batch is not None and x.shape[at.batch] == x.shape[at.row]:
            at = at._replace(row=at.batch, batch=at.row)
        return gather_rows(x, kept, at)

    monkeypatch.setattr("fxseek.run.stages.gather_rows", swapped)
    with pytest.raises((fxseek.GradientMismatch, RuntimeError)):
        check(compiled(), batch(37, batch=13, tokens=13, padding="left", labels="some"))


def test_a_scan_taken_for_a_rule(monkeypatch):
    def scanned(m: Model, x: Tensor) -> Tensor:
        return torch.cumsum(x * m.scale, 1) + x

    monkeypatch.setitem(RULES, "cumsum", RULES["tanh"])
    with pytest.raises((AssertionError, fxseek.FxseekError)):
        assert_exact(oracle_model(scanned))


def test_a_gradient_that_the_model_keeps_back(monkeypatch):
    """What no_grad cuts must stay cut where the score stage replays it."""

    class Gated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gate = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.gate(x).sigmoid()
            return nn.functional.layer_norm(x, x.shape[-1:]) * gate

    def score() -> Tensor:
        model = model_of()
        model.final_norm = Gated(model.config.width)  # type: ignore[union-attr, arg-type]
        for name, parameter in model.double().named_parameters():
            parameter.requires_grad_(name.startswith("head"))
        fxseek.compile(model.train(), 0.4, score="gradient")
        model(**batch(37, tokens=13, padding="left", labels="some"))
        found = fxseek.report(model).gradient
        assert found is not None
        return found

    wanted = score()

    def kept(self: _Ditch, node: fx.Node, made: fx.Node) -> fx.Node:
        return made

    monkeypatch.setattr(_Ditch, "_without_gradient", kept)
    assert not torch.allclose(score(), wanted, rtol=1e-6)

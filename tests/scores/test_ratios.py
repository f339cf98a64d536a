"""Ratios that are no number: the labelled positions, and shares that follow training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    IGNORED,
    TinyConfig,
    TinyDecoder,
    batch,
    tiny_llama,
    tiny_lora,
    without_casts,
)
from steps import EXACT, exact_step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fxseek
from fxseek.inspect.compare import compare
from fxseek.selecting import select_labelled

VOCAB = 37
GROUPED = TinyConfig(depth=3, heads=6, kv_heads=3, positions="rotary", bias=True)


def decoder(config: TinyConfig = GROUPED) -> TinyDecoder:
    torch._dynamo.reset()
    return TinyDecoder(config).double().train()


def rows_of(report: fxseek.StepReport) -> list[list[int]]:
    return [[at for at in row if at >= 0] for row in report.selected.tolist()]


# ---- labelled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("options", [{}, {"learn_chunk": 3}, {"select": "sample"}], ids=str)
def test_the_labelled_positions_and_no_others(padding: str, options: dict[str, Any]):
    model = decoder()
    inputs = batch(VOCAB, batch=3, tokens=19, padding=padding, labels="some")
    ordinary = model(**inputs).loss.detach()
    fxseek.compile(model, "labelled", **options)
    report = exact_step(model, inputs)
    shifted = F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    assert rows_of(report) == [(row != IGNORED).nonzero().flatten().tolist() for row in shifted]
    assert report.ratio is None
    assert not report.parts
    kept = report.selected >= 0
    assert torch.equal(report.weights, kept.float())
    torch.testing.assert_close(model(**inputs).loss.detach(), ordinary, rtol=EXACT, atol=EXACT)


def test_one_row_alone():
    model = decoder()
    fxseek.compile(model, "labelled")
    inputs = batch(VOCAB, batch=1, tokens=12)
    inputs["labels"][:, :7] = IGNORED
    assert rows_of(exact_step(model, inputs)) == [[6, 7, 8, 9, 10]]


def test_a_row_without_labels():
    model = decoder()
    fxseek.compile(model, "labelled")
    inputs = batch(VOCAB, batch=2, tokens=12)
    inputs["labels"][1] = IGNORED
    assert rows_of(exact_step(model, inputs)) == [list(range(11)), [0]]
    inputs["labels"][:] = IGNORED
    assert rows_of(exact_step(model, inputs)) == [[0], [0]]


def test_adapters_and_lengths_that_change():
    model = tiny_lora(without_casts(tiny_llama())).double().train()
    fxseek.compile(model, "labelled")
    for tokens in (17, 23, 11):
        exact_step(model, batch(VOCAB, batch=2, tokens=tokens, padding="right", labels="some"))


def test_a_lowered_stage():
    model = decoder(TinyConfig(depth=1))
    fxseek.compile(model, "labelled", backend="aot_eager")
    for seed in range(3):
        exact_step(model, batch(VOCAB, tokens=13 + seed, labels="some", seed=seed))


def test_without_a_loss_over_tokens_it_is_an_error():
    model = decoder()
    fxseek.compile(model, "labelled", loss=lambda outputs, inputs: outputs.logits.square().mean())
    with pytest.raises(fxseek.GraphError, match="ratio='labelled' keeps the positions"):
        model(**batch(VOCAB, tokens=12))


def test_rows_that_keep_their_first_position_keep_each_position_once():
    supervised = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    found = select_labelled(supervised)
    assert found.kept.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert found.filled is not None
    assert found.filled.tolist() == [[False] * 3, [False, True, True]]
    found = select_labelled(supervised, torch.tensor([[4], [4]]))
    assert found.kept.tolist() == [[1, 2, 3, 4], [4, 0, 1, 2]]  # what fills up comes last


def test_explain_counts_the_labels_of_the_batch():
    inputs: dict[str, Any] = batch(VOCAB, tokens=20)
    inputs["labels"][0, :12] = IGNORED
    model = fxseek.compile(decoder(), "labelled")
    found = fxseek.explain(model, **inputs)
    assert (found.fewest_kept, found.kept) == (8, 20)
    assert fxseek.profile(model, **inputs).kept == 19
    assert fxseek.estimate(tiny_llama(), 20, ratio="labelled", device="cpu").kept == 20


# ---- a ratio that follows training ---------------------------------------------------------------


def test_explain_counts_what_is_kept_beside_labels():
    model = fxseek.compile(tiny_llama().train(), "labelled", sinks=2)
    inputs: dict[str, Any] = batch(VOCAB, 2, 20, padding="right", labels="completion", seed=6)
    found = fxseek.explain(model, **inputs)
    model(**inputs)
    counts = (fxseek.report(model).selected >= 0).sum(-1)
    assert found.fewest_kept <= counts.min() and counts.max() <= found.kept


def test_linear():
    model = decoder()
    fxseek.compile(model, "0.2->0.6", ratio_steps=5)
    inputs = batch(VOCAB, tokens=20)
    found = [exact_step(model, inputs) for _ in range(7)]
    assert [report.ratio for report in found] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert [report.selected.shape[1] for report in found] == [4, 6, 8, 10, 12, 12, 12]
    assert len(fxseek.capture.step.step_of(model).recorder.steps) == 1  # type: ignore[union-attr]
    fxseek.resume(model, 2)
    assert exact_step(model, inputs).ratio == pytest.approx(0.4)


def test_a_function_of_the_step():
    model = decoder()
    fxseek.compile(model, lambda index: 1.0 if index == 2 else 0.25, learn_chunk=6)
    inputs = batch(VOCAB, batch=3, tokens=20, padding="right")
    assert [exact_step(model, inputs).ratio for _ in range(4)] == [0.25, 0.25, 1.0, 0.25]
    assert len(fxseek.capture.step.step_of(model).recorder.steps) == 1  # type: ignore[union-attr]
    fxseek.resume(model, 2)
    assert exact_step(model, inputs).ratio == 1.0


def test_a_ratio_of_one_on_the_way_is_ordinary_training():
    model = decoder()
    inputs = batch(VOCAB, batch=3, tokens=20, padding="left")
    model(**inputs).loss.backward()
    ordinary = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    fxseek.compile(model, "0.1->1.0", ratio_steps=2)
    exact_step(model, inputs)
    exact_step(model, inputs)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert compare(grads, ordinary).error <= EXACT


@pytest.mark.parametrize("share", [0, 1.5, math.nan, "0.1", None, True])
def test_a_function_that_returns_no_share(share: Any):
    model = decoder()
    fxseek.compile(model, lambda index: share)
    with pytest.raises(fxseek.ConfigError, match=r"function that returned .* for step 0"):
        model(**batch(VOCAB, tokens=12))


def test_a_function_that_raises():
    model = fxseek.compile(decoder(), lambda step: {}[step])
    with pytest.raises(fxseek.ConfigError, match="raised KeyError for step 0"):
        model(**batch(VOCAB))


def test_numbers_of_python_are_no_ratios():
    with pytest.raises(fxseek.ConfigError, match="is not accepted"):
        fxseek.SeekConfig("0_1->0.5")


def test_nobody_says_over_how_many_steps():
    model = decoder()
    fxseek.compile(model, "0.1->0.5")
    with pytest.raises(fxseek.ConfigError, match="ratio_steps="):
        model(**batch(VOCAB, tokens=12))


def test_the_backend_of_torch_compile():
    model, inputs = decoder(), batch(VOCAB, tokens=20)
    options: Any = {"ratio": "0.1->0.5", "ratio_steps": 2, "score": "context", "span": 2}
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options)
    kept = []
    for _ in range(2):
        compiled(**inputs).loss.backward()
        kept.append(fxseek.report().selected.shape[1])
    assert kept == [2, 10]


def test_the_largest_is_what_is_estimated():
    model = tiny_llama()
    given: dict[str, Any] = {"device": "cpu"}
    assert fxseek.estimate(model, 20, ratio="0.1->0.5", **given).kept == 10
    assert fxseek.estimate(model, 20, ratio=lambda index: 0.1, **given).kept == 20
    scored = fxseek.estimate(model, 20, ratio="0.1->1.0", **given)
    assert scored.stages != fxseek.estimate(model, 20, ratio=1.0, **given).stages
    compiled = fxseek.compile(model.train(), "0.5->0.1")
    found = fxseek.explain(compiled, **batch(VOCAB, tokens=20))
    assert (found.fewest_kept, found.kept) == (2, 10)


def test_a_checkpoint_around_a_ratio_that_varies():
    model = fxseek.compile(decoder(), "0.2->0.4", ratio_steps=5)
    inputs = batch(VOCAB, tokens=20)

    def run(ids: Tensor) -> Tensor:
        return model(**{**inputs, "input_ids": ids}).loss

    with pytest.raises(fxseek.InputError, match="would draw other tokens"):
        checkpoint(run, inputs["input_ids"], use_reentrant=False).backward()

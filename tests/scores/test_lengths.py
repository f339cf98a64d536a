"""Rows of different lengths: each keeps its ratio of its own tokens, whatever fills it up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TinyConfig, TinyDecoder, batch, tiny_llama, without_casts
from sweeps import thinned
from torch import Tensor

import fxseek
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop
from fxseek.ops.rows import Rows, gather_rows, scatter_rows
from fxseek.selecting import Selection, count_kept, count_kept_of_rows, select_sample, select_topk

VOCAB = 37


def lengths_of(lengths: list[int], tokens: int, left: bool = False) -> Tensor:
    at = torch.arange(tokens).expand(len(lengths), -1)
    at = at.flip(1) if left else at
    return at < torch.tensor(lengths)[:, None]


# ---- counts and selections -----------------------------------------------------------------------


@given(percent=st.integers(1, 10_000), lengths=st.lists(st.integers(0, 500), min_size=1))
def test_counts_of_rows_are_those_of_their_lengths(percent: int, lengths: list[int]):
    ratio = percent / 10_000
    found = count_kept_of_rows(ratio, lengths_of(lengths, 500))
    assert found.tolist() == [count_kept(ratio, n) if n else 0 for n in lengths]


@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=4),
    percent=st.integers(1, 100),
    left=st.booleans(),
    select=st.sampled_from(["topk", "supervised", "sample"]),
    seed=st.integers(0, 99),
)
def test_short_rows_end_in_padding(lengths, percent, left, select, seed):
    tokens, draw = 17, torch.Generator().manual_seed(seed)
    valid = lengths_of(lengths, tokens, left)
    scores = torch.rand(len(lengths), tokens, generator=draw)
    supervised = torch.rand(scores.shape, generator=draw) < 0.5
    k, counts = count_kept(percent / 100, tokens), count_kept_of_rows(percent / 100, valid)
    common: dict[str, Any] = {"valid": valid, "supervised": supervised, "counts": counts}
    if select == "sample":
        found = select_sample(scores, k, generator=draw, **common)
    else:
        found = select_topk(scores, k, supervised_only=select == "supervised", **common)
    assert_fits(found, valid, supervised, counts)


def assert_fits(found: Selection, valid: Tensor, supervised: Tensor, counts: Tensor) -> None:
    assert found.filled is not None
    for row, count in enumerate(counts.tolist()):
        shown = found.selected[row].tolist()
        chosen, rest = shown[:count], shown[count:]
        assert chosen == sorted(chosen)
        assert rest == [-1] * len(rest)
        assert valid[row, chosen].all()
        assert (found.weights[row, :count] > 0).all()
        assert (found.weights[row, count:] == 0).all()
        assert len(set(found.kept[row].tolist())) == found.kept.shape[1]
        assert not valid[row, found.kept[row, count:]].any()
        labelled = supervised[row] & valid[row]
        assert labelled[chosen].any() == labelled.any()


def test_a_row_alone_selects_what_it_selects_beside_a_longer_one():
    scores = torch.rand(1, 12, generator=torch.Generator().manual_seed(2))
    alone = select_topk(scores[:, :6], 3, valid=torch.ones(1, 6, dtype=torch.bool))
    valid = lengths_of([6, 12], 12)
    both = select_topk(scores.expand(2, -1), 6, valid=valid, counts=count_kept_of_rows(0.5, valid))
    assert both.selected[0].tolist() == [*alone.kept[0].tolist(), -1, -1, -1]


# ---- scatter -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "at"),
    [
        ((2, 5, 3), Rows(1, 0)),
        ((5, 2, 3), Rows(0, 1)),
        ((2, 4, 5, 3), Rows(2, 0)),
        ((10, 3), Rows(0, None, True)),
        ((6, 5, 3), Rows(1, 0, False, 3)),
    ],
)
def test_filled_rows_pass_no_gradient(shape, at):
    base = torch.rand(*shape, dtype=torch.float64)
    kept = torch.tensor([[0, 3], [1, 4]])
    rows = gather_rows(base, kept, at).clone().requires_grad_()
    filled = torch.tensor([[False, True], [False, False]])
    placed = scatter_rows(base, rows, kept, at, filled)
    torch.testing.assert_close(placed, base)  # their values stay
    slopes = torch.rand(placed.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(placed, rows, slopes)
    wanted = gather_rows(slopes, kept, at)
    lost = (found == 0) & (wanted != 0)
    torch.testing.assert_close(torch.where(lost, wanted, found), wanted)
    once = math.prod(shape) // 10  # elements of one token of one row
    assert int(lost.sum()) == once


# ---- training steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "attention", "score"),
    thinned(["left", "right"], ["sdpa", "sdpa_causal", "eager"], ["tokenseek", "random"]),
)
def test_steps_are_exact(padding, attention, score):
    """Even where attention does not look at the mask, so that later tokens attend to padding."""
    torch.manual_seed(0)
    model = TinyDecoder(TinyConfig(heads=4, kv_heads=2, attention=attention)).double()
    inputs = batch(VOCAB, batch=3, tokens=19, padding=padding)
    inputs["attention_mask"] = lengths_of([19, 11, 2], 19, left=padding == "left").long()
    fxseek.compile(model, 0.4, score=score, select="sample" if score == "random" else "topk")
    loss = model(**inputs).loss
    loss.backward()
    report = fxseek.report(model)
    assert (report.selected >= 0).sum(1).tolist() == [8, 5, 1]
    reference = masked_backprop(model, inputs, report.selected, weights=report.weights)
    torch.testing.assert_close(loss.detach(), reference.loss, rtol=1e-9, atol=1e-9)
    found = compare({name: p.grad for name, p in model.named_parameters()}, reference.gradients)
    assert found.error <= 1e-9, found


def test_labels_at_padding_do_not_count():
    torch.manual_seed(0)
    model = TinyDecoder(TinyConfig()).double()
    inputs = batch(VOCAB, batch=2, tokens=12)
    inputs["attention_mask"] = lengths_of([12, 4], 12).long()
    inputs["labels"] = inputs["input_ids"].clone()  # nobody took the labels of the padding away
    fxseek.compile(model, 0.5, score="random")
    loss = model(**inputs).loss
    reference = masked_backprop(model, inputs, fxseek.report(model).selected)
    torch.testing.assert_close(loss.detach(), reference.loss, rtol=1e-9, atol=1e-9)


def test_a_row_of_padding_alone_and_all_rows_of_padding():
    model = without_casts(tiny_llama()).train()
    inputs = batch(VOCAB, batch=2, tokens=10)
    inputs["attention_mask"] = lengths_of([10, 0], 10).long()
    fxseek.compile(model, 0.3, score="random")
    model(**inputs).loss.backward()
    assert (fxseek.report(model).selected >= 0).sum(1).tolist() == [3, 0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_logits_of_selected_tokens_are_in_the_order_of_the_report():
    torch.manual_seed(0)
    model = TinyDecoder(TinyConfig()).double()
    inputs = batch(VOCAB, batch=2, tokens=12)
    inputs["attention_mask"] = lengths_of([12, 5], 12, left=True).long()
    with torch.no_grad():
        every = model(**inputs).logits
    fxseek.compile(model, 0.5, outputs="selected")
    logits = model(**inputs).logits
    selected = fxseek.report(model).selected
    for row in range(2):
        chosen = selected[row][selected[row] >= 0]
        torch.testing.assert_close(logits[row, : len(chosen)], every[row, chosen])

"""Sinks: the first tokens of each row are always kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, double_throughout, tiny_llama

import fxseek
from fxseek.run.row_inputs import first_tokens

VOCABULARY = 37


def kept_of(model: Any, given: dict[str, Any]) -> list[set[int]]:
    model(**given)
    return [set(row[row >= 0].tolist()) for row in fxseek.report(model).selected]


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.3},
        {"ratio": 0.3, "select": "sample", "span": 3},
        {"ratio": "labelled"},
        {"ratio": "mass:0.3", "learn_chunk": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_first_tokens_are_kept_and_gradients_exact(options, padding):
    with double_throughout():
        model = fxseek.compile(tiny_llama().double().train(), sinks=2, **options)
        given: dict[str, Any] = batch(VOCABULARY, 4, 19, padding=padding, labels="some")
        fxseek.check_gradients(model, **given)
        mask = given["attention_mask"].bool()
        for row, kept in enumerate(kept_of(model, given)):
            first = int(mask[row].int().argmax())
            assert {first, first + 1} <= kept
            assert options["ratio"] != 0.3 or len(kept) <= max(
                2, -(-3 * int(mask[row].sum()) // 10)
            )


@pytest.mark.parametrize("more", [{}, {"supervised_only": True}, {"select": "sample"}], ids=str)
@pytest.mark.parametrize("sinks", [1, 4])
def test_sinks_leave_room_for_a_label(more, sinks):
    """They are kept, and a row with labels trains, however few tokens the ratio asks for."""
    given: dict[str, Any] = batch(VOCABULARY, 2, 41)
    given["labels"][:, :37] = -100
    model = fxseek.compile(tiny_llama().train(), 0.01, sinks=sinks, **more)
    explained = fxseek.explain(model, **given)
    assert explained.kept == explained.fewest_kept == sinks + 1
    model(**given).loss.backward()
    report = fxseek.report(model)
    for row in report.selected.tolist():
        assert row[:sinks] == list(range(sinks))
        assert len(row) == sinks + 1
        assert row[-1] >= 36
    fxseek.check_gradients(model, **given)


def test_more_sinks_than_tokens():
    model = fxseek.compile(tiny_llama().train(), 0.1, sinks=30, score="random")
    given: dict[str, Any] = batch(VOCABULARY, 3, 9)
    assert kept_of(model, given) == [set(range(9))] * 3
    valid = torch.tensor([[False, True, True, False], [True] * 4, [False] * 4])
    wanted = [[1, 2, 2], [0, 1, 2], [0, 0, 0]]
    assert first_tokens(valid, 3, 0).tolist() == wanted
    assert first_tokens(valid, 2, 1).tolist() == [[1, 2], [1, 2], [0, 0]]
    hole = torch.tensor([[True, False, True, True]])
    assert first_tokens(hole, 2, 0).tolist() == [[0, 2]]


def test_sinks_change_nothing_where_all_are_kept_and_are_told():
    given: dict[str, Any] = batch(VOCABULARY, 2, 9)
    model = fxseek.compile(tiny_llama().train(), 1.0, sinks=1)
    assert kept_of(model, given) == [set(range(9))] * 2
    assert "first tokens" not in str(fxseek.explain(model, **given))
    fxseek.uncompile(model)
    fxseek.compile(model, 0.3, sinks=1)
    assert "first tokens of each row are always kept (1)" in str(fxseek.explain(model, **given))

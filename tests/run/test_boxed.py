"""Graphs that run as code: they let go of what they are given, and name the line that fails."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from torch import Tensor, fx, nn

import fxseek
from fxseek.run.boxed import Boxed

VOCAB = 37


def test_an_argument_dies_after_its_last_use():
    alive: list[bool] = []

    def look(value: Tensor) -> Tensor:
        alive.append(seen() is not None)
        return value

    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    doubled = graph.call_function(torch.add, (x, x))
    looked = graph.call_function(
        lambda value: alive.append(seen() is not None) or value, (doubled,)
    )
    graph.output((graph.call_function(torch.sub, (looked, y)),))
    run = Boxed(nn.Module(), graph)
    values: list[Any] = [torch.ones(2), torch.full((2,), 5.0)]
    seen = weakref.ref(values[0])
    (found,) = run(values)
    gc.collect()
    assert values == [] and alive == [False]
    assert torch.equal(found, torch.full((2,), -3.0))


def test_submodules_and_constants_are_called_where_they_are():
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3

    root = nn.Module()
    root.part, root.constant = Part(), torch.ones(2)
    graph = fx.Graph()
    x = graph.placeholder("x")
    tripled = graph.create_node("call_module", "part", (x,))
    graph.output(graph.call_function(torch.add, (tripled, graph.get_attr("constant"))))
    run = Boxed(root, graph)
    assert torch.equal(run([torch.ones(2)]), torch.full((2,), 4.0))


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_an_error_of_a_stage_names_the_line_of_the_model(recompute: str):
    model = fxseek.compile(tiny_llama(), 0.3, score="random", recompute=recompute)
    given = batch(VOCAB, 2, 12)
    model(**given).loss.backward()
    given["input_ids"] = given["input_ids"].clone().fill_(VOCAB)  # no such token
    with pytest.raises(IndexError, match="index out of range") as caught:
        model(**given)
    notes = "\n".join(getattr(caught.value, "__notes__", []))
    assert "While running" in notes and "modeling_llama.py" in notes, notes

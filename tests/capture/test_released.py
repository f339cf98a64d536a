"""A compiled model is freed with its last reference, and threads may share one."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TinyConfig, TinyDecoder, batch
from torch import nn

import fxseek

VOCABULARY = 37

Case = Callable[[nn.Module, dict[str, Any]], None]


def step(model: nn.Module, inputs: dict[str, Any], **options: Any) -> None:
    fxseek.compile(model, **options)
    for _ in range(2):
        model(**inputs).loss.backward()
    fxseek.report(model)


def with_a_loss_that_holds_it(model: nn.Module, inputs: dict[str, Any]) -> None:
    def loss(outputs: Any, _: Any) -> Any:
        return outputs.loss * (1.0 if model.training else 0.0)

    step(model, inputs, ratio=0.5, loss=loss)


def with_a_score_that_holds_it(model: nn.Module, inputs: dict[str, Any]) -> None:
    def score(given: Any) -> Any:
        return given.input_ids.float() * (1.0 if model.training else 0.0)

    step(model, inputs, ratio=0.5, score=score)


def explained(model: nn.Module, inputs: dict[str, Any]) -> None:
    fxseek.compile(model, 0.5)
    str(fxseek.explain(model, **inputs))


def profiled(model: nn.Module, inputs: dict[str, Any]) -> None:
    fxseek.compile(model, 0.5)
    str(fxseek.profile(model, **inputs))


def refused(model: nn.Module, inputs: dict[str, Any]) -> None:
    fxseek.compile(model, 0.5)
    with pytest.raises(RuntimeError, match="Expected tensor"):
        model(**inputs | {"input_ids": inputs["input_ids"].float()})


def uncompiled(model: nn.Module, inputs: dict[str, Any]) -> None:
    step(model, inputs, ratio=0.5)
    fxseek.uncompile(model)
    model(**inputs).loss.backward()


def through_the_backend(model: nn.Module, inputs: dict[str, Any]) -> None:
    options: Any = {"ratio": 0.5}
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options)
    compiled(**inputs).loss.backward()


def with_options(**options: Any) -> Any:
    def case(model: nn.Module, inputs: dict[str, Any]) -> None:
        step(model, inputs, **options)

    return pytest.param(case, id=" ".join(f"{k}={v}" for k, v in options.items()))


CASES = [
    with_options(ratio=0.5),
    with_options(ratio=1.0),
    with_options(ratio=1.0, kv="offload", recompute="block"),
    with_options(ratio=0.5, outputs="full", score="random"),
    with_options(memory_budget_bytes=2**30),
    with_a_loss_that_holds_it,
    with_a_score_that_holds_it,
    explained,
    profiled,
    refused,
    uncompiled,
    through_the_backend,
]


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_freed(case: Case):
    model = TinyDecoder(TinyConfig()).train()
    case(model, batch(VOCABULARY))
    references = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_threads_that_share_a_model_take_turns():
    """Each step is that of its own call: the padding mask and the report are the model's."""
    model = fxseek.compile(TinyDecoder(TinyConfig()).double().train(), 0.5)
    paddings = ("left", "right", "none", "none")
    calls = [batch(VOCABULARY, 2, 16, padding=p, seed=s) for s, p in enumerate(paddings)]
    wanted = [model(**call).loss.item() for call in calls]
    found: list[list[float]] = [[] for _ in calls]

    def run(index: int) -> None:
        found[index].extend(model(**calls[index]).loss.item() for _ in range(20))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [[loss] * 20 for loss in wanted]


def test_a_backward_outlives_its_model():
    inputs = batch(VOCABULARY)
    model = TinyDecoder(TinyConfig()).train()
    other = fxseek.compile(copy.deepcopy(model), 0.5)
    other(**inputs).loss.backward()
    fxseek.compile(model, 0.5)
    loss, parameters = model(**inputs).loss, list(model.parameters())
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    loss.backward()
    for found, wanted in zip(parameters, other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=0)

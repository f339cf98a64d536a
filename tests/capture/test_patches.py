"""What is changed in Dynamo for a capture, and put back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from models import TinyConfig, TinyDecoder, batch
from torch._dynamo.guards import CheckFunctionManager

import fxseek
from fxseek.capture.patches import resting

VOCABULARY = 37


def test_a_capture_that_is_not_run_builds_no_guards(monkeypatch: pytest.MonkeyPatch):
    """`explain` and `estimate` throw theirs away; a training step's are built as ever."""
    plain, built = CheckFunctionManager.build_guards, []

    def counting(self: Any, guards: list[Any], *args: Any, **kwargs: Any) -> Any:
        built.append(len(guards))
        return plain(self, guards, *args, **kwargs)

    monkeypatch.setattr(CheckFunctionManager, "build_guards", counting)
    model = fxseek.compile(TinyDecoder(TinyConfig(depth=1)).train(), 0.3, score="random")
    fxseek.explain(model, **batch(VOCABULARY))
    assert built == [0]
    model(**batch(VOCABULARY))
    assert len(built) == 2 and built[1] > 10
    fxseek.explain(model, **batch(VOCABULARY))
    assert built[2:] == [0]
    model(**batch(VOCABULARY))
    assert len(built) == 3
    assert CheckFunctionManager.build_guards is counting


def test_the_collector_rests_and_goes_on():
    assert gc.isenabled()
    with resting(), resting():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with resting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

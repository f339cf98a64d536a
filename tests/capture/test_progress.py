"""What is said of a capture: one line at its start, one at its end."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TinyConfig, TinyDecoder, batch
from torch._dynamo.callback import callback_handler

import fxseek
from fxseek.capture.progress import Captures, say

VOCABULARY = 37


def decoder() -> Any:
    return TinyDecoder(TinyConfig(depth=1)).train()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [x.message for x in caplog.records if "captur" in x.message or "rewrit" in x.message]
    caplog.clear()
    return found


def test_each_capture_is_announced_and_no_other_step(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fxseek")
    model = fxseek.compile(decoder(), 0.3, score="random")
    model(**batch(VOCABULARY))
    start, end = lines(caplog)
    assert start == "fxseek: capturing TinyDecoder, which takes seconds to tens of seconds ..."
    assert re.fullmatch(r"fxseek: captured and rewritten in \d+\.\d s", end)
    model(**batch(VOCABULARY, tokens=13))
    assert lines(caplog) == []
    model(**batch(VOCABULARY, batch=1))
    start, end = lines(caplog)
    assert "again, for another kind of batch" in start
    assert "captured and rewritten" in end
    assert callback_handler.start_callbacks == []


@pytest.mark.sweep
def test_what_a_step_compiles_is_no_capture(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fxseek")
    model = fxseek.compile(decoder(), 0.3, score="random", backend="aot_eager")
    model(**batch(VOCABULARY))
    model(**batch(VOCABULARY))
    assert len(lines(caplog)) == 2


def test_a_capture_that_fails_has_no_end(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fxseek")
    model = fxseek.compile(decoder(), 0.3)
    with pytest.raises(fxseek.FxseekError):
        model(batch(VOCABULARY)["input_ids"])  # a score that needs a loss
    assert len(lines(caplog)) == 1
    model(**batch(VOCABULARY))
    assert len(lines(caplog)) == 2


def test_the_backend_of_torch_compile_announces_its_part(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fxseek")
    options: Any = {"score": "random"}
    compiled: Any = torch.compile(
        decoder(), backend="fxseek", dynamic=True, fullgraph=True, options=options
    )
    compiled(**batch(VOCABULARY))
    start, end = lines(caplog)
    assert re.fullmatch(r"fxseek: rewriting a captured graph of \d+ operations \.\.\.", start)
    assert re.fullmatch(r"fxseek: rewritten in \d+\.\d s", end)


def test_without_logging_it_is_said_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say("seen %s by those who set up logging", "not")
    monkeypatch.setattr(logging.getLogger("fxseek"), "hasHandlers", lambda: False)
    say("seen %s", 1)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "seen 1\n"


def test_what_silences_logging_silences_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    log = logging.getLogger("fxseek")
    monkeypatch.setattr(log, "hasHandlers", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(log, "disabled", True)
        say("not seen")
    with monkeypatch.context() as patch:
        patch.setattr(log, "level", logging.WARNING)
        say("not seen")
    with monkeypatch.context() as patch:
        patch.setattr(logging.root.manager, "disable", logging.INFO)
        say("not seen")
    say("seen")
    assert capsys.readouterr().err == "seen\n"


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError, None])
def test_a_line_that_cannot_be_written_stops_nothing(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
):
    def fail(text: str) -> None:
        assert error is not None
        raise error

    monkeypatch.setattr(logging.getLogger("fxseek"), "hasHandlers", lambda: False)
    closed = SimpleNamespace(write=fail, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", None if error is None else closed)
    say("not seen")


def test_a_reset_within_a_call_takes_the_callback():
    captures = Captures("model")
    with captures.watched():
        callback_handler.clear()
    assert captures.count == 0

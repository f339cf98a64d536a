"""What is said of a capture: a line when it starts, and one when it is done.

Dynamo tells when it starts to compile by a callback handler that has no public spelling
(``torch._dynamo.callback``, in torch 2.11 to 2.14); nothing else says that a call which has
run before is captured again.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.callback import callback_handler

__all__ = ["Captures", "say"]

log = logging.getLogger("fxseek")


def say(message: str, *arguments: Any) -> None:
    """Log at the level INFO; write to stderr where nobody has set up logging, as a bar would.

    A line that can't be written stops nothing.
    """
    if log.hasHandlers():
        log.info(message, *arguments)
    elif not _is_silenced() and sys.stderr is not None:
        from tqdm import tqdm  # of transformers; a bar that is shown stays whole

        with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
            tqdm.write(message % arguments, file=sys.stderr)


def _is_silenced() -> bool:
    """Whether the logger of fxseek was told to be silent; the root's level is WARNING unasked."""
    return log.disabled or max(log.level, log.manager.disable + 1) > logging.INFO


class Captures:
    """The captures of one model's step: it says when each starts, and when it is done.

    What a step itself compiles when it first runs (``backend="inductor"``) is no capture.
    `called`: how many times what was captured has been called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.called = 0
        self._started: float | None = None
        self._runs = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A call that may be captured."""
        thread = threading.get_ident()

        def start(_: Any) -> None:
            if self._started is None and not self._runs and threading.get_ident() == thread:
                self._start()

        self._started = None
        callback_handler.register_start_callback(start)
        try:
            yield
        finally:
            if start in callback_handler.start_callbacks:  # torch._dynamo.reset() takes all
                callback_handler.remove_start_callback(start)

    def _start(self) -> None:
        self._started = time.perf_counter()
        if self.count:
            say("fxseek: capturing %s again, for another kind of batch ...", self.name)
        else:
            say("fxseek: capturing %s, which takes seconds to tens of seconds ...", self.name)

    def done(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a captured graph is there; the same one, to be run."""
        self.count += 1
        if self._started is not None:
            say("fxseek: captured and rewritten in %.1f s", time.perf_counter() - self._started)

        def run(*inputs: Any) -> Any:
            self.called += 1
            self._runs = True
            try:
                return function(*inputs)
            finally:
                self._runs = False

        return run

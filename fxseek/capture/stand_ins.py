"""Attributes of other libraries that are replaced while a step is captured or run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["StandIn", "StandIns"]

StandIn = tuple[Any, str, Callable[[Any], Any]]
"""An owner, the name of its attribute, and what makes the stand-in of the attribute."""


class StandIns:
    """Replaces attributes while anybody uses it, in any thread, and puts them back after the last.

    Who calls them from elsewhere meanwhile gets the stand-ins, too.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._before: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def on(self, stand_ins: Callable[[], Iterable[StandIn]]) -> Iterator[None]:
        """Meanwhile attributes are what the first user's `stand_ins` makes of them."""
        with self._lock:
            self._users += 1
        try:
            with self._lock:
                if not self._before:
                    for owner, name, make in stand_ins():
                        stand_in = make(getattr(owner, name))
                        self._before.append((owner, name, vars(owner).get(name)))
                        setattr(owner, name, stand_in)
            yield
        finally:
            with self._lock:
                self._users -= 1
                while self._users == 0 and self._before:
                    owner, name, before = self._before.pop()
                    if before is None:  # inherited
                        delattr(owner, name)
                    else:
                        setattr(owner, name, before)

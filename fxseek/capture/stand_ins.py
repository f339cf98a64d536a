"""Attributes of other libraries that are replaced while a step is run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["StandIns"]


class StandIns:
    """Replaces attributes while anybody uses it, in any thread, and puts them back after the last.

    Who calls them from elsewhere meanwhile gets the stand-ins, too.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._originals: dict[str, Any] = {}

    @contextlib.contextmanager
    def on(self, owner: Any, stand_ins: Mapping[str, Any]) -> Iterator[None]:
        """Meanwhile the attributes of `owner` are these; it is the same one in each call."""
        with self._lock:
            if self._users == 0:
                for name, stand_in in stand_ins.items():
                    self._originals[name] = getattr(owner, name)
                    setattr(owner, name, stand_in)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for name in stand_ins:
                        setattr(owner, name, self._originals.pop(name))

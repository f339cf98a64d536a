"""Grids of cases of which a part is run always, and the rest with ``-m sweep``."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import Any

import pytest

__all__ = ["sampled", "thinned"]


def sampled(cases: Iterable[Any], always: Container[Any]) -> list[Any]:
    """The cases, of which those in `always` are run always."""
    return [
        case if case in always else pytest.param(case, marks=pytest.mark.sweep) for case in cases
    ]


def thinned(*axes: Iterable[Any]) -> list[Any]:
    """All combinations, of which every other one is run always: each value with half of the rest.

    Values name themselves in the ids, by their ``__name__`` or as they print.
    """
    every = [list(axis) for axis in axes]
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in every)):
        values = [axis[place] for axis, place in zip(every, places, strict=True)]
        name = "-".join(str(getattr(value, "__name__", value)) for value in values)
        marks = pytest.mark.sweep if sum(places) % 2 else ()
        cases.append(pytest.param(*values, id=name, marks=marks))
    return cases

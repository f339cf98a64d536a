"""Matplotlib, where a plot is asked for: it is an extra, imported by no other call."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fxseek.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_for"]


def figure_for(path: str | Path | None) -> type[Figure]:
    """Matplotlib's figure, for a file of a format that plots have.

    Raises:
        InputError: the path ends in something else, or matplotlib is not installed.
    """
    if not isinstance(path, str | PathLike) or Path(path).suffix.lower() not in (".png", ".svg"):
        raise InputError(f"path={str(path)!r} must end in .png or .svg, the formats of a plot")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            'a plot needs matplotlib, which is not installed: pip install "fxseek[demo]"'
        ) from error
    return Figure

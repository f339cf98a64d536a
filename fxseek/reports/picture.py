"""A picture of a row of tokens: one panel for each score, with what it alone would select."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxseek.plots import figure_for
from fxseek.reports.tokens import LEVELS, Scale, Tokens, check_place
from fxseek.selecting import select_topk

__all__ = ["draw"]

_MOST = 600
"""Tokens of a picture."""

_COLUMNS = 84
"""Characters of a line."""

_WIDTH, _LINE = 0.07, 0.2
"""Inches of a character and of a line."""

_TINTS = {"context": "#0b4fa8", "gradient": "#9a3a00"}
_SHADES = (0.0, 0.07, 0.15, 0.25, 0.36, 0.86, 1.0)
"""How much tint a level has; text is white on the last two."""


def draw(tokens: Tokens, path: str | Path | None, row: int, first: int) -> None:
    """Draw a row of tokens into a PNG or SVG file.

    Raises:
        InputError: the path ends in something else; there is no such row or position; matplotlib
            is not installed.
    """
    Figure = figure_for(path)
    assert path is not None  # which has no format
    batch, length = tokens.ids.shape
    check_place("row", row, batch)
    check_place("first", first, length)
    scales = [scale for scale in tokens.scales if scale.name != "combined"]
    positions = range(first, min(first + _MOST, length))
    words = [tokens.texts[number] for number in tokens.ids[row].tolist()]
    places = list(_places([words[i] for i in positions]))
    lines = max(line for line, _, _ in places) + 1
    size = (len(scales) * _COLUMNS * _WIDTH + 0.4, lines * _LINE + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    chosen = set(tokens.selected[row].nonzero().flatten().tolist())
    texts = [""] * lines
    for i, (line, _, _) in zip(positions, places, strict=True):
        texts[line] += words[i]
    leftwards = [*map(_leftwards, texts)]
    for panel, scale in zip(panels, scales, strict=True):
        alone = _alone(tokens, scale, row)
        for i, (line, column, width) in zip(positions, places, strict=True):
            start = _COLUMNS - column - width if leftwards[line] else column
            text = words[i].replace("\n", "")
            level = int(scale.levels[row, i])
            _token(panel, tokens, (row, i), (start, line, width), text, level, scale, i in alone)
        panel.set(xlim=(-0.5, _COLUMNS + 0.5), ylim=(lines + 0.2, -0.2), xticks=[], yticks=[])
        both = len(alone & chosen)
        panel.set_title(f"selected by {scale.name}: {len(alone)}, of which the step keeps {both}")
        _legend(panel, scale)
    of = "" if len(positions) == length else f", tokens {first} to {positions[-1]} of {length}"
    kept = tokens.kept_labelled(row)
    share = f"{kept[0]} of {kept[1]} labelled tokens kept; " if kept else ""
    figure.suptitle(
        f"step {tokens.report.step}, row {row}{of}: {share}"
        "framed: selected by the score alone, underlined: by the step, italic: without a label, "
        "grey: padding",
        fontsize="small",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(Glyph|Matplotlib currently)")  # drawn as boxes
        figure.savefig(path, dpi=150)


def _alone(tokens: Tokens, scale: Scale, row: int) -> set[int]:
    """What top-k would have kept of a row by one score alone, as many as the step did keep."""
    kept = int(tokens.selected[row].sum())
    if not kept:
        return set()
    one = slice(row, row + 1)
    found = select_topk(
        scale.exact[one],
        kept,
        valid=tokens.valid[one],
        supervised=None if tokens.labelled is None else tokens.labelled[one],
        spans=None if tokens.spans is None else tokens.spans[one],
    )
    return set(found.kept[0].tolist())


def _cells(text: str) -> int:
    """The width of a text in characters of a fixed-width font."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _places(words: list[str]) -> Iterator[tuple[int, int, int]]:
    """The line, the column and the width of each token."""
    line = column = 0
    for word in words:
        width = min(_cells(word.replace("\n", "")), _COLUMNS)
        if column + width > _COLUMNS:
            line, column = line + 1, 0
        yield line, column, width
        column += width
        if ends := word.count("\n"):
            line, column = line + ends, 0


def _leftwards(text: str) -> bool:
    """Whether the first character that has a direction runs from right to left."""
    kinds = (unicodedata.bidirectional(c) for c in text)
    return next((kind in ("R", "AL") for kind in kinds if kind in ("L", "R", "AL")), False)


def _shade(scale: Scale, level: int) -> tuple[Any, str]:
    """The colours of a level and of text on it."""
    from matplotlib.colors import to_rgb

    share = 0.0 if level < 0 else _SHADES[level]
    tint = to_rgb(_TINTS.get(scale.name, "#5b2a9d"))
    return [share * part + 1 - share for part in tint], "white" if share > 0.5 else "black"


def _token(
    panel: Any,
    tokens: Tokens,
    at: tuple[int, int],
    place: tuple[int, int, int],
    text: str,
    level: int,
    scale: Scale,
    framed: bool,
) -> None:
    from matplotlib.patches import Rectangle

    start, line, width = place
    fill, ink = _shade(scale, level)
    valid, selected = bool(tokens.valid[at]), bool(tokens.selected[at])
    panel.add_patch(Rectangle((start, line), width, 0.9, facecolor=fill, edgecolor="none"))
    if framed:
        frame = Rectangle(
            (start + 0.05, line), width - 0.1, 0.9, fill=False, edgecolor="black", lw=1.2, zorder=3
        )
        panel.add_patch(frame)
    if selected:
        panel.plot([start + 0.1, start + width - 0.1], [line + 0.84] * 2, color=ink, lw=1.2)
    labelled = tokens.labelled is None or bool(tokens.labelled[at])
    panel.text(
        start + width / 2,
        line + 0.45,
        text,
        ha="center",
        va="center",
        family=["monospace", "DejaVu Sans"],  # the second for letters that the first lacks
        fontsize=7.5,
        color=ink if valid else "#6b6b6b",
        style="normal" if labelled else "italic",
        weight="bold" if framed else "normal",
        parse_math=False,
        clip_on=True,
    )


def _legend(panel: Any, scale: Scale) -> None:
    """Each shade with its scores."""
    from matplotlib.patches import Patch

    assert len(_SHADES) == LEVELS
    handles = [
        Patch(
            facecolor=_shade(scale, band.level)[0],
            edgecolor="black",
            lw=0.4,
            label=f"{band.low:g} to {band.high:g}" if band.low < band.high else f"{band.low:g}",
        )
        for band in scale.bands
    ]
    panel.legend(
        handles=handles,
        title=scale.name,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        fontsize="x-small",
        frameon=False,
    )

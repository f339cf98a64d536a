"""The numbers of a step and the tokens of a row as Markdown, for what shows no pages."""

from __future__ import annotations

from fxseek.reports.tokens import Tokens

__all__ = ["markdown_of"]

_MOST = 1000
"""Tokens of a text."""


def markdown_of(tokens: Tokens, row: int) -> str:
    """A table of the scores, and the row with its selected tokens bold."""
    kept = tokens.kept_labelled()
    lines = [f"step {tokens.report.step}, {int(tokens.selected.sum())} tokens selected"]
    if kept is not None:
        lines[0] += f", {kept[0]} of {kept[1]} labelled tokens kept"
    lines += ["", "| score | from | to | tokens | selected |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {scale.name} | {band.low:g} | {band.high:g} | {band.tokens} | {band.selected} |"
        for scale in tokens.scales
        for band in scale.bands
    ]
    valid, selected = tokens.valid[row].tolist(), tokens.selected[row].tolist()
    words = [tokens.texts[number] for number in tokens.ids[row].tolist()]
    shown = [
        f"<strong>{_plain(word)}</strong>" if bold else _plain(word)
        for word, bold, is_valid in zip(words, selected, valid, strict=True)
        if is_valid
    ]
    more = " ..." if len(shown) > _MOST else ""
    return "\n".join([*lines, "", f"Row {row}: " + "".join(shown[:_MOST]) + more])


def _plain(text: str) -> str:
    """Text that is neither Markdown nor HTML, on one line."""
    return "".join(
        c if c.isalnum() or c == " " else " " if c == "\n" else f"&#{ord(c)};" for c in text
    )

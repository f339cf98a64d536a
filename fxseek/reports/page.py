"""One page that shows the tokens of a step, in a browser or in a notebook.

`page.html` is the page without data. The data are JSON in an element that no browser runs; the
page's script puts text into elements as text, and its policy allows no other script and no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from importlib import resources
from typing import Any

from torch import Tensor

from fxseek.reports.tokens import Scale, Tokens

__all__ = ["framed", "page_of"]

_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
_VALID, _LABELLED, _SELECTED = 1, 2, 4


def page_of(tokens: Tokens) -> str:
    """The page as text."""
    template = resources.files("fxseek.reports").joinpath("page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head, _, tail = template.replace("{{script}}", f"sha256-{digest}").partition("{{data}}")
    return head + _json(_data(tokens)) + tail


def framed(page: str, height: int) -> str:
    """A page in a frame of its own, for a notebook: neither's style or script reaches the other."""
    return (
        f'<div><iframe sandbox="allow-scripts" style="width:100%;height:{height}px;border:0" '
        f'srcdoc="{html.escape(page)}"></iframe></div>'
    )


def _json(data: Any) -> str:
    """JSON of ASCII alone, which no text in it can end: neither the element nor a line."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPED)


def _data(tokens: Tokens) -> dict[str, Any]:
    report = tokens.report
    place = {number: at for at, number in enumerate(sorted(tokens.texts))}
    loss = None if report.full_loss is None else float(report.full_loss)
    return {
        "step": report.step,
        "ratio": report.ratio,
        "score": report.score,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "saved": report.saved_bytes,
        "kept": tokens.kept_labelled(),
        "next": tokens.predicts_next,
        "counts": _counts(tokens, slice(None)),
        "texts": [tokens.texts[number] for number in place],
        "numbers": list(place),
        "scales": [
            {"name": scale.name, "bands": [vars(band) for band in scale.bands]}
            for scale in tokens.scales
        ],
        "rows": [_row(tokens, row, place) for row in range(len(tokens.ids))],
    }


def _row(tokens: Tokens, row: int, place: dict[int, int]) -> dict[str, Any]:
    selected = tokens.selected[row]
    return {
        "text": [place[number] for number in tokens.ids[row].tolist()],
        "labels": _labels(tokens, row),
        "state": "".join(map(str, _states(tokens, row))),
        "kept": tokens.kept_labelled(row),
        "counts": _counts(tokens, row),
        "weights": [float(f"{w:.4g}") for w in tokens.weights[row][selected].tolist()],
        "spans": _spans(tokens, row),
        "scales": [_of_row(scale, row) for scale in tokens.scales],
    }


def _labels(tokens: Tokens, row: int) -> list[int | None] | None:
    """The labels of a row, None where there is none: of tokens, or of other classes."""
    if tokens.labels is None or tokens.labelled is None:
        return None
    return _where(tokens.labelled[row], tokens.labels[row])


def _spans(tokens: Tokens, row: int) -> list[int | None] | None:
    """The span of each token of a row, None at padding."""
    if tokens.spans is None:
        return None
    return _where(tokens.valid[row], tokens.spans[row])


def _where(shown: Tensor, numbers: Tensor) -> list[int | None]:
    """Numbers of a row, None where they are not to be shown."""
    pairs = zip(numbers.tolist(), shown.tolist(), strict=True)
    return [number if is_shown else None for number, is_shown in pairs]


def _states(tokens: Tokens, row: int) -> list[int]:
    """What each token is, a digit."""
    valid, selected = tokens.valid[row], tokens.selected[row]
    labelled = valid if tokens.labelled is None else tokens.labelled[row]
    return (valid * _VALID + labelled * _LABELLED + selected * _SELECTED).tolist()


def _counts(tokens: Tokens, rows: int | slice) -> dict[str, int]:
    valid, selected = tokens.valid[rows], tokens.selected[rows]
    counts = {
        "tokens": int(valid.sum()),
        "padding": int((~valid).sum()),
        "selected": int(selected.sum()),
    }
    if tokens.labelled is not None:
        counts["unlabelled"] = int((valid & ~tokens.labelled[rows]).sum())
    return counts


def _of_row(scale: Scale, row: int) -> dict[str, Any]:
    values = [x if math.isfinite(x) else None for x in scale.values[row].tolist()]
    levels = "".join("-" if level < 0 else str(level) for level in scale.levels[row].tolist())
    return {"values": values, "ranks": scale.ranks[row].tolist(), "levels": levels}

"""`StepReport`: what the last training step selected, scored and saved."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxseek.checks import integer
from fxseek.errors import InputError
from fxseek.reports.markdown import markdown_of
from fxseek.reports.page import framed, page_of
from fxseek.reports.picture import draw
from fxseek.reports.tokens import check_place, tokens_of

__all__ = ["StepReport"]


@dataclass(frozen=True)
class StepReport:
    """What the last training step selected, scored and saved.

    `selected`: LongTensor[batch, kept], ascending; a row keeps its ratio of its own valid tokens
    (at ratio 1.0 all positions), and one that keeps fewer than another ends in -1. `weights`:
    FloatTensor[batch, kept], the loss weight of each (0 where there is none). `valid`:
    BoolTensor[batch, tokens], False at padding. `scores`: FloatTensor[batch, tokens]; `parts`: what
    they are made of, by name, of the same shape (``"context"``, ``"gradient"``), where the score
    measures any.
    `full_loss`: the loss over all labelled tokens in nats, None where scoring did not compute it.
    `saved_bytes`: bytes that autograd keeps for backward, parameters and buffers excluded, shared
    memory counted once. `tokens`: tokens of a row. `step`: how many steps were run before.
    `ratio`: the share of each row's tokens that the step was to keep, None where rows decide.
    `spans`: LongTensor[batch, tokens], the span that each token was selected with (equal numbers
    are a span), None where tokens are selected one by one. `timings`: seconds of each stage
    (prefill, score, select, gather, learn; backward is not one), where a `SeekCallback` with
    `timings` asks for them.
    `input_ids`: LongTensor[batch, tokens], -1 at virtual tokens, None where the model was given
    none. `labels`: LongTensor[batch, tokens], what the prediction made at each position is compared
    with, and `supervised`: BoolTensor[batch, tokens], where that counts; None where the step has no
    labels. `score`: what the tokens were ranked by: the name of the score, or of the function; None
    where nothing was ranked.
    """

    selected: Tensor
    weights: Tensor
    valid: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    full_loss: Tensor | None
    saved_bytes: int
    tokens: int
    step: int
    ratio: float | None
    spans: Tensor | None = None
    timings: dict[str, float] | None = None
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    supervised: Tensor | None = None
    score: str | None = None

    @property
    def context(self) -> Tensor | None:
        """The context score, None where the score does not use it."""
        return self.parts.get("context")

    @property
    def gradient(self) -> Tensor | None:
        """The gradient score, None where the score does not use it."""
        return self.parts.get("gradient")

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Which tokens are selected, and what each weighs in the loss: [batch, tokens] each."""
        weights = self.weights.new_zeros(len(self.selected), self.tokens + 1)
        at = self.selected.where(self.selected >= 0, self.tokens)  # -1: a place of its own
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, at, True)
        return chosen[:, :-1], weights.scatter_(1, at, self.weights)[:, :-1]

    def to_html(
        self,
        tokenizer: Any = None,
        path: str | Path | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> str:
        """One page with every token of every row, coloured by its scores; written to `path`, too.

        The page needs no network and no other file. It marks selected tokens, those without a label
        and padding; a switch picks the score; pointing at a token, or the arrow keys, show its
        numbers.

        Args:
            tokenizer: what made the ids: anything with ``decode(ids)`` or
                ``convert_ids_to_tokens(id)``.
            path: where the page is written.
            input_ids: Long[batch, tokens], -1 at virtual tokens, where the report has none.

        Raises:
            InputError: the step ranked nothing, or by random numbers; there is no tokenizer or no
                ids; the report has no values (meta device); or an argument is of the wrong type.
            OSError: the page cannot be written there.
        """
        if not isinstance(path, str | PathLike | None):
            raise InputError(f"path={path!r} must be a path, or None to write no file")
        page = page_of(tokens_of(self, tokenizer, input_ids))
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_markdown(
        self, tokenizer: Any = None, *, row: int = 0, input_ids: Tensor | None = None
    ) -> str:
        """The scores of a step as a table, and up to 1000 tokens of a row, selected ones bold.

        Args:
            tokenizer: as for `to_html`.
            row: the row of the batch.
            input_ids: as for `to_html`.

        Raises:
            InputError: as `to_html`; or there is no such row.
        """
        tokens = tokens_of(self, tokenizer, input_ids)
        check_place("row", row, len(tokens.ids))
        return markdown_of(tokens, row)

    def show(
        self, tokenizer: Any = None, *, height: int = 600, input_ids: Tensor | None = None
    ) -> None:
        """Show the page of `to_html` below a notebook's cell.

        Args:
            tokenizer: as for `to_html`.
            height: of the frame, in pixels.
            input_ids: as for `to_html`.

        Raises:
            InputError: as `to_html`; `height` is no number of pixels; or no notebook is running.
        """
        if problems := integer("height", height, 1, None):
            raise InputError(problems[0])
        try:
            from IPython.core.getipython import get_ipython  # pyright: ignore
            from IPython.display import HTML, display  # pyright: ignore
        except ImportError as error:
            raise InputError(
                "show() is for notebooks, and IPython is not installed: write a page by "
                "to_html(tokenizer, 'tokens.html'), and open it in a browser"
            ) from error
        if not hasattr(get_ipython(), "kernel"):  # None, or a terminal's, which shows no page
            raise InputError(
                "show() is for notebooks, and none is running: write a page by "
                "to_html(tokenizer, 'tokens.html'), and open it in a browser"
            )
        display(HTML(framed(self.to_html(tokenizer, input_ids=input_ids), height)))

    def plot(
        self,
        tokenizer: Any = None,
        path: str | Path | None = None,
        *,
        row: int = 0,
        first: int = 0,
        input_ids: Tensor | None = None,
    ) -> None:
        """Draw a row into a PNG or SVG file, with a panel for each score.

        "Selected by context" frames the tokens that top-k would keep by the context alone, as many
        as the step did keep, whatever its other options were (``supervised_only``, ``select``,
        ``sinks``); what it did keep is underlined. Up to 600 tokens are drawn. Characters that
        matplotlib's font lacks are drawn as boxes.

        Args:
            tokenizer: as for `to_html`.
            path: where the picture is written, ending in ``.png`` or ``.svg``; required.
            row: the row of the batch.
            first: the position that the picture begins at.
            input_ids: as for `to_html`.

        Raises:
            InputError: as `to_html`; the path ends in something else; there is no such row or
                position; or matplotlib is not installed.
            OSError: the picture cannot be written there.

        Source: TokenSeek, arXiv 2601.19739, whose figure has these two panels.
        """
        draw(tokens_of(self, tokenizer, input_ids), path, row, first)

"""The tokens of a step with all that is shown of them, in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.errors import InputError
from fxseek.reports.texts import check_tokenizer, texts_of
from fxseek.selecting import ranking_of

if TYPE_CHECKING:
    from fxseek.reports.step import StepReport

__all__ = ["LEVELS", "Band", "Scale", "Tokens", "check_place", "tokens_of"]

LEVELS = 7
"""Shades that scores are coloured by."""

_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
"""Where shades begin, as shares of the tokens: of the best there are more, for they are few."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_DIGITS = 4
"""Significant digits of a score."""


@dataclass(frozen=True)
class Band:
    """The tokens of one shade: the `level` of it, from 0, their scores, how many they are."""

    level: int
    low: float
    high: float
    tokens: int
    selected: int


@dataclass(frozen=True)
class Scale:
    """A score of all tokens. Shapes: [batch, tokens].

    `values`: as they are shown, and `exact` as they are; `ranks`: from 1 for the best valid token
    of a row, 0 at padding; `levels`: of the token's band, -1 where it has none; `bands`: ascending.
    """

    name: str
    values: Tensor
    exact: Tensor
    ranks: Tensor
    levels: Tensor
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a step. Shapes: [batch, tokens]; `labelled` None where nothing is known."""

    report: StepReport
    texts: dict[int, str]
    ids: Tensor
    valid: Tensor
    labelled: Tensor | None
    labels: Tensor | None
    selected: Tensor
    weights: Tensor
    spans: Tensor | None
    scales: tuple[Scale, ...]

    @property
    def predicts_next(self) -> bool:
        """Whether each label is the id of the next token, as in a language model."""
        if self.labels is None or self.labelled is None:
            return False
        wrong = self.labels[:, :-1] != self.ids[:, 1:]
        return not bool((wrong & self.labelled[:, :-1]).any() | self.labelled[:, -1].any())

    def kept_labelled(self, row: int | None = None) -> tuple[int, int] | None:
        """How many labelled tokens of a row, or of all, were selected, and how many there are."""
        if self.labelled is None:
            return None
        rows = slice(None) if row is None else row
        labelled = self.labelled[rows]
        return int((labelled & self.selected[rows]).sum()), int(labelled.sum())


def tokens_of(report: StepReport, tokenizer: Any, input_ids: Tensor | None = None) -> Tokens:
    """Gather what is shown of a report. Waits for its device.

    Raises:
        InputError: the step ranked nothing, or by random numbers; there is no tokenizer or no ids;
            the report has no values.
    """
    _check_scored(report)
    tokenizer = check_tokenizer(tokenizer)
    shown = (report.valid, report.selected, report.scores, *report.parts.values())
    given = (report.input_ids, report.labels, report.supervised, input_ids)
    if not all(_torch.has_values(x) for x in (*shown, *given) if isinstance(x, Tensor)):
        raise InputError(
            "the report's tensors have no values (they are on the meta device): report a step that "
            "ran on a real device"
        )
    valid = report.valid.cpu()
    ids = _ids(report, input_ids).cpu()
    labelled = labels = None
    if report.supervised is not None:
        labelled = report.supervised.cpu() & valid
    if report.labels is not None and labelled is not None:
        labels = report.labels.cpu()
    selected, weights = (x.cpu() for x in report.by_position())
    selected &= valid  # a step at ratio 1.0 keeps padding, too
    scored = dict(report.parts)
    if report.score not in scored:  # "context" and "gradient" rank as their one part does
        scored["combined" if scored else "score"] = report.scores
    return Tokens(
        report,
        texts_of(tokenizer, ids.unique().tolist()),
        ids,
        valid,
        labelled,
        labels,
        selected,
        weights.float(),
        None if report.spans is None else report.spans.cpu(),
        tuple(_scale(name, part.cpu(), valid, selected) for name, part in scored.items()),
    )


def check_place(name: str, at: int, size: int) -> None:
    """There must be such a row or position.

    Raises:
        InputError: there is none.
    """
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < size:
        raise InputError(f"{name}={at!r} must be an integer from 0 to {size - 1}")


def _check_scored(report: StepReport) -> None:
    if report.parts or report.score not in (None, "random"):
        return
    if report.score == "random":
        why, remedy = 'score="random" draws tokens and measures none', 'score="tokenseek"'
    else:
        why = "the step kept every token, or every one with a label, and ranked none"
        remedy = "ratio=0.1"
    raise InputError(
        f"there are no scores to show: {why}. report.selected has the positions; compile with "
        f"{remedy} to see scores."
    )


def _ids(report: StepReport, given: Tensor | None) -> Tensor:
    """The ids of the step, or those that are given in their place, Long[batch, tokens]."""
    if given is None:
        if report.input_ids is None:
            raise InputError(
                "the report has no input_ids: the model was given embeddings, names its ids "
                "otherwise, or makes them of labels. The report's methods take them: input_ids=, "
                "of shape [batch, tokens], -1 at virtual tokens."
            )
        return report.input_ids
    is_tensor = isinstance(given, Tensor)
    if not is_tensor or given.dtype not in _INTEGERS or given.shape != report.valid.shape:
        got = f"{given.dtype}, {list(given.shape)}" if is_tensor else type(given).__name__
        raise InputError(
            f"input_ids= must be integers of shape [batch, tokens] = {list(report.valid.shape)}, "
            f"those of the reported step, -1 at virtual tokens; got {got}"
        )
    return given.long()


def _scale(name: str, values: Tensor, valid: Tensor, selected: Tensor) -> Scale:
    exact, ranks = values.detach(), _ranks(values, valid)
    values = _rounded(exact.double())
    shown = valid & values.isfinite()
    levels, bands = _bands(values, shown, selected)
    return Scale(name, values, exact, ranks, levels.masked_fill(~shown, -1), bands)


def _ranks(values: Tensor, valid: Tensor) -> Tensor:
    """From 1 for the best valid token of a row; equal ones by position, as they are selected."""
    order = ranking_of(values, valid.long())
    places = torch.arange(1, values.shape[-1] + 1, device="cpu").expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places).masked_fill(~valid, 0)


def _rounded(values: Tensor) -> Tensor:
    """To the digits that are shown, so that a band's limits are those of its tokens."""
    numbers = [float(f"{value:.{_DIGITS}g}") for value in values.flatten().tolist()]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(values.shape)


def _bands(values: Tensor, shown: Tensor, selected: Tensor) -> tuple[Tensor, tuple[Band, ...]]:
    """The level of each token, and the bands of the scores that are shown."""
    ascending = values[shown].sort().values
    if not len(ascending):
        return torch.zeros_like(values, dtype=torch.int64), ()
    starts = [ascending[round(share * (len(ascending) - 1))] for share in _SHARES]
    edges = torch.stack([ascending[0], *starts]).unique()[1:]  # equal scores share a band
    number = torch.searchsorted(edges, values, right=True)
    bands = []
    for at in range(len(edges) + 1):
        inside = shown & (number == at)
        found = values[inside]
        level = round(at * (LEVELS - 1) / max(len(edges), 1))
        few = int((inside & selected).sum())
        bands.append(Band(level, float(found.min()), float(found.max()), len(found), few))
    levels = torch.tensor([band.level for band in bands], device="cpu")
    return levels[number], tuple(bands)

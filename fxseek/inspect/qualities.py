"""What `fxseek.gradient_quality` has found: a table, a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fxseek.errors import InputError
from fxseek.plots import figure_for

__all__ = ["Choice", "GradientQuality"]


@dataclass(frozen=True)
class Choice:
    """One way to select, against the gradient of all tokens, over all batches.

    `span`: as it was asked for; `longest_span`: tokens of the longest that was cut. `cosine`: of
    one draw with the full gradient; `expected_cosine`: of the expected gradient, from few draws a
    rough estimate, as `bias` is. `bias`: the norm of the expected gradient less the full one, and
    `noise`: the standard deviation of a draw around the expected gradient, both as shares of the
    full gradient's norm; where nothing is drawn there is no noise. A bias that is smaller than what
    the noise leaves in the mean of the draws is NaN, and the expected cosine with it. `seconds`: of
    a step, forward and backward, the median; `saved_bytes`: what autograd keeps for the backward;
    `peak_bytes`: the allocator's, None on a CPU.
    """

    ratio: float | str
    span: int
    longest_span: int
    cosine: float
    expected_cosine: float
    bias: float
    noise: float
    seconds: float
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class GradientQuality:
    """What `gradient_quality` found; print it, or `plot` it.

    `between_batches`: the mean cosine between the full gradients of two batches that follow each
    other, the yardstick: a step on one batch is as far from the other's. None with one batch.
    `ordinary`: the full gradient as a choice, in parts where `in_parts`. `choices`: what was
    measured of each way to select, on so many `batches` with so many `draws` of each.
    """

    choices: tuple[Choice, ...]
    ordinary: Choice
    between_batches: float | None
    batches: int
    draws: int
    in_parts: bool

    def __str__(self) -> str:
        """A table for a person."""
        head = ("ratio", "span", "cosine", "expected", "bias", "noise", "s/step", "saved", "peak")
        rows = [head, *(_cells(choice) for choice in (self.ordinary, *self.choices))]
        if self.ordinary.peak_bytes is None:
            rows = [row[:-1] for row in rows]
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        title = "fxseek: gradients of selected tokens against all"
        lines.insert(0, f"{title}, {batches}, up to {self.draws} draws each")
        if self.between_batches is not None:
            lines.append(f"cosine between two batches: {_shown(self.between_batches)}")
        if any("?" in row for row in rows) or "?" in lines[-1]:
            lines.append("?: drowned in the noise of the draws; more draws or batches will tell")
        if any(choice.longest_span < choice.span for choice in self.choices):
            lines.append("8 (3): spans of 8 were asked for, the longest that a row allowed had 3")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the cosines by ratio, one line for each span, into a PNG or SVG file.

        Raises:
            InputError: no choice has a number as ratio, the path ends in something else, or
                matplotlib is not installed.
        """
        Figure = figure_for(path)
        numbers = [choice for choice in self.choices if isinstance(choice.ratio, float)]
        if not numbers:
            raise InputError("no choice has a number as ratio: there is nothing to draw along it")
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, name, title in zip(
            panels, ("cosine", "expected_cosine"), ("one draw", "expected gradient"), strict=True
        ):
            for span in sorted({choice.span for choice in numbers}):
                line = sorted(
                    (choice for choice in numbers if choice.span == span),
                    key=lambda choice: float(choice.ratio),
                )
                label = "single tokens" if span == 1 else f"spans of {span}"
                ratios = [choice.ratio for choice in line]
                panel.plot(ratios, [getattr(x, name) for x in line], marker="o", label=label)
            if self.between_batches is not None:
                panel.axhline(self.between_batches, color="grey", ls=":", label="another batch")
            panel.set(title=title, xlabel="ratio", ylim=(None, 1.0))
        panels[0].set_ylabel("cosine with the full gradient")
        panels[0].legend(frameon=False)
        figure.savefig(path)


def _cells(choice: Choice) -> tuple[str, ...]:
    numbers = (choice.cosine, choice.expected_cosine, choice.bias, choice.noise)
    shortened = f" ({choice.longest_span})" if choice.longest_span < choice.span else ""
    return (
        str(choice.ratio),
        f"{choice.span}{shortened}",
        *map(_shown, numbers),
        f"{choice.seconds:.3g}",
        f"{choice.saved_bytes / 2**20:.1f} MiB",
        "" if choice.peak_bytes is None else f"{choice.peak_bytes / 2**20:.0f} MiB",
    )


def _shown(number: float) -> str:
    return "?" if math.isnan(number) else f"{number:.3f}"

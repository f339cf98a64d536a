"""The benchmark's plots: step time and peak memory by length, one line a way, as SVG files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import benchmark_page
import common
import ways
from benchmark_page import Parts, Quantity

# Colour, dashes and marker of each way's line; a lean way is the dashed line of its colour.
LINES = {
    "ordinary": ("#000000", "-", "o"),
    "checkpointing": ("#666666", "-", "s"),
    "checkpointing-chunked": ("#666666", "-.", "D"),
    "partitioner": ("#666666", "--", "^"),
    "inductor": ("#666666", ":", "v"),
    "chunked": ("#000000", ":", "D"),
    "tokentune": ("#b8860b", "-", "o"),
    "published": ("#b8860b", "--", "s"),
    "random": ("#1b9e77", "-", "o"),
    "random-lean": ("#1b9e77", "--", "o"),
    "context": ("#7570b3", "-", "s"),
    "context-lean": ("#7570b3", "--", "s"),
    "tokenseek": ("#d95f02", "-", "^"),
    "tokenseek-lean": ("#d95f02", "--", "^"),
}
# Text stays text, and neither dates nor random ids make two files of the same numbers differ.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fxseek",
    "font.size": 8,
    "font.family": "sans-serif",
    "path.simplify": True,
}


def write(folder: Path, name: str, parts: Parts, options: argparse.Namespace) -> list[str]:
    """Write the two files, and return the Markdown that shows them."""
    shown: list[tuple[str, str, Quantity, float]] = [
        ("time", "seconds / step", benchmark_page.step, 1.0),
        ("peak", "peak MiB above weights and gradients", benchmark_page.peak, common.MIB),
    ]
    lines = []
    for what, label, quantity, unit in shown:
        file = folder / f"{name}-{what}.svg"
        plot(file, label, quantity, unit, parts, options)
        lines.append(f"![{label}, by tokens of a row]({file.name})")
    return lines


def plot(
    file: Path,
    label: str,
    quantity: Quantity,
    unit: float,
    parts: Parts,
    options: argparse.Namespace,
) -> None:
    """One panel for each kind of tuning, both axes logarithmic."""
    # Not pyplot: nothing here needs a display or global state.
    import matplotlib
    from matplotlib.figure import Figure

    tunings = [tuning for tuning in options.tunings if any(name == tuning for name, _ in parts)]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(3.2 * len(tunings) + 2.2, 3.2), layout="constrained")
        panels = figure.subplots(1, len(tunings), sharey=True, squeeze=False)[0]
        for panel, tuning in zip(panels, tunings, strict=True):
            draw(panel, tuning, quantity, unit, parts)
            panel.set_title(benchmark_page.TUNINGS[tuning])
        panels[0].set_ylabel(label)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def draw(panel: Any, tuning: str, quantity: Quantity, unit: float, parts: Parts) -> None:
    from matplotlib.ticker import LogLocator

    lengths = sorted(tokens for name, tokens in parts if name == tuning)
    for way, (colour, dashes, marker) in LINES.items():
        points = [
            (tokens, quantity(result) / unit)
            for tokens in lengths
            if (result := parts[tuning, tokens].get(way)) is not None and not result.failed
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            panel.plot(
                xs, ys, dashes, color=colour, marker=marker, markersize=3, linewidth=1.1,
                label=ways.WAYS[way]["name"],
            )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, [str(tokens) for tokens in lengths])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("tokens of a row")
    panel.grid(True, color="#dddddd", linewidth=0.5)

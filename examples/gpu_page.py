"""What the GPU benchmark measured: its points as lines of JSON, its page, and its plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
from common import ExampleError

GIB = 2**30
COLOURS = {"ordinary": "#000000", "checkpointing": "#666666", "1.0": "#d95f02", "0.5": "#7570b3",
           "0.1": "#1b9e77"}  # fmt: skip
DASHES = {"": "-", "lean": ":", "kept": "-.", "offload": "--"}
HEAD = """# On a GPU

`python examples/gpu.py` measures this page: models with random weights in the shapes of published
ones, bfloat16, one row of random tokens, every token labelled, a step with fused AdamW. LoRA has
rank 16 on all linear layers but the head; "qlora" stores these in NF4. "checkpointing" is gradient
checkpointing of every layer, with the head and the loss on 256 tokens at a time; "1.0", "0.5" and
"0.1" are fxseek at that ratio, the latter two with TokenSeek; "lean" has smaller parts, "kept" adds
`recompute="none"`, "offload" adds `recompute="block", kv="offload"`. The peak is that of torch's
allocator, weights included; in brackets is what `fxseek.estimate` says. A step that takes less than
10 s is timed at its second run, a longer one at its first, in which memory is still taken from the
driver.

The H100's points are older. Its parts ran flash attention, those of the H200 run cuDNN's
([how](architecture.md#prefill-score-learn-and-lifetimes)); and its steps of more than 2 s were
timed at their first run. The H200's are second and third runs of this program's steps, from a
script that profiled them as well, with peaks rounded to 0.01 GiB.
"""


@dataclasses.dataclass(frozen=True)
class Point:
    """A step of a model, a way and a length; `seconds` is None where memory ran out."""

    card: str
    torch: str
    model: str
    way: str
    tokens: int
    seconds: float | None
    peak: int
    options: dict[str, Any]
    estimate: int = 0

    def __str__(self) -> str:
        where = f"{self.model}, {self.way}, {self.tokens} tokens"
        if self.seconds is None:
            return f"{where}: out of memory"
        guess = f", estimate {self.estimate / GIB:.2f} GiB" if self.estimate else ""
        return f"{where}: {self.seconds:.2f} s, {self.peak / GIB:.2f} GiB{guess}"


def kernels_of(point: Point) -> str:
    """The device whose attention kernels `fxseek.estimate` is to take."""
    if point.card == "CPU":
        return "cpu"
    return "hopper" if any(name in point.card for name in ("H100", "H200", "B200")) else "cuda"


def read(file: Path) -> list[Point]:
    """The points of a file; none where there is no file.

    Raises:
        ExampleError: a line is no point.
    """
    if not file.exists():
        return []
    points = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line:
            continue
        try:
            points.append(Point(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ExampleError(f"{file}, line {number} is no point ({error}): remove it") from error
    return points


def write(file: Path, point: Point) -> None:
    """Add a point to a file."""
    common.append_line(file, dataclasses.asdict(point))


def rewrite(file: Path, points: Iterable[Point]) -> None:
    """A file of these points alone."""
    text = "".join(json.dumps(dataclasses.asdict(point)) + "\n" for point in points)
    file.write_text(text, encoding="utf-8")


def page(points: Sequence[Point], file: Path) -> None:
    """Write the page, and the plots beside it.

    Raises:
        ExampleError: there are no points.
    """
    if not points:
        raise ExampleError("there are no points to show: measure some, or name their file by --out")
    sections = [HEAD]
    for card, version in dict.fromkeys((point.card, point.torch) for point in points):
        mine = [point for point in points if (point.card, point.torch) == (card, version)]
        sections.append(f"## {card}, torch {version}\n")
        for model in dict.fromkeys(point.model for point in mine):
            some = [point for point in mine if point.model == model]
            name = f"{file.stem}-{card}-{version}-{model}".lower().replace(" ", "-") + ".svg"
            plot(some, file.parent / name)
            sections += [
                f"### {model}\n",
                "\n".join(table(some)) + "\n",
                f"![Seconds and peak GiB of a step, by tokens]({name})\n",
            ]
    file.write_text("\n".join(sections), encoding="utf-8")


def table(points: Sequence[Point]) -> list[str]:
    """Rows are ways, columns lengths: seconds and peak GiB, and the estimate of the peak."""
    lengths = sorted({point.tokens for point in points})
    lines = [
        "| seconds; peak in GiB (estimate) | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for way, given in dict.fromkeys((point.way, settings(point)) for point in points):
        mine = [point for point in points if (point.way, settings(point)) == (way, given)]
        cells = {point.tokens: cell(point) for point in mine}
        lines.append(f"| {way}{given} | " + " | ".join(cells.get(n, "") for n in lengths) + " |")
    return lines


def settings(point: Point) -> str:
    """The size of its parts, where it has any."""
    chunk = point.options.get("learn_chunk")
    return f", parts of {chunk}" if chunk else ""


def cell(point: Point) -> str:
    if point.seconds is None:
        return "out of memory"
    guess = f" ({point.estimate / GIB:.1f})" if point.estimate else ""
    return f"{point.seconds:.2f}; {point.peak / GIB:.1f}{guess}"


def plot(points: Sequence[Point], file: Path) -> None:
    """Seconds and peak by length, one line a way; the offloaded ones are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxseek", "font.size": 8}):
        figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for way in dict.fromkeys(point.way for point in points):
            ratio, _, kind = way.partition(" ")
            done = [point for point in points if point.way == way and point.seconds is not None]
            style = {
                "color": COLOURS[ratio], "linestyle": DASHES[kind], "marker": "o",
                "markersize": 3, "label": way,
            }  # fmt: skip
            tokens = [point.tokens for point in done]
            times.plot(tokens, [point.seconds for point in done], **style)
            peaks.plot(tokens, [point.peak / GIB for point in done], **style)
        for axes, label in ((times, "seconds of a step"), (peaks, "peak GiB, weights included")):
            axes.set_xscale("log", base=2)
            if all(point.peak for point in points if point.seconds):  # the CPU has no allocator
                axes.set_yscale("log", base=2)
            axes.set_xlabel("tokens of the row")
            axes.set_ylabel(label)
        peaks.legend(fontsize=7)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)

"""What the benchmark writes: tables, targets and growth, between the markers of their setting."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

import common
import ways
from common import ExampleError

TUNINGS = {"full": "Full-parameter", "lora": "LoRA (r = 16, all linear layers)"}


@dataclass
class Measured:
    """One way's numbers. ``first`` is the step that captures and rewrites the graph.

    ``again`` is a second step of the same row, where that is a shorter one than the timed steps'.
    ``failed`` is why there are none.
    """

    first: float = 0.0
    again: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    peak_bytes: int = 0
    failed: str = ""

    @property
    def step(self) -> float:
        """The median step, in seconds."""
        return statistics.median(self.seconds)

    @property
    def capture(self) -> float:
        """What the first step took beyond another of the same row, in seconds."""
        return max(0.0, self.first - statistics.median(self.again or self.seconds))


Part = dict[str, Measured]  # of each way, at one length and tuning
Parts = Mapping[tuple[str, int], Part]  # by tuning and tokens


def setting_key(options: argparse.Namespace) -> str:
    """All that numbers depend on but tuning and length."""
    model = common.find_model(options.model).name
    parts = [model, options.device, options.dtype, options.backend]
    ratio = "in parts" if options.in_parts else f"ratio {options.ratio}"
    return " ".join([*parts, f"batch {options.batch}", ratio])


def key(options: argparse.Namespace) -> str:
    """The name of a setting's markers: another run of the same setting takes its place."""
    tunings, tokens = ",".join(options.tunings), ",".join(map(str, options.tokens))
    return f"{setting_key(options)} {tunings} tokens {tokens}"


def write(path: Path, parts: Parts, options: argparse.Namespace) -> None:
    """Put what there is so far into the page, and plots beside it if there are two lengths."""
    plots: list[str] = []
    if len({tokens for _, tokens in parts}) > 1 and not options.in_parts:
        import benchmark_plots

        name = "benchmark-" + re.sub(r"[^\w.]+", "-", key(options))  # no two settings share a plot
        plots = benchmark_plots.write(path.parent, name, parts, options)
    page = path.read_text(encoding="utf-8")
    path.write_text(put(page, key(options), text(parts, options, plots)), encoding="utf-8")


def put(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers called ``name``, added at the end if missing."""
    begin, end = f"<!-- measured: {name} -->", "<!-- end of measured -->"
    block = f"{begin}\n\n{text}\n\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    before, rest = page.split(begin, 1)
    if end not in rest:
        raise ExampleError(f"the page has {begin!r} and no {end!r} after it: put the marker back")
    return before + block + rest.split(end, 1)[1]


def text(parts: Parts, options: argparse.Namespace, plots: list[str] | None = None) -> str:
    """Everything about one setting, as Markdown."""
    sections = [setting(parts, options), *(plots or [])]
    judge = part_targets if options.in_parts else targets
    if (judged := judge(parts, options)) is not None:
        sections.append(f"**Targets**\n\n{judged}")
    for tuning in options.tunings:
        lengths = [tokens for name, tokens in parts if name == tuning]
        if len(lengths) > 1:
            sections.append(f"**{TUNINGS[tuning]}: bytes per token**\n\n{growth(tuning, parts)}")
    sections += [section(tuning, tokens, part, options) for (tuning, tokens), part in parts.items()]
    return "\n\n".join(sections)


def setting(parts: Parts, options: argparse.Namespace) -> str:
    """Machine, versions and command, as a reader needs them to run it again."""
    source = common.find_model(options.model)
    counts = sorted({len(way.seconds) for part in parts.values() for way in part.values()} - {0})
    share = "in parts" if options.in_parts else f"ratio {options.ratio}"
    tunings = " and ".join(TUNINGS[tuning].split(" (")[0] for tuning in options.tunings)
    title = f"{source.name}, {options.device}, {share}: {tunings}, {span(options.tokens)} tokens"
    return (
        f"### {title}\n\n"
        f"Batch {options.batch}, {options.dtype}, {share}, "
        f"fxseek's learn stage run by `{options.backend}`; "
        f"{'one step each' if counts == [1] else f'medians of {span(counts)} steps'}.\n\n"
        f"Machine: {machine(options)}. Versions: {versions()}. Command: `{options.command}`."
    )


def machine(options: argparse.Namespace) -> str:
    if options.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def versions() -> str:
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    named = [f"{name} {version}" for name, version in found.items()]
    return ", ".join([f"Python {platform.python_version()}", *named])


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest of ascending numbers; one where there is one."""
    return " to ".join(map(str, [*numbers[:1], *numbers[1:][-1:]]))


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------ tables


def section(tuning: str, tokens: int, part: Part, options: argparse.Namespace) -> str:
    """The table of one length and kind of tuning, and why ways are missing from it."""
    header = ["", "s / step", "of ordinary", "tokens / s", "saved MiB", "of ordinary"]
    header += ["peak MiB", "of ordinary", "capture s"]
    rows, missing = [], []
    for way, result in part.items():
        name = ways.WAYS[way]["name"]
        if result.failed:
            rows.append([name, *["–"] * (len(header) - 1)])
            missing.append(f"{name}: {result.failed}.")
            continue
        row = [
            name,
            f"{result.step:.2f}",
            cell(part, way, "ordinary", step, "{:.2f}×"),
            f"{options.batch * tokens / result.step:.0f}",
            f"{result.saved_bytes / common.MIB:.0f}",
            cell(part, way, "ordinary", saved, "{:.1%}"),
            f"{result.peak_bytes / common.MIB:.0f}",
            cell(part, way, "ordinary", peak, "{:.1%}"),
            f"{result.capture:.1f}" if ways.captures(way) else "",
        ]
        rows.append(row)
    title = f"**{TUNINGS[tuning]}, {tokens} tokens**"
    return "\n\n".join([title, common.table(header, rows), *missing])


def step(result: Measured) -> float:
    return result.step


def saved(result: Measured) -> float:
    return result.saved_bytes


def peak(result: Measured) -> float:
    return result.peak_bytes


Quantity = Callable[[Measured], float]


def share(part: Part, way: str, of: str, quantity: Quantity) -> float | None:
    """A way's quantity as a share of another's; None where one of them is missing or 0."""
    one, other = part.get(way), part.get(of)
    if one is None or other is None or one.failed or other.failed or not quantity(other):
        return None
    return quantity(one) / quantity(other)


def cell(part: Part, way: str, of: str, quantity: Quantity, form: str) -> str:
    value = share(part, way, of, quantity)
    return "" if value is None else form.format(value)


def growth(tuning: str, parts: Parts) -> str:
    """KiB per token at the shortest length and at the longest, of every way."""
    lengths = sorted(tokens for name, tokens in parts if name == tuning)
    ends = (lengths[0], lengths[-1])
    header = [""]
    header += [f"{what} KiB / token at {end}" for what in ("saved", "peak") for end in ends]
    rows = []
    for way in parts[tuning, ends[0]]:
        row = [ways.WAYS[way]["name"]]
        for quantity in (saved, peak):
            for end in ends:
                result = parts[tuning, end].get(way)
                if result is None or result.failed:
                    row.append("–")
                else:
                    row.append(f"{quantity(result) / end / 1024:.1f}")
        rows.append(row)
    return common.table(header, rows)


# ----------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What the project set out to reach: a way's quantity as a share of another way's."""

    what: str
    way: str
    of: str
    quantity: Quantity
    most: float
    form: str


TARGET_TOKENS = 1024
PART_TARGET_TOKENS = 2048
TARGETS = [
    Target("step", "random", "ordinary", step, 0.38, "{:.2f}×"),
    Target("step", "tokenseek", "ordinary", step, 0.48, "{:.2f}×"),
    Target("step", "tokenseek", "checkpointing", step, 0.45, "{:.2f}×"),
    *(Target("saved", way, "ordinary", saved, 0.05, "{:.1%}") for way in ways.LEAN),
    *(Target("peak", way, "ordinary", peak, 0.15, "{:.1%}") for way in ways.OURS),
]
# Bytes per token at the longest length, as a share of those at the shortest, but for rounding.
GROWTH_TARGET = 1.01
CAPTURE_TARGET = 25.0  # seconds


def targets(parts: Parts, options: argparse.Namespace) -> str | None:
    """Each target, and whether each kind of tuning reaches it; None at any other setting.

    They were set for the default model on the CPU, float32, batch 1, ratio 0.1.
    """
    given = (options.model, options.device, options.dtype, options.batch, options.ratio)
    tunings = [tuning for tuning in options.tunings if (tuning, TARGET_TOKENS) in parts]
    if given != (None, "cpu", "float32", 1, 0.1) or not tunings:
        return None
    rows = []
    for target in TARGETS:
        limit = target.form.format(target.most)
        names = [ways.WAYS[way]["name"] for way in (target.way, target.of)]
        row = [f"{names[0]}: {target.what} ≤ {limit} of {names[1]}"]
        for tuning in tunings:
            part = parts[tuning, TARGET_TOKENS]
            value = share(part, target.way, target.of, target.quantity)
            row.append(verdict(value, target.most, target.form))
        rows.append(row)
    captures = [f"tokenseek: capture ≤ {CAPTURE_TARGET:.0f} s"]
    for tuning in tunings:
        result = parts[tuning, TARGET_TOKENS].get("tokenseek")
        seconds = None if result is None or result.failed else result.capture
        captures.append(verdict(seconds, CAPTURE_TARGET, "{:.1f} s"))
    rows.append(captures)
    for what, quantity in (("saved", saved), ("peak", peak)):
        grown = [largest_growth(tuning, parts, quantity) for tuning in tunings]
        name = f"fxseek, each way: {what} bytes per token constant or falling with length"
        rows.append([name, *(verdict(value, GROWTH_TARGET, "{:.2f}×") for value in grown)])
    return common.table([f"At {TARGET_TOKENS} tokens", *tunings], rows)


def part_targets(parts: Parts, options: argparse.Namespace) -> str | None:
    """The targets of learning in parts, and whether each part size reaches them with LoRA."""
    rows = []
    for (tuning, tokens), part in parts.items():
        if tuning != "lora" or tokens < PART_TARGET_TOKENS:
            continue
        for size in ways.SIZES:
            every, half = f"parts-1.0-{size}", f"parts-0.5-{size}"
            judged = [
                (share(part, every, "checkpointing", peak), 0.35, "{:.2f}×"),
                (share(part, every, "checkpointing", step), 1.05, "{:.2f}×"),
                (share(part, half, "ordinary", step), 1.0, "{:.2f}×"),
                (share(part, half, every, peak), 1.0, "{:.2f}×"),
            ]
            rows.append([f"{tokens} tokens, parts of {size}", *(verdict(*one) for one in judged)])
    header = ["LoRA", "ratio 1.0: peak ≤ 0.35× of checkpointing"]
    header += ["step ≤ 1.05× of checkpointing", "ratio 0.5: step ≤ 1.00× of ordinary"]
    header += ["peak ≤ that of 1.0"]
    return common.table(header, rows) if rows else None


def verdict(value: float | None, most: float, form: str) -> str:
    if value is None:
        return "not measured"
    return f"{form.format(value)}: {'yes' if value <= most else '**no**'}"


def largest_growth(tuning: str, parts: Parts, quantity: Quantity) -> float | None:
    """Bytes per token at the longest length over those at the shortest: the worst of our ways."""
    lengths = sorted(tokens for name, tokens in parts if name == tuning)
    first, last = parts[tuning, lengths[0]], parts[tuning, lengths[-1]]
    both = [way for way in ways.OURS if way in first and way in last]
    grown = [
        quantity(last[way]) / quantity(first[way]) * lengths[0] / lengths[-1]
        for way in both
        if not first[way].failed and not last[way].failed and quantity(first[way])
    ]
    return max(grown) if grown and len(lengths) > 1 else None

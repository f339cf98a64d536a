"""`fxseek.compare_memory`: where the memory of a step goes, by tuning, batch and way to train."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxseek.checks import integer, shown
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError
from fxseek.inspect.estimate import Estimate, estimate
from fxseek.inspect.memory import unit_of
from fxseek.inspect.meta import check_tuning, name_of, tunings_of
from fxseek.plots import figure_for

__all__ = ["MemoryBar", "MemoryComparison", "compare_memory"]

PARTS: tuple[str, ...] = ("parameters", "gradients and optimiser state", "activations")
"""What a bar is stacked of."""

_OWNED = {"parameters": 0, "gradients": 1, "optimiser state": 1}
"""Categories of an estimate by part; all others are the last."""

_COLOURS = ("#4c566a", "#d08770", "#5e9ccf")


@dataclass(frozen=True)
class MemoryBar:
    """The memory of one step: a tuning, a number of rows, and a way to train.

    `tuning` and `batch`: as they were given; `way`: ``"ordinary"``, ``"checkpointing"``, or fxseek
    with its ratio; `estimate`: of the step.
    """

    tuning: str
    batch: int
    way: str
    estimate: Estimate

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each of `PARTS` at the peak; they add up to it."""
        found = dict.fromkeys(PARTS, 0)
        for category, size in self.estimate.at_peak.items():
            found[_part(category)] += size
        return found

    @property
    def most_activations(self) -> int:
        """The most bytes that activations and all that is no weight, gradient or state take."""
        now = most = 0
        for category, change in self.estimate.changes:
            if _part(category) == PARTS[-1]:
                now += change
                most = max(most, now)
        return most


@dataclass(frozen=True)
class MemoryComparison:
    """What `compare_memory` found: its `bars`; print it as a Markdown table, or `plot` it.

    `model`: its class, or the name of its configuration; `tokens` of each row; `device`: the type
    of the device.
    """

    bars: tuple[MemoryBar, ...]
    model: str
    tokens: int
    device: str

    def __str__(self) -> str:
        """A Markdown table that lines up in a terminal too."""
        unit, scale = unit_of(max(bar.estimate.peak_bytes for bar in self.bars))
        rows: list[tuple[str, ...]] = [
            ("tuning", "rows", "way", *PARTS, "peak", "of ordinary", "activations at most")
        ]
        for bar in self.bars:
            peak = bar.estimate.peak_bytes
            share = f"{100 * peak / self._ordinary(bar).estimate.peak_bytes:.0f} %"
            sizes = [f"{size / scale:.1f}" for size in (*bar.parts.values(), peak)]
            most = f"{bar.most_activations / scale:.1f}"
            rows.append((bar.tuning, str(bar.batch), bar.way, *sizes, share, most))
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        ends = ["--" if at in (0, 2) else "-:" for at in range(len(widths))]
        rule = "|".join("-" * width + end for width, end in zip(widths, ends, strict=True))
        title = f"{self.model}, rows of {self.tokens} tokens, {self.device}; {unit} at the peak"
        return "\n".join([title, "", lines[0], f"|{rule}|", *lines[1:]])

    def _ordinary(self, bar: MemoryBar) -> MemoryBar:
        alike = (x for x in self.bars if (x.tuning, x.batch) == (bar.tuning, bar.batch))
        return next(x for x in alike if x.way == "ordinary")

    def plot(self, path: str | Path) -> None:
        """Draw a panel for each number of rows, a group of bars for each tuning, as PNG or SVG.

        Raises:
            InputError: the path ends in something else, or matplotlib is not installed.
        """
        Figure = figure_for(path)
        import matplotlib

        unit, scale = unit_of(max(bar.estimate.peak_bytes for bar in self.bars))
        batches = list(dict.fromkeys(bar.batch for bar in self.bars))
        style = {"svg.fonttype": "none", "svg.hashsalt": "fxseek", "font.size": 8}
        with matplotlib.rc_context(style):  # type: ignore[arg-type]  # its keys are literals
            figure = Figure(figsize=(1.5 + 3.6 * len(batches), 3.6), layout="constrained")
            panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
            for panel, batch in zip(panels, batches, strict=True):
                _draw(panel, [bar for bar in self.bars if bar.batch == batch], scale)
                panel.set_title(
                    f"{batch} {'row' if batch == 1 else 'rows'} of {self.tokens} tokens"
                )
            panels[0].set_ylabel(f"{unit} at the peak")
            handles, names = panels[0].get_legend_handles_labels()
            figure.suptitle(self.model)
            figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
            is_vector = Path(path).suffix.lower() == ".svg"
            undated: dict[str, Any] = {"metadata": {"Date": None}} if is_vector else {}
            figure.savefig(path, dpi=150, **undated)


def _draw(panel: Any, bars: Sequence[MemoryBar], scale: int) -> None:
    """One panel: bars of a tuning side by side, with a gap before the next tuning."""
    at, ticks = 0.0, []
    for index, bar in enumerate(bars):
        if index and bar.tuning != bars[index - 1].tuning:
            at += 0.8
        bottom = 0.0
        for (name, size), colour in zip(bar.parts.items(), _COLOURS, strict=True):
            label = name if index == 0 else None
            panel.bar(at, size / scale, bottom=bottom, width=0.85, color=colour, label=label)
            bottom += size / scale
        size = f"{bottom:.3g}" if bottom < 1000 else f"{bottom:.0f}"
        panel.annotate(size, (at, bottom), ha="center", va="bottom", fontsize=7)
        ticks.append(at)
        at += 1
    panel.set_xticks(ticks, [bar.way for bar in bars], rotation=90, fontsize=7)
    for tuning in dict.fromkeys(bar.tuning for bar in bars):
        some = [place for place, bar in zip(ticks, bars, strict=True) if bar.tuning == tuning]
        panel.annotate(
            tuning, (sum(some) / len(some), 0.98), xycoords=("data", "axes fraction"),
            ha="center", va="top", weight="bold",
        )  # fmt: skip
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)


def compare_memory(
    config_or_model: Any,
    tokens: int,
    *,
    batches: Sequence[int] = (1, 8),
    tunings: Sequence[str] | None = None,
    ratios: Sequence[Any] = (0.1,),
    progress: bool = True,
    **options: Any,
) -> MemoryComparison:
    """Predict where the memory of a step goes: ordinary, with gradient checkpointing, by fxseek.

    For each tuning and number of rows there is a bar for ordinary training, one for gradient
    checkpointing of every layer as transformers does it, and one for fxseek at each ratio. A bar
    has the bytes at the peak of the step: parameters, gradients and optimiser state, and the rest
    (keys and values, activations, and what comes and goes). Each is an `estimate`; nothing is
    computed, and no weights or device are needed. A model of 8 billion parameters takes ten to
    twenty seconds for each bar of fxseek.

    Args:
        config_or_model: as for `estimate`.
        tokens: tokens of a row, 2 or more.
        batches: numbers of rows.
        tunings: some of ``"full"`` (what requires grad), ``"lora"``, ``"qlora"``. None: all that
            the model can have. One that trains adapters of its own has ``"full"`` alone, and a
            quantised one no ``"qlora"``.
        ratios: shares of the tokens to keep, each as ``SeekConfig.ratio``.
        progress: show a progress bar.
        options: others of `estimate`: ``optimizer``, ``dtype``, ``lora_rank``, ``device``, and
            fields of `SeekConfig` for the bars of fxseek.

    Raises:
        ConfigError: an argument is out of range or of the wrong type, a package that it needs is
            not installed, or transformers cannot checkpoint the model.
        CaptureError, GraphError: as the training step would.
    """
    if tunings is None:
        tunings = tunings_of(config_or_model)
    given = {"batches": batches, "tunings": tunings, "ratios": ratios}
    for name, several in given.items():
        if isinstance(several, str) or not isinstance(several, Sequence) or not several:
            raise ConfigError(f"{name}={several!r} must be a list with something in it")
    for name in ("batch", "tuning", "ratio", "ordinary"):
        if name in options:
            raise ConfigError(
                f"{name}= is not for compare_memory: batches=, tunings= and ratios= say what to "
                "compare"
            )
    if "shards" in options:
        raise ConfigError(
            "shards= is not for compare_memory: ordinary training over several processes is not "
            "estimated. estimate(..., shards=) has a step of fxseek."
        )
    known = {field.name for field in dataclasses.fields(SeekConfig)}
    fields = {name: value for name, value in options.items() if name in known}
    _check_each("batches", batches, _check_batch)
    _check_each("tunings", tunings, lambda tuning: check_tuning(config_or_model, tuning))
    SeekConfig.make(**fields)
    _check_each("ratios", ratios, lambda ratio: SeekConfig.make(ratio, **fields))
    ways: list[tuple[str, dict[str, Any]]] = [
        ("ordinary", {"ordinary": True}),
        ("checkpointing", {"ordinary": "checkpointing"}),
        *((f"fxseek, {_named(ratio)}", {"ratio": ratio}) for ratio in ratios),
    ]
    bars: list[MemoryBar] = []
    from tqdm.auto import tqdm  # of transformers

    cases = list(itertools.product(batches, tunings, ways))
    with tqdm(cases, desc="memory", unit="estimate", disable=not progress) as shown:
        for batch, tuning, (way, given) in shown:
            given = {"ratio": ratios[0], **options, **given}
            found = estimate(config_or_model, tokens, batch, tuning=tuning, **given)
            bars.append(MemoryBar(tuning, batch, way, found))
    return MemoryComparison(tuple(bars), name_of(config_or_model), tokens, bars[0].estimate.device)


def _check_batch(batch: Any) -> None:
    if problems := integer("batch", batch, 1, None):
        raise ConfigError(problems[0])


def _check_each(name: str, values: Sequence[Any], check: Callable[[Any], object]) -> None:
    """Check every value before the first estimate; say which argument has a bad one."""
    for value in values:
        try:
            check(value)
        except ConfigError as error:
            raise ConfigError(f"{name}={shown(values)}: {error}") from error


def _named(ratio: Any) -> Any:
    """A ratio as a table names it: that of a configuration, the name of a function."""
    ratio = ratio.ratio if isinstance(ratio, SeekConfig) else ratio
    return getattr(ratio, "__name__", ratio)


def _part(category: str) -> str:
    return PARTS[_OWNED.get(category, len(PARTS) - 1)]

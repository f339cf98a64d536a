"""The page of `quality.py`: tables and plots of its runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import common
from common import ExampleError

Run = dict[str, Any]

SETTING = ("model", "data", "tuning", "tokens", "batch", "steps", "every", "held_out", "rate",
           "dtype")  # fmt: skip
"""What runs of one table have in common."""
STEP = ("model", "data", "tuning", "tokens", "batch", "dtype")
"""What a step's time depends on, on one machine."""

HEAD = """# What a share of the tokens teaches

Written by `make quality` (`examples/quality.py`), from the runs in `quality.jsonl`. Each run trains
for some steps; the loss is that of held-out answers, in nats per token, of the ordinary model. Only
answers have labels, and a ratio counts all tokens of a row: where prompts are long, ways that
select among labelled tokens learn a larger share of those. On CUDA, products are in TF32.

*Gain* is how much the loss has fallen, as a share of what ordinary training gains with that seed
on that kind of device in the same number of steps; *at equal time*, as a share of what gradient
checkpointing gains in the seconds that the way's own steps took. Both are the mean and the
deviation over seeds. *Step* is a step's time over that of gradient checkpointing, measured in
turns.
"""


def read(path: Path) -> list[Run]:
    """The runs and the timings of a file; none where there is no file.

    Raises:
        ExampleError: a line is neither.
    """
    runs: list[Run] = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(filter(None, text.split("\n")), 1):
        try:
            found = json.loads(line)
            key(found)
            assert found["losses"] if found["seed"] is not None else found["checkpointing"]
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ExampleError(
                f"line {number} of {path} is no run ({error}): delete it, and it is run again"
            ) from error
        runs.append(found)
    return runs


def key(run: Run) -> tuple[Any, ...]:
    """What a run is, without what it found, and wherever it ran."""
    return (*setting(run), run["arm"], run["seed"])


def setting(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in SETTING)


def write(page: Path, out: Path) -> None:
    """The page, and a plot for each setting beside it."""
    lines = sorted(read(out), key=lambda run: tuple(map(str, setting(run))))
    runs = [line for line in lines if line["seed"] is not None]
    timings = [line for line in lines if line["seed"] is None]
    sections = [HEAD]
    for number, (_, group) in enumerate(groupby(runs, setting)):
        some = list(group)
        step = {name: some[0][name] for name in STEP}
        timed = [line for line in timings if all(line[name] == step[name] for name in STEP)]
        plot = page.with_name(f"{page.stem}-{number}.svg")
        draw(plot, some, timed)
        sections.append(section(some, timed, plot.name))
    page.write_text("\n".join(sections), encoding="utf-8")


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each way, those that gain most first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], []).append(run)
    shares = {arm: statistics.mean(gained(some, runs) or [0.0]) for arm, some in found.items()}
    return dict(sorted(found.items(), key=lambda item: -shares[item[0]]))


def gained(some: Iterable[Run], runs: Iterable[Run], at: float | None = None) -> list[float]:
    """Each run's gain, at the end or a step, as a share of ordinary training's in the end."""
    return [gain(run, at) / gain(ordinary) for run, ordinary in against_ordinary(some, runs)]


def against_ordinary(some: Iterable[Run], runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Each run and ordinary training's with its seed, where the same kind of device has run both.

    On another machine, the text of a seed may be another: what is installed differs.
    """
    ordinary = {(run["seed"], run["device"]): run for run in runs if run["arm"] == "ordinary"}
    return [
        (run, ordinary[run["seed"], run["device"]])
        for run in some
        if (run["seed"], run["device"]) in ordinary
    ]


def paces(timings: Iterable[Run]) -> dict[str, float]:
    """Each way's step in steps of gradient checkpointing."""
    return {line["arm"]: line["seconds"] / line["checkpointing"] for line in timings}


def section(runs: Sequence[Run], timings: Sequence[Run], plot: str) -> str:
    """One setting's table."""
    first, pace = runs[0], paces(timings)
    header = ["", "seeds", "step", "held-out loss", "gain", "at equal time"]
    rows = []
    for arm, some in arms(runs).items():
        pairs = against_ordinary(some, runs)
        gains = gained(some, runs)
        timely = []
        if pace.get(arm, math.inf) <= 1:  # behind the last step there is nothing to compare with
            timely = [gain(run) / gain(other, at=run["steps"] * pace[arm]) for run, other in pairs]
        rows.append(
            [
                some[0]["name"],
                str(len(some)),
                f"{pace[arm]:.2f}×" if arm in pace else "–",
                spread([run["losses"][-1][1] for run in some], "{:.3f}"),
                spread([100 * x for x in gains], "{:.1f}", " %"),
                spread([100 * x for x in timely], "{:.1f}", " %"),
            ]
        )
    machines = ", ".join(sorted({line["machine"] for line in timings}))
    title = (
        f"## {first['data']}, {first['tuning']}\n\n{first['model']}, {first['dtype']}, on "
        f"{machines_of(runs)}: {first['steps']} steps of {first['batch']} rows of up to "
        f"{first['tokens']} tokens, learning rate {first['rate']:g}, {first['held_out']} held-out "
        f"rows. Held-out loss before: {spread([run['losses'][0][1] for run in runs], '{:.3f}')}. "
        f"{f'Steps were timed on {machines}.' if machines else 'No step was timed.'}\n"
    )
    return f"{title}\n{common.table(header, rows)}\n\n![Held-out loss]({plot})\n"


def machines_of(runs: Iterable[Run]) -> str:
    """Where runs ran; of several machines, which seeds each."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run["machine"], set()).add(run["seed"])
    if len(seeds) == 1:
        return next(iter(seeds))
    named = [
        f"{name} ({'seed' if len(some) == 1 else 'seeds'} {', '.join(map(str, sorted(some)))})"
        for name, some in seeds.items()
    ]
    return " and ".join(named)


def gain(run: Run, at: float | None = None) -> float:
    """How much the held-out loss has fallen, at the end or after a (fractional) number of steps.

    Between two evaluations along a line; behind the last one as the last.
    """
    losses = run["losses"]
    before = losses[0][1]
    if at is None or at >= losses[-1][0]:
        return before - losses[-1][1]
    for (start, one), (end, other) in pairwise(losses):
        if start <= at <= end:
            return before - (one + (other - one) * (at - start) / (end - start))
    raise AssertionError(at)


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean and deviation over seeds; the mean alone of one."""
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return f"{mean}{unit}"
    return f"{mean} ± {form.format(statistics.stdev(values))}{unit}"


def draw(path: Path, runs: Sequence[Run], timings: Sequence[Run]) -> None:
    """Each way's gain against steps, and against time, where it was timed."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "fxseek", "font.size": 8}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
        pace, families = paces(timings), dict[str, int]()
        for arm, some in arms(runs).items():
            family, _, share = arm.partition("-")
            colour = colours[families.setdefault(family, len(families)) % 10]
            line = {"0.1": ":", "0.25": "--"}.get(share, "-")
            steps = [step for step, _ in some[0]["losses"]]
            means = [100 * statistics.mean(gained(some, runs, at) or [0.0]) for at in steps]
            given = {"color": colour, "ls": line, "marker": "o", "ms": 2, "lw": 1.1}
            panels[0].plot(steps, means, label=some[0]["name"], **given)
            if arm in pace:
                panels[1].plot([step * pace[arm] for step in steps], means, **given)
        panels[0].set(xlabel="steps", ylabel="gain, % of ordinary training's in the end")
        panels[1].set(xlabel="time, in steps of gradient checkpointing")
        handles, names = panels[0].get_legend_handles_labels()
        legend = {"loc": "outside right center", "frameon": False, "fontsize": 7}
        figure.legend(handles, names, **legend)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})

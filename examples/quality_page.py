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

TEXT = "documentation"
MODEL = "SmolLM2-135M-Instruct.Q4_1"
LEAST = 600
RATES = {"lora": 5e-4, "full": 2e-5}
"""What runs are of where the command does not say."""
SETTING = ("model", "data", "least", "tuning", "tokens", "batch", "steps", "every", "held_out",
           "rate", "dtype")  # fmt: skip
"""What runs of one table have in common."""
STEP = ("model", "data", "least", "tuning", "tokens", "batch", "dtype")
"""What a step's time depends on, on one machine."""
TARGETS = {"labelled": 98, "50 %": 97, "25 %": 93, "10 %": 85}
"""Gains to reach in as many steps, in per cent of ordinary training's."""
PUBLISHED = {"tokentune": "TokenTune", "tokenseek": "TokenSeek"}

HEAD = """# What a share of the tokens teaches

Written by `make quality` (`examples/quality.py`), from the runs in `{runs}`. Each run trains
for some steps; the loss is that of held-out answers, in nats per token, of the ordinary model. Only
answers have labels, and a ratio counts all tokens of a row: where prompts are long, ways that
select among labelled tokens learn a larger share of those. Rows of documentation, of which older
runs don't tell, have 184 to 768 tokens (median 526), 93 % of them with labels. On CUDA, products
are in TF32.

*Gain* is how much the loss has fallen, as a share of what ordinary training gains with that seed
and text on that kind of device in as many steps; *at equal time*, as a share of what gradient
checkpointing, which learns what ordinary training learns, gains in the seconds that the way's own
steps took. Both are the mean and the deviation over seeds; ways of different seeds are compared by
gain, not by loss. Between two evaluations checkpointing's gain is taken as linear in the logarithm
of the steps; before its first evaluation, and for ways that are slower than it, there is no figure
at equal time. *Step* is a step's time over that of gradient checkpointing beside it, on the machine
that is named: the median of the turns, and their range where more than two count. *Saved* and
*peak* are, over checkpointing's, what a forward keeps for its backward, and the most memory of a
step; with so few steps peaks vary by a fifth.

*As published* are TokenTune's and TokenSeek's selections among all tokens, run by fxseek. A *span*
is no longer than what its row keeps, and a sampled one than a quarter of that: random spans of 32
and sampled ones of 8 have that many tokens in rows that keep 32. *Ends oftener*: when these runs
were made, tokens at the ends of rows were selected a little more often than others. *10 % to 50 %*
is a share that grows from step to step, and *the first* is a row's first token, which is always
kept (`sinks=1`).

*Targets* are what we set out to reach. Where all tokens have labels, a half of them holds a half of
the gradient: the larger the share that has none, the nearer a way that selects among labelled
tokens comes to ordinary training. That is why the same ways reach targets on one text that they
miss on another. What else is missing is what unselected tokens would have learned through their
keys and values ([bias and noise](scoring.md#which-ratio)); labelled tokens alone miss it of the
prompt. The fewer the steps, the farther the smallest share is behind.
"""


def read(path: Path) -> list[Run]:
    """The runs and the timings of a file; none where there is no file.

    Raises:
        ExampleError: a line is neither.
    """
    runs: list[Run] = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            found = json.loads(line)
            found.setdefault("least", LEAST if found["data"] == TEXT else None)
            key(found)
            assert found["losses"] if found["seed"] is not None else found["checkpointing"]
            assert all(math.isfinite(loss) for _, loss in found.get("losses", [])), "it diverged"
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
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
    sections = [HEAD.replace("{runs}", out.name)]
    for number, (_, group) in enumerate(groupby(runs, setting)):
        some = list(group)
        timed = timings_of(some, timings)
        plot = page.with_name(f"{page.stem}-{number}.svg")
        draw(plot, some, timed)
        sections.append(section(some, timed, plot.name))
    page.write_text("\n".join(sections), encoding="utf-8")


def timings_of(runs: Sequence[Run], timings: Iterable[Run]) -> list[Run]:
    """The timings of a setting's steps on one machine; of the runs' kind where there are any."""
    first = runs[0]
    machines: dict[str, list[Run]] = {}
    for line in timings:
        if all(line[name] == first[name] for name in STEP):
            machines.setdefault(line["machine"], []).append(line)
    if not machines:
        return []
    devices = {run["device"] for run in runs}
    best = max(machines.values(), key=lambda some: (some[0]["device"] in devices, len(some)))
    return sorted(best, key=lambda line: setting(line) == setting(first))  # the last counts


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
    """Each run and ordinary training's with its seed, where both are of one text on one device.

    What is installed is the text, and differs from machine to machine: so does the loss before.
    """
    ordinary = {(run["seed"], run["device"]): run for run in runs if run["arm"] == "ordinary"}
    pairs = [(run, ordinary.get((run["seed"], run["device"]))) for run in some]
    return [
        (run, other)
        for run, other in pairs
        if other is not None and alike(run, other) and gain(other) > 0  # else there is no share
    ]


def alike(a: Run, b: Run) -> bool:
    """Whether two runs began with the same loss, to what devices round."""
    return math.isclose(a["losses"][0][1], b["losses"][0][1], rel_tol=1e-3)


def paces(timings: Iterable[Run]) -> dict[str, float]:
    """Each way's step in steps of gradient checkpointing."""
    return {line["arm"]: statistics.median(ratios(line)) for line in timings}


def ratios(line: Run) -> list[float]:
    """A way's step over checkpointing's beside it, turn by turn; of older lines, their medians'."""
    pairs = line.get("pairs", [[line["seconds"], line["checkpointing"]]])
    return [own / other for own, other in pairs]


def paced(line: Run) -> str:
    """The median of the turns, and their range."""
    found = ratios(line)
    shown = f"{statistics.median(found):.2f}×"
    return f"{shown} ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else shown


def section(runs: Sequence[Run], timings: Sequence[Run], plot: str) -> str:
    """One setting's tables."""
    pace, timed = paces(timings), {line["arm"]: line for line in timings}
    header = ["", "seeds", "s / step", "step", "saved", "peak", "held-out loss", "gain",
              "at equal time"]  # fmt: skip
    rows = []
    for arm, some in arms(runs).items():
        line = timed.get(arm, {})
        rows.append(
            [
                some[0]["name"],
                str(len(some)),
                f"{line['seconds']:.1f}" if line else "–",
                paced(line) if line else "–",
                *(over(*line.get(name, (0, 0))) for name in ("saved", "peaks")),
                spread([run["losses"][-1][1] for run in some], "{:.3f}"),
                spread([100 * x for x in gained(some, runs)], "{:.1f}", " %"),
                spread([100 * x for x in in_time(some, runs, pace.get(arm))], "{:.1f}", " %"),
            ]
        )
    tables = f"{common.table(header, rows)}\n\n**Targets**\n\n{targets(runs, pace)}"
    return f"{title(runs, timings)}\n{tables}\n\n![Gain by steps and by time]({plot})\n"


def over(own: float, other: float) -> str:
    return f"{own / other:.2f}×" if other else "–"


def title(runs: Sequence[Run], timings: Iterable[Run]) -> str:
    """What the runs of a setting have in common."""
    first = runs[0]
    rows = f"of up to {first['tokens']} tokens"
    lengths = [run["lengths"] for run in runs if "lengths" in run]
    if lengths:
        shortest, median, longest = (sorted(some) for some in zip(*lengths, strict=True))
        share = statistics.mean(run["labelled"] for run in runs if "labelled" in run)
        rows = (
            f"of {shortest[0]} to {longest[-1]} tokens (median {round(statistics.median(median))}; "
            f"{share:.0%} of them with labels)"
        )
    machines = ", ".join(sorted({line["machine"] for line in timings}))
    seeds = sorted({run["seed"] for run in runs})
    given = {
        "data": None if first["data"] == TEXT else f"{first['data']}.jsonl",
        "model": None if first["model"] == MODEL else first["model"],
        "least": None if first["least"] == LEAST else first["least"],
        "rate": None if first["rate"] == RATES[first["tuning"]] else f"{first['rate']:g}",
        "dtype": None if first["dtype"] == "float32" else first["dtype"],
        "tunings": first["tuning"],
        **{name: first[name] for name in ("tokens", "batch", "steps", "every", "held_out")},
        "first_seed": seeds[0] or None,
        "seeds": len(seeds),
    }
    command = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None
    )
    before = {run["seed"]: run["losses"][0][1] for run in runs}
    return (
        f"## {first['data']}, {first['tuning']}\n\n{first['model']}, {first['dtype']}, on "
        f"{machines_of(runs)}: {first['steps']} steps of {first['batch']} rows {rows}, learning "
        f"rate {first['rate']:g}, {first['held_out']} held-out rows. Held-out loss before: "
        f"{spread([*before.values()], '{:.3f}')}. "
        f"{f'Steps were timed on {machines}.' if machines else 'No step was timed.'} "
        f"Command: `python examples/quality.py {command}`.\n"
    )


def targets(runs: Sequence[Run], pace: dict[str, float]) -> str:
    """What was to be reached, and what was."""
    found = arms(runs)
    rows = []
    for share, least in TARGETS.items():
        own = {
            arm: statistics.mean(gains)
            for arm, some in found.items()
            if arm == share or some[0]["name"].endswith(f", {share}")
            if (gains := gained(some, runs))
        }
        others = {arm: own.pop(arm) for arm in [*own] if arm.partition("-")[0] in PUBLISHED}
        if not own:
            continue
        best = max(own, key=lambda arm: own[arm])
        names = {arm: some[0]["name"].partition(",")[0] for arm, some in found.items()}
        above = " and ".join(f"{names[arm]} {100 * x:.1f} %" for arm, x in others.items())
        reached = 100 * own[best] >= least and all(own[best] > x for x in others.values())
        families = {arm.partition("-")[0] for arm in others}
        unknown = [name for arm, name in PUBLISHED.items() if arm not in families]
        doubt = "" if share in found else "".join(f"; {name} has no figure" for name in unknown)
        rows.append(
            [
                f"gain of {found[best][0]['name']}",
                f"{100 * own[best]:.1f} %",
                f"≥ {least} %" + (f", above {above}" if above else ""),
                f"yes{doubt}" if reached else "**no**",
            ]
        )
    timely = {
        arm: statistics.mean(times)
        for arm, some in found.items()
        if (times := in_time(some, runs, pace.get(arm)))
    }
    if timely:
        best = max(timely, key=lambda arm: timely[arm])
        reached = "yes" if timely[best] >= 1 else "**no**"
        what = f"gain at equal time of {found[best][0]['name']}"
        rows.append([what, f"{100 * timely[best]:.1f} %", "≥ 100 %", reached])
    return common.table(["", "measured", "target", "reached"], rows)


def in_time(some: Iterable[Run], runs: Iterable[Run], pace: float | None) -> list[float]:
    """Each run's gain as a share of what checkpointing gains in the time of its steps.

    Before checkpointing's first evaluation and behind its last step nothing is known of it: none
    for ways that take less time than the one or more than the other.
    """
    if pace is None or pace > 1:
        return []
    pairs = [(run, run["steps"] * pace, other) for run, other in against_ordinary(some, runs)]
    return [
        gain(run) / gain(other, at)
        for run, at, other in pairs
        if at >= other["losses"][1][0] and gain(other, at) > 0
    ]


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

    Between two evaluations it is linear in the logarithm of the steps, which is nearer to what
    finer evaluations show than a line is; behind the last one as the last.

    Raises:
        ValueError: `at` is before the first evaluation behind step 0.
    """
    losses = run["losses"]
    before = losses[0][1]
    if at is None or at >= losses[-1][0]:
        return before - losses[-1][1]
    if at == 0:
        return 0.0
    for (start, one), (end, other) in pairwise(losses[1:]):
        if start <= at <= end:
            return before - (one + (other - one) * math.log(at / start) / math.log(end / start))
    raise ValueError(f"{at} steps are before the first evaluation, after {losses[1][0]}")


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean and deviation over seeds; the mean alone of one."""
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return f"{mean}{unit}"
    return f"{mean} ± {form.format(statistics.stdev(values))}{unit}"


def draw(path: Path, runs: Sequence[Run], timings: Sequence[Run]) -> None:
    """Each way's gain against steps, and against time, where it was timed: mean and deviation."""
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
            gains = [[100 * x for x in gained(some, runs, at) or [math.nan]] for at in steps]
            means = [statistics.mean(each) for each in gains]
            apart = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in gains]
            given = {"color": colour, "ls": line, "marker": "o", "ms": 2, "lw": 1.1}
            for panel, scale in zip(panels, (1.0, pace.get(arm)), strict=True):
                if scale is not None:
                    label = some[0]["name"] if panel is panels[0] else None
                    at = [step * scale for step in steps]
                    panel.plot(at, means, label=label, **given)
                    low = [mean - x for mean, x in zip(means, apart, strict=True)]
                    high = [mean + x for mean, x in zip(means, apart, strict=True)]
                    panel.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        panels[0].set(xlabel="steps", ylabel="gain, % of ordinary training's in the end")
        panels[1].set(xlabel="time, in steps of gradient checkpointing")
        if timings:
            second = statistics.median(line["checkpointing"] for line in timings)
            functions = (lambda x: x * second, lambda x: x / second)
            panels[1].secondary_xaxis("top", functions=functions).set(xlabel="seconds")
        handles, names = panels[0].get_legend_handles_labels()
        legend = {"loc": "outside right center", "frameon": False, "fontsize": 7}
        figure.legend(handles, names, **legend)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})

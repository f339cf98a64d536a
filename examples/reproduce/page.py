"""The page of the runs: the paper's table, its ablations, and pictures."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import ExampleError
from quality_page import TEXT, spread
from reproduce import paper
from reproduce.methods import LAYERS, SELECTIONS, TUNERS, Way, ablations
from reproduce.tasks import LOCAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, Any]
BAD = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError)
"""What reading a file may raise that is no run."""

HEAD = """# Reproduction

Written by `make reproduce` (`examples/reproduce/`), from the runs in `{folder}`: the methods and
ablations of TokenSeek ([arXiv 2601.19739](https://arxiv.org/abs/2601.19739)). Ways that select
tokens, TokenTune's and TokenSeek's among them, are run by fxseek.

*Memory* is all that tensors take in a step: weights, gradients, AdamW's state and activations. A
step's figure is its peak; *average* is the mean over steps, *maximal* the largest, both as a share
of full-parameter training on every token and the same rows. On CUDA every step is measured, by the
allocator; on the CPU up to four, spread over the run, and for the maximal the one with the longest
row: the two figures are the same where each of these has a row of `tokens` tokens, at which rows
are cut. Weights, gradients and AdamW's state are in each, and no share of the tokens changes them:
rows within a point of each other may be in one order by average memory and in the other by maximal.
Where rows are so few and short that the peak comes after the activations are freed, full-parameter
ways take the same memory at any share. *Score* is the mean over the tasks, in per cent; the loss is
that of held-out answers, in nats per token. Both are of the ordinary model. ± is the deviation over
seeds. A question of *continuation* shows the beginning of a held-out answer, up to `context` words
of it (0: any number), and asks which of four pieces of the same answer comes next. 0 steps are one
epoch.
"""


def read(folder: Path) -> dict[Path, Run]:
    """The runs of a folder by their files; none where there is no folder.

    Raises:
        ExampleError: a file is no run.
    """
    runs: dict[Path, Run] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            runs[file] = json.loads(file.read_text(encoding="utf-8"))
            check(runs[file])
        except BAD as error:
            raise ExampleError(
                f"{file} is no run ({type(error).__name__}: {error}): delete it, and it is run "
                "again, or give another --out"
            ) from error
    return runs


def check(run: Run) -> None:
    """Raise one of several errors where a run lacks what the page needs."""
    setting, found, way = run["setting"], run["found"], way_of(run)
    if way.tuner not in TUNERS or way.selection not in SELECTIONS:
        raise ValueError(f"there is no method {way.tuner}+{way.selection}")
    words = [setting[name] for name in ("model", "data", "tasks", "device")]
    words += [found["machine"], way.name]
    numbers = [run["rate"], run["seed"], found["memory"]["average"], found["memory"]["maximal"]]
    numbers += [loss for _, loss in found["losses"]] or [None]
    numbers += [*found.get("scores", {}).values()]
    numbers += [setting["questions"]] if setting["tasks"] == LOCAL else []
    words += [run["origin"][name] for name in ("rows", "model")] if "origin" in run else []
    kinds = [(x, str) for x in words] + [(x, int | float) for x in numbers]
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r} in it is no {'word' if kind is str else 'number'}")
    if not all(map(math.isfinite, numbers)) or min(found["memory"].values()) <= 0:
        raise ValueError("a number in it is not finite, or takes no memory")


def write_run(file: Path, run: Run) -> None:
    replace(file, json.dumps(run, indent=1) + "\n")


def replace(file: Path, text: str) -> None:
    """Write a file, all of it or nothing, whatever another process writes there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def way_of(run: Run) -> Way:
    return Way(**run["way"])


def name_of(run: Run) -> str:
    return way_of(run).name


def write(page: Path, folder: Path) -> None:
    """The page, and its pictures beside it.

    A picture is named by its setting, so that a new one renames none.
    """
    settings: dict[str, list[Run]] = {}
    for run in read(folder).values():
        settings.setdefault(json.dumps(run["setting"], sort_keys=True), []).append(run)
    sections = [HEAD.format(folder=folder.resolve().name)]
    for setting, some in settings.items():
        digest = hashlib.sha256(setting.encode()).hexdigest()[:8]
        sections.append(section(some, page.with_name(f"{page.stem}-{digest}")))
    sections.append(beside([*settings.values()]))
    replace(page, "\n".join(sections))


def section(runs: Sequence[Run], stem: Path) -> str:
    """One setting: the table of methods, the ablations, and their pictures."""
    setting = runs[0]["setting"]
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()
                      if name not in ("model", "data"))  # fmt: skip
    machines = ", ".join(sorted({run["found"]["machine"] for run in runs}))
    before = {
        kind: [run["found"]["losses"][0][1] for run in runs
               if (way_of(run).tuner == "qlora") == (kind != "")]
        for kind in ("", " in NF4")
    }  # fmt: skip
    told = [f"{statistics.mean(x):.3f}{kind}" for kind, x in before.items() if x]
    text = [
        f"## {setting['model']}, {setting['data']}\n",
        f"{about}; on {machines}. Held-out loss before: {', '.join(told)}.{uncertainty(runs)}\n",
        *filter(None, [command(runs)]),
    ]
    main = [run for run in runs if way_of(run).is_named]
    tables: list[tuple[str, str, list[Run], Callable[[Sequence[Run], Sequence[Run]], Figure]]] = [
        ("", "methods", main, scatter),
    ]
    for tuner, (name, *_) in TUNERS.items():
        for part, ways in ablations(tuner).items():
            some = [run for run in runs if way_of(run) in ways]
            if any(not way_of(run).is_named for run in some):
                tables.append((f"{name}, {part} of TokenSeek", f"{tuner}-{part}", some, bars))
    for title, slug, some, draw in tables:
        if not some:
            continue
        picture = stem.with_name(f"{stem.name}-{slug}.svg")
        text += [f"### {title}\n"] if title else []
        text += [f"{table(some, main)}\n"]
        if drawn(picture, lambda some=some, draw=draw: draw(some, main)):
            text += [f"![{title or 'Memory and score'}]({picture.name})\n"]
    return "\n".join(text)


def command(runs: Sequence[Run]) -> str:
    """What gives the runs of a setting, of the offline model and text; "" of others.

    The page doesn't know where others lie.
    """
    setting, rates = runs[0]["setting"], {run["rate"] for run in runs}
    usual = {**paper.PRESETS["offline"], "model": paper.OFFLINE, "data": TEXT, "device": "cpu"}
    if (setting["model"], setting["data"]) != (usual["model"], usual["data"]):
        return ""
    usual["device"] = None  # the default is what there is
    given = {name: value for name, value in setting.items() if value != usual[name]}
    if len(rates) == 1 and any(run["rate"] != paper.RATES[way_of(run).tuner] for run in runs):
        given["rate"] = f"{rates.pop():g}"
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return f"```\n{' '.join(['python examples/reproduce', *options])}\n```\n"


def uncertainty(runs: Sequence[Run]) -> str:
    """The standard error of a score, where the questions are those of the local task."""
    setting, found = runs[0]["setting"], scores(runs)
    if setting["tasks"] != LOCAL or not found:
        return ""
    share = statistics.mean(found) / 100
    points = 100 * math.sqrt(share * (1 - share) / setting["questions"])
    return (
        f" So few questions give a score a standard error of {points:.1f} points: rows whose "
        "scores differ by less, as by a point, are not ranked by them."
    )


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each way, in the order of the paper's table; of each rate, where it has more."""
    order = [*TUNERS], [*SELECTIONS]

    def place(run: Run) -> tuple[Any, ...]:
        way = way_of(run)
        selected = order[1].index(way.selection)
        changed = json.dumps(way.options), run["rate"], run["seed"]
        return bool(selected), order[0].index(way.tuner), selected, changed

    rates: dict[str, set[float]] = {}
    for run in runs:
        rates.setdefault(name_of(run), set()).add(run["rate"])
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=place):
        name = name_of(run)
        rate = f", rate {run['rate']:g}" if len(rates[name]) > 1 else ""
        found.setdefault(f"{name}{rate}", []).append(run)
    return found


def bases(runs: Iterable[Run], kind: str) -> dict[int, float]:
    """Bytes of full-parameter training on every token, by seed: rows differ."""
    full = (run for run in runs if way_of(run) == Way("full", "", None))
    return {run["seed"]: run["found"]["memory"][kind] for run in full}


def shares(some: Iterable[Run], main: Sequence[Run], kind: str) -> list[float]:
    """Memory of the runs in per cent of full-parameter training on every token of their seed."""
    whole = bases(main, kind)
    return [
        100 * run["found"]["memory"][kind] / whole[run["seed"]]
        for run in some
        if run["seed"] in whole
    ]


def scores(some: Iterable[Run]) -> list[float]:
    """The mean score of each run that has any."""
    found = [run["found"].get("scores") for run in some]
    return [statistics.mean(x.values()) for x in found if x]


def losses(some: Iterable[Run]) -> list[float]:
    return [run["found"]["losses"][-1][1] for run in some]


def table(runs: Sequence[Run], main: Sequence[Run]) -> str:
    """The paper's columns, and the held-out loss; each task's score where there are several."""
    names = list(dict.fromkeys(name for run in runs for name in run["found"].get("scores", {})))
    each = names if len(names) > 1 else []
    header = ["method", "seeds", "average memory", "maximal memory", *each, "average score",
              "held-out loss"]  # fmt: skip
    rows = []
    for name, some in grouped(runs).items():
        tasks = [[run["found"]["scores"][task] for run in some
                  if task in run["found"].get("scores", {})] for task in each]  # fmt: skip
        rows.append(
            [
                name,
                str(len(some)),
                *(spread(shares(some, main, kind), "{:.1f}", " %")
                  for kind in ("average", "maximal")),
                *(spread(values, "{:.1f}") for values in tasks),
                spread(scores(some), "{:.1f}"),
                spread(losses(some), "{:.3f}"),
            ]
        )  # fmt: skip
    return common.table(header, rows)


def beside(settings: Sequence[Sequence[Run]]) -> str:
    """What is known of the paper's figures and settings, beside those of the runs here."""
    header = ["setting", "the paper", "source", "offline"]
    rows = [[x.name, x.paper, x.source, x.offline] for x in paper.SETTINGS]
    rates = ", ".join(f"{TUNERS[tuner][0]} {rate:g}" for tuner, rate in paper.RATES.items())
    adapters = [
        ", ".join([name, *(f"{key} {value}" for key, value in options.items()
                           if not key.endswith("_modules"))])
        for name, _, options in TUNERS.values()
        if options.get("target_modules") == LAYERS
    ]  # fmt: skip
    ia3 = ", ".join(TUNERS["ia3"][2]["target_modules"])
    return "\n".join(
        [
            "## Beside the paper\n",
            "Average and maximal memory, and the average score: the paper's for Llama-3.2-1B, as "
            f"far as {paper.NOTES} quote them, and those of the tables above.\n",
            f"{figures(settings)}\n",
            paper.DIFFERENCES,
            f"{ablated()}\n",
            "The settings, as far as the paper's are known here:\n",
            f"{common.table(header, rows)}\n",
            "Adapters are ours but for LoRA's and QLoRA's rank, alpha and dropout. On every linear "
            f"layer of a block: {'; '.join(adapters)}. IA3 scales {ia3}. What is not named here is "
            "as peft has it.\n",
            f"Offline learning rates are ours, chosen without a search: {rates}. Pairs of alpha "
            "and beta in {0, 1, 5} that rank tokens alike are run once, and (0, 0), which ranks "
            "none, is not run.\n",
        ]
    )


def figures(settings: Sequence[Sequence[Run]]) -> str:
    """The paper's table, and a column for each setting that has full-parameter training."""

    def told(average: float | None, maximal: float | None, score: float | None) -> str:
        shares = ["–" if x is None else f"{x:.1f} %" for x in (average, maximal)]
        return f"{' / '.join(shares)}, {'–' if score is None else f'{score:.1f}'}"

    settings = [some for some in settings if bases(some, "average")]
    named = [f"{x[0]['setting']['model']}, {x[0]['setting']['device']}" for x in settings]
    rows = []
    for method, known in paper.FIGURES.items():
        tuner, _, selection = method.partition("+")
        way = Way(tuner, selection, SELECTIONS[selection][1])
        row = [way.name, told(*known)]
        for runs in settings:
            some = [run for run in runs if way_of(run) == way]
            memory = [shares(some, runs, kind) for kind in ("average", "maximal")]
            means = [statistics.mean(x) if x else None for x in (*memory, scores(some))]
            several = len({run["rate"] for run in some}) > 1
            row.append("at several rates" if several else told(*means) if some else "–")
        rows.append(row)
    return common.table(["method", "the paper", *named], rows)


def ablated() -> str:
    """The paper's ablations."""
    shares = ", ".join(f"{x:.2f} at {share} %" for share, x in paper.SHARE_SCORES.items())
    factors = ", ".join(f"{x:.2f} with {pair}" for pair, x in paper.FACTOR_SCORES.items())
    return (
        f"The paper's ablation of the share, with QLoRA: average scores of {shares}. Of (alpha, "
        f"beta), with a model and tuner that the notes don't name: {factors}."
    )


# ------------------------------------------------------------------------------------ pictures


def drawn(file: Path, draw: Callable[[], Figure]) -> bool:
    """Draw, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    style = {"svg.fonttype": "none", "svg.hashsalt": "fxseek", "font.size": 8}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]  # its keys are literals
        text = io.StringIO()
        draw().savefig(text, format="svg", metadata={"Date": None})
    replace(file, text.getvalue())
    return True


def scatter(runs: Sequence[Run], main: Sequence[Run]) -> Figure:
    """Average memory against score and held-out loss; whiskers are deviations over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    kinds = (("average score", scores), ("held-out loss", losses))
    for name, some in grouped(runs).items():
        way = way_of(some[0])
        colour, marker = [*TUNERS].index(way.tuner), [*SELECTIONS].index(way.selection)
        x = shares(some, main, "average")
        for panel, (_, values) in zip(panels, kinds, strict=True):
            y = values(some)
            if x and y:
                panel.errorbar(
                    statistics.mean(x), statistics.mean(y), xerr=deviation(x), yerr=deviation(y),
                    marker="o^sDv"[marker], color=f"C{colour}",
                    label=name, ms=5, lw=1,
                )  # fmt: skip
    for panel, (name, _) in zip(panels, kinds, strict=True):
        panel.set(xlabel="average memory, % of full parameter", ylabel=name)
    panels[1].invert_yaxis()
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    return figure


def bars(runs: Sequence[Run], main: Sequence[Run]) -> Figure:
    """The held-out loss, and the average memory, of each choice."""
    from matplotlib.figure import Figure

    found = grouped(runs)
    names = [name.rpartition("TokenSeek")[2].strip(", ") or "the default" for name in found]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, title, values in (
        (panels[0], "held-out loss", [losses(some) for some in found.values()]),
        (
            panels[1],
            "average memory, %",
            [shares(some, main, "average") for some in found.values()],
        ),
    ):
        means = [statistics.mean(some) if some else math.nan for some in values]
        panel.errorbar(means, range(len(means)), xerr=[deviation(x) for x in values], fmt="o", ms=4)
        panel.set_yticks(range(len(names)), names)
        panel.set_xlabel(title)
        panel.invert_yaxis()
    return figure


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

"""The paper's table, ablations and figures, by one command.

    python examples/reproduce                          # offline: SmolLM2-135M; hours on two cores
    python examples/reproduce --preset small           # minutes
    python examples/reproduce --data my.jsonl          # your own text, in Alpaca's format
    python examples/reproduce --model meta-llama/Llama-3.2-1B --data garage-bAInd/Open-Platypus \
        --tasks mmlu,arc_challenge,hellaswag,truthfulqa_mc2,winogrande     # a GPU and the hub

Each run is a process, and one JSON file when it is done; what has a file is not run again, so that
a call that was stopped goes on where it was. What a run needs and the machine lacks, a package or
memory, is named, and the others go on. The page has what the runs found, and is written anew
after each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # where `common` and the other examples are
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

import common
from common import ExampleError, ModelSource, Pair, Row
from reproduce import methods, page, paper, tasks, train
from reproduce.methods import Way
from reproduce.train import Job, apart

DOCS = Path(__file__).parents[2] / "docs"
SETTING = ("tokens", "batch", "accumulate", "steps", "held_out", "questions", "schedule", "decay",
           "dtype", "device")  # fmt: skip
"""Options that runs of one table have in common, beside model, data and tasks."""
PARTS = ("table", "ablations")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    common.quiet()
    # The profiler's remarks, one a step, would come between the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        problems = run_all(options)
        page.write(options.page, options.out)
    except ExampleError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    if problems:
        print("\n".join(["reproduce: these did not run:", *problems]), file=sys.stderr)
    print(f"\nWritten: {options.page}")
    return 1 if problems else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=list(paper.PRESETS), help="paper with --model, else offline")
    add("--model", help="a hub id, a folder or a .gguf file (offline: SmolLM2-135M-Instruct)")
    add("--data", help="a data set of the hub, or a JSONL file in Alpaca's format")
    add("--tasks", help="tasks of lm-eval, or none (offline: one made of the held-out text)")
    add("--methods", help="tuners, alone or as tuner+selection (default: the paper's)")
    add("--also", help="more selections of full, loha and qlora: recommended, parts, or none")
    add("--what", help="some of table,ablations")
    add("--ablate", default="full", help="the ablations' tuner (%(default)s)")
    add("--seeds", type=int, help="runs of each method")
    add("--steps", type=int, help="training steps; 0 for one epoch")
    add("--batch", type=int, help="rows of a forward")
    add("--accumulate", type=int, help="forwards of a step")
    add("--tokens", type=int, help="the longest row")
    add("--held-out", type=int, help="rows to judge by")
    add("--questions", type=int, help="of the task made of the held-out text")
    add("--rate", type=float, help="learning rate (default: one for each tuner)")
    add("--schedule", help="of the learning rate, as transformers names it")
    add("--decay", type=float, help="weight decay")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--workers", type=int, default=1, help="runs at a time (%(default)s)")
    add("--out", type=Path, default=DOCS / "reproduction", help="a file a run (%(default)s)")
    add("--page", type=Path, default=DOCS / "reproduction.md", help="the page (%(default)s)")
    options = parser.parse_args(arguments)
    preset = options.preset or ("paper" if options.model else "offline")
    for name, value in paper.PRESETS[preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("tasks", "also", "what"):
        chosen = getattr(options, name)
        setattr(options, name, [x for x in chosen.split(",") if x and x != "none"])
    for name, known in (("what", PARTS), ("also", methods.SELECTIONS), ("ablate", methods.TUNERS)):
        chosen = getattr(options, name)
        unknown = {chosen} - {*known} if isinstance(chosen, str) else {*chosen} - {*known}
        if unknown:
            parser.error(f"--{name} has {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in ("seeds", "batch", "accumulate", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        named = [*methods.TABLE, *(f"{x}+{y}" for x in methods.SELECTED for y in options.also)]
        named = options.methods.split(",") if options.methods else named
        options.ways = [methods.way_of(text) for text in named]
    except ExampleError as error:
        parser.error(str(error))
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


# ------------------------------------------------------------------------------------- the runs


def planned(options: argparse.Namespace) -> Iterator[tuple[Way, int]]:
    """Way and seed of each run; seed by seed, so that early ones are comparable."""
    ways = [*options.ways] if "table" in options.what else []
    if "ablations" in options.what:
        some = methods.ablations(options.ablate).values()
        ways += [way for part in some for way in part]
    ways = [way for index, way in enumerate(ways) if way not in ways[:index]]
    yield from ((way, seed) for seed in range(options.seeds) for way in ways)


def line_of(options: argparse.Namespace, model: str, way: Way, seed: int) -> page.Run:
    """What a run is, without what it finds."""
    rate = options.rate or paper.RATES[way.tuner]
    return {
        "setting": {
            "model": model,
            "data": Path(options.data).stem if options.data else "documentation",
            "tasks": ",".join(options.tasks) or "none",
            **{name: getattr(options, name) for name in SETTING},
        },
        "way": vars(way),
        "rate": rate,
        "seed": seed,
    }


def file_of(folder: Path, line: page.Run) -> Path:
    digest = hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{page.way_of(line).slug}-{line['seed']}-{digest}.json"


def run_all(options: argparse.Namespace) -> list[str]:
    """Every run that has no file yet; returns what did not run, and why."""
    problems = [*lacking_tasks(options)]  # which may leave tasks out
    source = common.find_model(options.model)
    lines = [line_of(options, source.name, *one) for one in planned(options)]
    left = [line for line in lines if not file_of(options.out, line).exists()]
    lacking = {way: methods.lacking(way) for way in dict.fromkeys(map(page.way_of, left))}
    problems += [f"{way.name}: {reason}" for way, reason in lacking.items() if reason]
    left = [line for line in left if not lacking[page.way_of(line)]]
    if problems:
        print("\n".join(["left out:", *problems]), flush=True)
    if not left:
        return problems
    with tempfile.TemporaryDirectory() as folder:
        job = first_job(options, source, Path(folder))
        if not job.train:
            raise ExampleError("there is no row to learn")
        count = f"{len(lines) - len(left)} of {len(lines)} runs are done or left out"
        print(f"{count}; {len(job.train)} rows to learn, {len(job.held_out)} held out.", flush=True)
        with (
            tqdm(total=len(left), desc="reproduce", unit="run", smoothing=0) as bar,
            ThreadPoolExecutor(options.workers) as threads,
        ):
            running = {threads.submit(apart, job_of(job, line)): line for line in left}
            for future in as_completed(running):
                line, way = running[future], page.way_of(running[future])
                bar.set_postfix_str(way.name)
                try:
                    found = future.result()
                    page.write_run(file_of(options.out, line), {**line, "found": found})
                    page.write(options.page, options.out)
                except BrokenProcessPool:
                    problems.append(f"{way.name}: its process was killed, as by too little memory")
                except Exception as error:
                    problems.append(f"{way.name}: {type(error).__name__}: {error}")
                bar.update()
    return problems


def lacking_tasks(options: argparse.Namespace) -> list[str]:
    """Leave tasks out that can't be had; the held-out loss remains."""
    reason = tasks.lacking() if options.tasks else None
    found = dict.fromkeys(options.tasks, reason) if reason else tasks.unusable(options.tasks)
    options.tasks = [name for name in options.tasks if name not in found]
    return [f"task {name}: {reason}" for name, reason in found.items()]


# ------------------------------------------------------------------------------ what they share


def first_job(options: argparse.Namespace, source: ModelSource, folder: Path) -> Job:
    """What all runs have in common: the model, the text and the tasks."""
    tokenizer = common.load_tokenizer(source)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    pairs = read(options.data)
    wanted = options.steps * options.batch * options.accumulate or len(pairs)
    rows, held_out = common.split_rows(
        pairs, tokenizer, options.tokens, wanted, options.held_out, seed=0
    )
    steps = options.steps or max(1, len(rows) // (options.batch * options.accumulate))
    if tasks.LOCAL in options.tasks:
        found = tasks.documents(held_out, tokenizer, options.questions)
        if not found:
            raise ExampleError(
                "the held-out rows are too few or too short for questions: raise --held-out or "
                "--tokens, or give --tasks none"
            )
        tasks.write(folder, found)
    plain = common.plain_source(source, getattr(torch, options.dtype), str(folder / "model"))
    return Job(
        way=Way("full", "", None), seed=0, source=plain, tokenizer=source, train=rows,
        held_out=held_out, pad_id=pad_id, batch=options.batch, accumulate=options.accumulate,
        steps=steps, rate=0.0, schedule=options.schedule, decay=options.decay,
        device=options.device, dtype=options.dtype, tasks=options.tasks, folder=str(folder),
    )  # fmt: skip


def job_of(job: Job, line: page.Run) -> Job:
    """The job of one run."""
    given: dict[str, Any] = {**vars(job), "way": page.way_of(line), "seed": line["seed"]}
    rows: list[Row] = train.shuffled(job.train, line["seed"])
    return Job(**{**given, "rate": line["rate"], "train": rows})


def read(data: str | None) -> list[Pair]:
    """Pairs of a file, of a data set of the hub, or of installed documentation.

    Raises:
        ExampleError: there is no such data, or it has no instructions and outputs.
    """
    if data is None:
        return common.docstring_pairs(least_characters=600)
    if Path(data).suffix in (".json", ".jsonl") or Path(data).exists():
        return common.read_alpaca(data)
    try:
        from datasets import load_dataset

        found: Any = load_dataset(data, split="train")
    except ImportError as error:
        raise ExampleError(
            '--data of the hub needs datasets: pip install ".[reproduce]"'
        ) from error
    except Exception as error:  # of the network, of the hub, of the data set
        raise ExampleError(f"can't load --data {data}: {error}") from error
    missing = {"instruction", "output"} - {*found.column_names}
    if missing:
        raise ExampleError(f"--data {data} has no {', '.join(missing)}: {found.column_names}")
    return [
        Pair("\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])
        for row in found
        if row["instruction"] and row["output"]
        and row.get("data_source") not in ("airoboros", "leetcode_ne")  # as TokenTune's script
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

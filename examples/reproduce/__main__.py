"""The paper's table, ablations and figures, by one command.

    python examples/reproduce                          # offline: SmolLM2-135M; hours on two cores
    python examples/reproduce --preset small           # minutes
    python examples/reproduce --data my.jsonl          # your own text, in Alpaca's format
    python examples/reproduce --model meta-llama/Llama-3.2-1B --data garage-bAInd/Open-Platypus \
        --tasks mmlu,arc_challenge,hellaswag,truthfulqa_mc2,winogrande     # a GPU and the hub

Each run is a process, and one JSON file when it is done; what has a file is not run again, so that
a call that was stopped, as by Ctrl-C, goes on where it was. What a run needs and the machine lacks,
a package or memory, is named, and the others go on. The page has what the runs found, and is
written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any

if __name__ == "__main__":  # where `common` and the other examples are
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

import common
import programs
from common import ExampleError, ModelSource, Pair, Row, Tokenizer
from quality_page import TEXT
from reproduce import methods, page, paper, tasks, train
from reproduce.methods import Way
from reproduce.train import Job, apart

BUILD = Path(__file__).parents[2] / "build"
SETTING = ("tokens", "batch", "accumulate", "steps", "held_out", "questions", "context", "schedule",
           "decay", "dtype", "device")  # fmt: skip
"""Options that runs of one table have in common, beside model, data and tasks."""
SUFFIXES = (".json", ".jsonl")
PARTS = ("table", "ablations")
LEAST = {"seeds": 1, "batch": 1, "accumulate": 1, "workers": 1, "tokens": 1, "held_out": 1,
         "steps": 0, "context": 0, "decay": 0}  # fmt: skip
Texts = tuple[list[Row], list[Row]]
"""Rows to learn, and held-out ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    common.quiet()
    # The profiler's remarks, one a step, would come between the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    problems: list[str] = []
    failed = 0
    try:
        programs.check_writable("--page", options.page)
        programs.check_writable("--out", options.out, is_folder=True)
        run_all(options, problems)
        write_page(options)
    except ExampleError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        failed = 2
    except KeyboardInterrupt:
        print("\nreproduce: stopped; the same call goes on from here", file=sys.stderr)
        failed = 130
    if problems:
        print("\n".join(["reproduce: these did not run:", *problems]), file=sys.stderr)
    return failed or (1 if problems else 0)


def write_page(options: argparse.Namespace) -> None:
    """The page of the runs, each of which has its file by now."""
    try:
        page.write(options.page, options.out)
    except OSError as error:
        raise ExampleError(f"--page {options.page} cannot be written: {error}") from error
    print(f"\nWritten: {options.page}, from the runs in {options.out}")


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
    add("--also", help="more selections of full, loha and qlora, without --methods: recommended, "
        "parts, or none")  # fmt: skip
    add("--what", help="some of table,ablations")
    add("--ablate", choices=[*methods.TUNERS],
        help="the ablations' tuner (offline: full; else: qlora)")  # fmt: skip
    add("--seeds", type=int, help="runs of each method")
    add("--steps", type=int, help="training steps; 0 for one epoch")
    add("--batch", type=int, help="rows of a forward")
    add("--accumulate", type=int, help="forwards of a step")
    add("--tokens", type=int, help="the longest row")
    add("--held-out", type=int, help="rows to judge by")
    add("--questions", type=int, help="of the task made of the held-out text")
    add("--context", type=int, help="words of its answer that a question has at most; 0 for any")
    add("--rate", type=float, help="learning rate (offline: one for each tuner; else: 4e-4)")
    add("--schedule", help="of the learning rate: one of transformers that needs no options")
    add("--decay", type=float, help="weight decay")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--workers", type=int, default=1, help="runs at a time (%(default)s)")
    add("--out", type=Path, default=BUILD / "reproduction", help="folder of a file a run "
        "(build/reproduction; what stands in docs is in docs/reproduction)")  # fmt: skip
    add("--page", type=Path, help="the page (default: beside --out, with .md)")
    options = parser.parse_args(arguments)
    asked = [name for name in ("methods", "also", "ablate") if getattr(options, name) is not None]
    if "methods" in asked and (options.also or "none") != "none":
        parser.error("--also is for the default methods: name all that are to run in --methods")
    preset = options.preset or ("paper" if options.model else "offline")
    options.page = options.page or Path(f"{options.out.resolve()}.md")
    for name, value in paper.PRESETS[preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("tasks", "also", "what"):
        chosen = getattr(options, name)
        setattr(options, name, [x for x in chosen.split(",") if x and x != "none"])
    for name, known in (("what", PARTS), ("also", methods.SELECTIONS)):
        if unknown := {*getattr(options, name)} - {*known}:
            parser.error(f"--{name} has {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not options.what:
        parser.error(f"--what is empty: give some of {', '.join(PARTS)}")
    for name, part in (("methods", "table"), ("also", "table"), ("ablate", "ablations")):
        if name in asked and part not in options.what:
            parser.error(f"--{name} needs the {part}, which --what or the preset leaves out")
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    programs.check_rate(parser, options.rate)
    if not options.decay < math.inf:
        parser.error("--decay must be finite")
    if reason := train.unusable_schedule(options.schedule):
        parser.error(f"--schedule {options.schedule} can't be used: {reason}")
    if tasks.LOCAL in options.tasks and options.questions < 1:
        parser.error(f"--questions must be at least 1 for {tasks.LOCAL}; or give --tasks none")
    options.device = programs.device_of(parser, options.device)
    try:
        named = [*methods.TABLE, *(f"{x}+{y}" for x in methods.SELECTED for y in options.also)]
        named = named if options.methods is None else options.methods.split(",")
        options.ways = [methods.way_of(text) for text in named]
    except ExampleError as error:
        parser.error(str(error))
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
            "data": data_name(options.data),
            "tasks": ",".join(options.tasks) or "none",
            **{name: getattr(options, name) for name in SETTING},
        },
        "way": vars(way),
        "rate": rate,
        "seed": seed,
    }


def data_name(data: str | None) -> str:
    path = Path(data or TEXT)
    return path.stem if path.suffix in SUFFIXES else path.name


def file_of(folder: Path, line: page.Run) -> Path:
    """The file of a run, whatever it found."""
    key = {name: line[name] for name in ("setting", "way", "rate", "seed")}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{page.way_of(line).slug}-{line['seed']}-{digest}.json"


def run_all(options: argparse.Namespace, problems: list[str]) -> None:
    """Every run that has no file yet; adds to `problems` what did not run, and why."""
    done = page.read(options.out)  # before hours of runs
    problems += lacking_tasks(options)  # which may leave tasks out
    source = common.find_model(options.model)
    lines = [line_of(options, source.name, *one) for one in planned(options)]
    tokenizer = common.load_tokenizer(source)
    texts = texts_of(options, tokenizer)
    origin = common.origin_of(source, texts)
    refuse_other_origin(done, lines, origin)
    files = [file_of(options.out, line) for line in lines]
    problems += filter(None, (unscored(done[file], file) for file in files if file in done))
    left = [line for file, line in zip(files, lines, strict=True) if file not in done]
    lacking = {way: methods.lacking(way) for way in dict.fromkeys(map(page.way_of, left))}
    problems += [f"{way.name}: {reason}" for way, reason in lacking.items() if reason]
    left = [line for line in left if not lacking[page.way_of(line)]]
    if problems:
        print("\n".join(["left out:", *problems]), flush=True)
    if not left:
        return
    with tempfile.TemporaryDirectory() as folder:
        job = first_job(options, source, tokenizer, texts, Path(folder))
        count = f"{len(lines) - len(left)} of {len(lines)} runs are done or left out"
        print(f"{count}; {len(job.train)} rows to learn, {len(job.held_out)} held out.", flush=True)
        run_left(options, left, job, origin, problems)


def run_left(
    options: argparse.Namespace, left: Sequence[page.Run], job: Job, origin: dict[str, str],
    problems: list[str],
) -> None:  # fmt: skip
    """Some runs at a time; when stopped, as by Ctrl-C, it stops those that run and ends."""
    places: SimpleQueue[int] = SimpleQueue()  # of progress bars, below the one of all runs
    for place in range(1, options.workers + 1):
        places.put(place)

    def one(line: page.Run) -> page.Run:
        place = places.get()
        try:
            run = {**line, "origin": origin, "found": apart(job_of(job, line, place))}
        finally:
            places.put(place)
        page.write_run(file_of(options.out, line), run)  # here, for nobody may wait any more
        return run

    threads = ThreadPoolExecutor(options.workers)
    running: dict[Future[page.Run], page.Run] = {}
    try:
        with tqdm(total=len(left), desc="reproduce", unit="run", smoothing=0) as bar:
            for line in left:
                running[threads.submit(one, line)] = line
            for future in as_completed(running):
                line, name = running[future], page.name_of(running[future])
                bar.set_postfix_str(name)
                try:
                    reason = unscored(future.result(), file_of(options.out, line))
                    problems += [reason] if reason else []
                except BrokenProcessPool:
                    problems.append(f"{name}: its process was killed, as by too little memory")
                except Exception as error:
                    problems.append(f"{name}: {type(error).__name__}: {error}")
                with contextlib.suppress(ExampleError, OSError):  # which the last writing raises
                    page.write(options.page, options.out)
                bar.update()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in running):
            for child in multiprocessing.active_children():
                child.kill()
            time.sleep(0.05)  # a thread may be about to start a process


def unscored(run: page.Run, file: Path) -> str | None:
    """Why a run has no score, and what to do."""
    reason = run["found"].get("unscored")
    return reason and f"{page.name_of(run)}: no score ({reason}): delete {file} to run it again"


def lacking_tasks(options: argparse.Namespace) -> list[str]:
    """Leave tasks out that can't be had; the held-out loss remains."""
    reason = tasks.lacking() if options.tasks else None
    found = dict.fromkeys(options.tasks, reason) if reason else tasks.unusable(options.tasks)
    options.tasks = [name for name in options.tasks if name not in found]
    aside = "; runs go on without it, and make a table of their own"
    return [f"task {name}: {reason}{aside}" for name, reason in found.items()]


# ------------------------------------------------------------------------------ what they share


def texts_of(options: argparse.Namespace, tokenizer: Tokenizer) -> Texts:
    pairs = read(options.data)
    wanted = options.steps * options.batch * options.accumulate or len(pairs)
    return common.split_rows(pairs, tokenizer, options.tokens, wanted, options.held_out, seed=0)


def refuse_other_origin(
    done: dict[Path, page.Run], lines: Sequence[page.Run], origin: dict[str, str]
) -> None:
    """Runs of one table are of the same rows and model; older files don't say.

    Raises:
        ExampleError: a run has the setting of these, and was of other rows or another model.
    """
    settings = [line["setting"] for line in lines]
    for file, run in done.items():
        if run["setting"] in settings and (other := common.other_origin(run, origin)):
            raise ExampleError(f"{file} was run with {other}: give another --out, or delete it")


def first_job(
    options: argparse.Namespace, source: ModelSource, tokenizer: Tokenizer, texts: Texts,
    folder: Path,
) -> Job:  # fmt: skip
    """What all runs have in common: the model, the text and the tasks."""
    pad_id = common.pad_id_of(tokenizer)
    rows, held_out = texts
    steps = options.steps or max(1, len(rows) // (options.batch * options.accumulate))
    if tasks.LOCAL in options.tasks:
        found = tasks.documents(held_out, tokenizer, options.questions, options.context)
        if not found:
            raise ExampleError(
                "the held-out rows are too few or too short for questions: raise --held-out or "
                "--tokens, or give --tasks none"
            )
        tasks.write(folder, found)
    plain = common.plain_source(source, getattr(torch, options.dtype), str(folder / "model"))
    if plain is not source:
        tokenizer.save_pretrained(plain.location)  # from GGUF it takes seconds, too
    return Job(
        way=Way("full", "", None), seed=0, source=plain, train=rows,
        held_out=held_out, pad_id=pad_id, batch=options.batch, accumulate=options.accumulate,
        steps=steps, rate=0.0, schedule=options.schedule, decay=options.decay,
        device=options.device, dtype=options.dtype, tasks=options.tasks, folder=str(folder),
        room=train.available(options.device) // options.workers, place=1,
    )  # fmt: skip


def job_of(job: Job, line: page.Run, place: int) -> Job:
    """The job of one run."""
    rows: list[Row] = train.shuffled(job.train, line["seed"])
    return dataclasses.replace(
        job, way=page.way_of(line), seed=line["seed"], rate=line["rate"], train=rows, place=place
    )


def read(data: str | None) -> list[Pair]:
    """Pairs of a file, of a data set of the hub, or of installed documentation.

    Raises:
        ExampleError: there is no such data, or it has no instructions and outputs.
    """
    if data is None:
        return common.docstring_pairs(least_characters=600)
    if Path(data).suffix in SUFFIXES or Path(data).exists():
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

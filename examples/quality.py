"""What a share of the tokens teaches: held-out loss by ways to select, over seeds.

    python examples/quality.py                     # or: make quality ARGS="--tunings lora"
    python examples/quality.py --what runs --workers 15    # on a GPU, several small runs at a time

First a few steps of each way are timed and their memory measured, in turns with those of gradient
checkpointing. Then each run trains a real model for some steps. Each timing and each run adds a
line to a file; what is in the file is not run again, whatever machine ran it, so that a call that
was stopped goes on where it was. The page has each way's held-out loss, and its gain against steps
and against time, as the mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import benchmark_page
import common
import processes
import programs
import quality_page
from common import ExampleError, ModelSource, Row

BUILD = Path(__file__).parents[1] / "build"
SHARES = (0.1, 0.25, 0.5)
# The ways that have a ratio: name and options of fxseek.compile. "As published" selects among all
# tokens, as the papers do; the other ways among those that have a label.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokentune": ("TokenTune as published", {"score": "random"}),
    "tokenseek": ("TokenSeek as published", {}),
    "sampled": ("sampled tokens", {"score": "gradient", "select": "sample"}),
    "sinks": (
        "sampled tokens and the first",
        {"score": "gradient", "select": "sample", "sinks": 1},
    ),
    "spans": ("sampled spans of 8", {"score": "gradient", "select": "sample", "span": 8}),
    "random": ("random labelled tokens", {"score": "random", "supervised_only": True}),
    "windows": (
        "random labelled spans of 32",
        {"score": "random", "supervised_only": True, "span": 32},
    ),
}
# The name and the options of each way; None is a way without fxseek.
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "ordinary": ("ordinary", None),
    "checkpointing": ("gradient checkpointing", None),
    "every": ("every token, in parts of 128", {"ratio": 1.0, "learn_chunk": 128}),
    "labelled": ("labelled tokens", {"ratio": "labelled"}),
    **{
        f"{family}-{share}": (f"{name}, {round(100 * share)} %", {"ratio": share, **options})
        for share in SHARES
        for family, (name, options) in FAMILIES.items()
    },
    "growing": (
        "sampled tokens, 10 % to 50 %",
        {"ratio": "0.1->0.5", "score": "gradient", "select": "sample"},
    ),
}
TIMED_PAIRS = 5  # the first is not counted
KILLED = (
    "a process was killed, as by too little memory, and with it the runs beside it and those to "
    "come: lower --workers, and the same call goes on"
)
LOWEST = {"steps": 1, "seeds": 1, "first_seed": 0, "every": 1, "batch": 1, "workers": 1,
          "tokens": 2, "held_out": 1}  # fmt: skip
"""The least that options may be."""


Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run, with everything that its process needs."""

    arm: str
    tuning: str
    seed: int
    source: ModelSource
    train: list[Row]
    held_out: list[Row]
    pad_id: int
    batch: int
    steps: int
    every: int
    rate: float
    device: str
    dtype: str
    threads: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    errors: list[str] = []
    try:
        programs.check_writable("--page", options.page)
        programs.check_writable("--out", options.out)
        try:
            run_all(options)
        except ExampleError as error:
            errors.append(str(error))
        finally:
            write_page(options)
    except ExampleError as error:
        errors += [str(error)] if str(error) not in errors else []
    except KeyboardInterrupt:
        print("\nquality: stopped; the same call goes on from here", file=sys.stderr)
        return 130
    for error in errors:
        print(f"quality: {error}", file=sys.stderr)
    return 2 if errors else 0


def write_page(options: argparse.Namespace) -> None:
    """The page of the runs, where there are any."""
    if not options.out.exists():
        return
    try:
        quality_page.write(options.page, options.out)
    except OSError as error:
        raise ExampleError(f"--page {options.page} cannot be written: {error}") from error
    print(f"\nWritten: {options.page}, from {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", help="a JSONL file in Alpaca's format (default: docstrings)")
    add("--tunings", default="lora,full", help="some of %(default)s")
    add("--arms", default=",".join(ARMS), help="some of %(default)s")
    add("--seeds", type=int, default=3, help="runs of each way (%(default)s)")
    add("--first-seed", type=int, default=0, help="the first run's seed (%(default)s)")
    add("--steps", type=int, default=64, help="training steps (%(default)s)")
    add("--every", type=int, default=16, help="steps between two evaluations (%(default)s)")
    add("--batch", type=int, default=4, help="rows of a step (%(default)s)")
    add("--tokens", type=int, default=768, help="the longest row (%(default)s)")
    least = quality_page.LEAST
    add("--least", type=int, help=f"characters of the shortest docstring ({least})")
    add("--held-out", type=int, default=24, help="rows to judge by (%(default)s)")
    add("--rate", type=float, help="learning rate (default: 5e-4 for LoRA, 2e-5 for full)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--what", default="timings,runs", help="some of %(default)s")
    add("--workers", type=int, default=1, help="runs at a time (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--out", type=Path, default=BUILD / "quality.jsonl", help="a line a run "
        "(build/quality.jsonl; what stands in docs is in docs/quality.jsonl)")  # fmt: skip
    add("--page", type=Path, help="the page (default: beside --out, with .md)")
    options = parser.parse_args(arguments)
    kinds = ["timings", "runs"]
    for name, known in (("tunings", ["lora", "full"]), ("arms", list(ARMS)), ("what", kinds)):
        chosen = getattr(options, name).split(",")
        unknown = [choice for choice in chosen if choice not in known]
        if unknown:
            parser.error(f"--{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    for name, smallest in LOWEST.items():
        if getattr(options, name) < smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}")
    if options.data and options.least is not None:
        parser.error("--least is for docstrings: leave it out where --data is given")
    if not options.data and options.least is None:
        options.least = least
    options.page = options.page or options.out.with_suffix(".md")
    programs.check_rate(parser, options.rate)
    options.device = programs.device_of(parser, options.device)
    return options


def run_all(options: argparse.Namespace) -> None:
    """Every run that the file does not have yet.

    Raises:
        ExampleError: some did not run, and why; or the file has runs of other data or another model
            of these names.
    """
    common.quiet()
    known = quality_page.read(options.out)
    source = common.find_model(options.model)
    lines = [*settings(options, source.name)]
    tokenizer = common.load_tokenizer(source)
    if options.data:
        pairs = common.read_alpaca(options.data)
    else:
        pairs = common.docstring_pairs(least_characters=options.least)
    asked = {quality_page.setting(line) for line in lines}
    table = [line for line in known if quality_page.setting(line) in asked]  # whatever the way
    # The documentation of other seeds may be that of another machine; a file is the same for all.
    told = [*lines, *table] if options.data else lines
    rows = {
        seed: common.split_rows(
            pairs, tokenizer, options.tokens, options.steps * options.batch, options.held_out, seed
        )
        for seed in {line["seed"] or 0 for line in told}
    }
    origins = {seed: common.origin_of(source, some) for seed, some in rows.items()}
    (model,) = {origin["model"] for origin in origins.values()}
    for line in table:
        own = {"model": model, "rows": line.get("origin", {}).get("rows")}
        origin = origins.get(line["seed"] or 0, own)
        if other := common.other_origin(line, origin):
            raise ExampleError(
                f"{options.out} has a run of {line['arm']} with {other}: give another --out"
            )
    done = {quality_page.key(line) for line in known}
    left = [line for line in lines if quality_page.key(line) not in done]
    if not left:
        return
    pad_id = common.pad_id_of(tokenizer)
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(left), desc="quality") as bar:
        # dequantised once, not in every process
        source = common.plain_source(source, getattr(torch, options.dtype), folder)

        def job_of(line: Line) -> Job:
            seed = line["seed"] or 0
            train, held_out = rows[seed]
            return Job(
                arm=line["arm"], tuning=line["tuning"], seed=seed, source=source, train=train,
                held_out=held_out, pad_id=pad_id, batch=options.batch, steps=options.steps,
                every=options.every, rate=line["rate"], device=options.device,
                dtype=options.dtype, threads=None if options.workers == 1 else 1,
            )  # fmt: skip

        timings = [line for line in left if line["seed"] is None]
        runs = [line for line in left if line["seed"] is not None]
        for call, workers, some in ((time_pairs, 1, timings), (run, options.workers, runs)):
            with processes.pool(workers) as pool:
                running = {pool.submit(call, job_of(line)): line for line in some}
                for future in as_completed(running):
                    line = running[future]
                    bar.update()
                    try:
                        found = future.result()
                    except Exception as error:
                        reason = KILLED if isinstance(error, BrokenProcessPool) else error
                        failed.append(f"{line['arm']}, {line['tuning']}: {reason}")
                        continue
                    found["origin"] = origins[line["seed"] or 0]
                    common.append_line(options.out, {**line, **found})
    if failed:
        raise ExampleError("\n".join(["these did not run:", *failed]))


def settings(options: argparse.Namespace, model: str) -> Iterator[Line]:
    """What each timing and run is, without what it finds; a timing has no seed.

    Seed by seed, so that early ones are comparable.
    """
    seeds: list[int | None] = [None] if "timings" in options.what else []
    if "runs" in options.what:
        seeds += range(options.first_seed, options.first_seed + options.seeds)
    for tuning in options.tunings:
        for seed in seeds:
            for arm in options.arms:
                yield {
                    "model": model,
                    "data": Path(options.data).stem if options.data else quality_page.TEXT,
                    "least": options.least,
                    "tuning": tuning,
                    "tokens": options.tokens,
                    "batch": options.batch,
                    "steps": options.steps,
                    "every": options.every,
                    "held_out": options.held_out,
                    "rate": options.rate or quality_page.RATES[tuning],
                    "dtype": options.dtype,
                    "device": options.device,
                    "arm": arm,
                    "name": ARMS[arm][0],
                    "seed": seed,
                }


def run(job: Job) -> dict[str, Any]:
    """Train one way: its held-out losses by step."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    model = start(job)
    compile_arm(model, job.arm, job)
    optimizer = optimizer_of(model, job)
    judged = (job.held_out, job.pad_id, device)
    losses = [(0, common.held_out_loss(model, *judged))]
    model.train()
    for step in range(job.steps):
        batch = common.batch_of(job.train, step, job.batch, job.pad_id, device)
        train_step(model, optimizer, batch)
        if (step + 1) % job.every == 0 or step + 1 == job.steps:
            losses.append((step + 1, common.held_out_loss(model, *judged)))
            if not math.isfinite(losses[-1][1]):
                raise ExampleError(
                    f"it diverged, the held-out loss is {losses[-1][1]}: lower --rate"
                )
    forget(device)
    return {"losses": losses, **told(job.train), "machine": machine(device)}


def time_pairs(job: Job) -> dict[str, Any]:
    """A step of the way and one of gradient checkpointing in turns.

    The seconds of each pair and their medians; and the bytes that the first forward keeps for its
    backward, and the most that a step takes, of the one and of the other.
    """
    device = torch.device(job.device)
    model = start(job)
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    compile_arm(model, job.arm, job, timed=True)
    compile_arm(other, "checkpointing", job)
    optimizer = optimizer_of(model, job)
    seconds: tuple[list[float], list[float]] = [], []
    saved = [0, 0]
    peaks: tuple[list[int], list[int]] = [], []
    for step in range(TIMED_PAIRS):
        batch = common.batch_of(job.train, step, job.batch, job.pad_id, device)
        for at, one in enumerate((model.train(), other.train())):
            with common.PeakBytes(device) as peak, common.timed(device, seconds[at]):
                saved[at] += train_step(one, optimizer, batch, count=step == 0)  # not timed
            peaks[at].append(peak.bytes)
    forget(device)
    pairs = [*zip(*seconds, strict=True)][1:]
    own, pace = map(statistics.median, zip(*pairs, strict=True))
    return {
        "pairs": pairs,
        "seconds": own,
        "checkpointing": pace,
        "saved": saved,
        "peaks": [max(some[1:]) for some in peaks],
        "machine": machine(device),
    }


def told(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows of a run are: the shortest, the median, the longest; the share with labels."""
    lengths = sorted(len(row.ids) for row in rows)
    labels = sum(label != common.IGNORED for row in rows for label in row.labels[1:])
    return {
        "lengths": [lengths[0], round(statistics.median(lengths)), lengths[-1]],
        "labelled": labels / sum(lengths),
    }


def start(job: Job) -> nn.Module:
    """The model of a run, before its first step."""
    common.quiet()
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    model: nn.Module = common.load_model(job.source, getattr(torch, job.dtype))
    if job.tuning == "lora":
        model = common.add_lora(model, job.seed)
    return nn.Module.to(model, device)


def compile_arm(model: nn.Module, arm: str, job: Job, *, timed: bool = False) -> None:
    """Let a model train in the given way; where it is timed, at the mean of a ratio that grows."""
    given = ARMS[arm][1]
    if given is not None:
        import fxseek

        if "->" in str(given["ratio"]):
            low, high = map(float, given["ratio"].split("->"))
            changed = {"ratio": (low + high) / 2} if timed else {"ratio_steps": job.steps}
            given = {**given, **changed}
        fxseek.compile(model, seed=job.seed, **given)
    elif arm == "checkpointing":
        common.checkpoint(model)


def optimizer_of(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], *, count: bool = False
) -> int:
    """A step; where asked for, which takes time, the bytes that its forward keeps for backward."""
    with common.SavedBytes(model) if count else contextlib.nullcontext() as saved:
        loss = model(**batch).loss
        nbytes = 0 if saved is None else saved.bytes()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return nbytes


def forget(device: torch.device) -> None:
    """Free what Dynamo and the allocator keep, for the next run of this process."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {benchmark_page.processor()}"


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune a real language model in six ways and compare them: memory, time, held-out loss.

    python examples/demo.py
    python examples/demo.py --data my.jsonl --model Qwen/Qwen2.5-0.5B --full

The ways are ordinary fine-tuning, gradient checkpointing, fxseek on every token in parts (which
learns the same), on the labelled tokens, on a quarter of all, sampled among the labelled ones by
their gradients, and TokenSeek, as the paper has it, on the tenth that scores best. Each starts from
the same weights and sees the same batches in the same order, in a process of its own, so that their
memory can be compared. They are judged after the same number of steps, and when their steps have
taken as long as those of gradient checkpointing. A page shows which tokens TokenSeek has selected
in its last step. Without --data the text is the documentation of installed libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
import processes
import programs
from common import ExampleError, ModelSource, Row, Tokenizer

# The options of fxseek.compile for each way; None is a way without fxseek.
METHODS: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "checkpointing": None,
    "every": {"ratio": 1.0, "learn_chunk": 128},
    "labelled": {"ratio": "labelled", "learn_chunk": 128},
    "sampled": {"ratio": 0.25, "score": "gradient", "select": "sample"},
    "tokenseek": {"ratio": 0.1},
}
NAMES = {
    "ordinary": "ordinary",
    "checkpointing": "gradient checkpointing",
    "every": "fxseek, every token",
    "labelled": "fxseek, labelled tokens",
    "sampled": "fxseek, sampled, 25 %",
    "tokenseek": "fxseek, TokenSeek, 10 %",
}
SHOWN = "tokenseek"  # a page shows its last step
PACE = "checkpointing"  # equal time is the time that its steps take
MOST = 4  # times as many steps as the others, in equal time
UNTIMED_STEPS = 2  # the first captures the graph; in the second saved tensors are counted


@dataclass(frozen=True)
class Job:
    """One way to fine-tune, with everything its process needs."""

    method: str
    source: ModelSource
    train: list[Row]
    held_out: list[Row]
    tokenizer: Tokenizer
    page: Path
    batch: int
    steps: int
    seconds: float | None  # of equal time; None where it is not known
    judge_first: bool  # the loss before training, which is the same for all
    full: bool
    rate: float
    seed: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Result:
    """What one way cost and what it reached. Losses are in nats per token."""

    method: str
    saved_bytes: int
    peak_bytes: int
    first_bytes: int
    step_seconds: float
    loss_before: float | None
    loss_after_steps: float
    loss_at_time: float | None
    steps_at_time: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        results = compare(options)
    except ExampleError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    show(results, options)
    return 0 if len(results) == len(options.methods) else 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", help="a JSONL file in Alpaca's format (default: docstrings)")
    add("--full", action="store_true", help="train every parameter, not LoRA adapters")
    add("--methods", default=",".join(METHODS), help="some of %(default)s")
    add("--steps", type=int, default=8, help="training steps of each way (%(default)s)")
    add("--batch", type=int, default=1, help="rows of a step (%(default)s)")
    add("--tokens", type=int, default=512, help="the longest row (%(default)s)")
    add("--held-out", type=int, default=8, help="rows to judge by (%(default)s)")
    add("--rate", type=float, help="learning rate (default: 5e-4 for LoRA, 2e-5 for --full)")
    add("--seed", type=int, default=0, help="of the split, the order and the adapters")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--page", type=Path, default=Path("build/tokens.html"), help="of tokens (%(default)s)")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods has {', '.join(unknown)}; the ways are {', '.join(METHODS)}")
    for name, least in (("steps", UNTIMED_STEPS + 1), ("batch", 1), ("tokens", 2), ("held_out", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    programs.check_rate(parser, options.rate)
    options.device = programs.device_of(parser, options.device)
    options.rate = options.rate or (2e-5 if options.full else 5e-4)
    return options


def compare(options: argparse.Namespace) -> list[Result]:
    """Prepare the model and the text, then run each way in a fresh process."""
    common.quiet()
    if SHOWN in options.methods:
        programs.check_writable("--page", options.page)
    source = common.find_model(options.model)
    print(f"Loading {source.name} ...", flush=True)
    tokenizer = common.load_tokenizer(source)
    if options.data:
        pairs = common.read_alpaca(options.data)
    else:
        pairs = common.docstring_pairs(least_characters=600)
    rows = MOST * options.steps * options.batch  # quick ways take more steps in equal time
    train, held_out = common.split_rows(
        pairs, tokenizer, options.tokens, rows, options.held_out, options.seed
    )
    labelled = sum(label != common.IGNORED for row in train for label in row.labels)
    print(
        f"{len(train)} examples to learn ({labelled} answer tokens) and {len(held_out)} held out, "
        f"from {options.data or 'the docstrings of installed libraries'}; "
        f"{options.steps} steps of {options.batch}.",
        flush=True,
    )
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        # dequantised once, not in every process
        source = common.plain_source(source, getattr(torch, options.dtype), folder)
        for method in sorted(options.methods, key=lambda method: method != PACE):
            pace = results.get(PACE)
            job = Job(
                method=method, source=source, train=train, held_out=held_out,
                tokenizer=tokenizer, page=options.page, batch=options.batch, steps=options.steps,
                seconds=None if pace is None else pace.step_seconds * options.steps,
                judge_first=not results, full=options.full, rate=options.rate, seed=options.seed,
                device=options.device, dtype=options.dtype,
            )  # fmt: skip
            try:
                results[method] = processes.apart(run, job)
            except BrokenProcessPool:
                print(f"{NAMES[method]}: {processes.KILLED}", file=sys.stderr)
    if not results:
        raise ExampleError("no way has a result")
    return [results[method] for method in options.methods if method in results]


def run(job: Job) -> Result:
    """Fine-tune one way and measure it."""
    # Imported before memory is measured: its modules are no part of a step.
    import torch._dynamo
    import torch.fx.experimental.symbolic_shapes

    common.quiet()
    device = torch.device(job.device)
    model: nn.Module = common.load_model(job.source, getattr(torch, job.dtype))
    if not job.full:
        model = common.add_lora(model, job.seed)
    model = nn.Module.to(model, device)
    options = METHODS[job.method]
    if options is not None:
        import fxseek

        fxseek.compile(model, seed=job.seed, **options)
    elif job.method == "checkpointing":
        common.checkpoint(model)
    pad_id = common.pad_id_of(job.tokenizer)
    judged = (job.held_out, pad_id, device)
    before = common.held_out_loss(model, *judged) if job.judge_first else None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)
    seconds: list[float] = []
    saved_bytes: list[int] = []
    after_steps: float | None = None
    at_time: tuple[float, int] | None = None
    model.train()
    bar = tqdm(desc=f"{NAMES[job.method]:24}", unit="step", total=job.steps)

    def learn(step: int) -> None:
        batch = common.batch_of(job.train, step, job.batch, pad_id, device)
        counted = common.SavedBytes(model) if step == 1 else contextlib.nullcontext()
        with common.timed(device, seconds):
            with counted as saved:
                loss: Tensor = model(**batch).loss
                if saved is not None:
                    saved_bytes.append(saved.bytes())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    with common.PeakBytes(device) as first:
        for step in range(UNTIMED_STEPS):
            learn(step)
    done, peak_bytes, most = UNTIMED_STEPS, 0, job.seconds
    while after_steps is None or (at_time is None and most is not None and done < MOST * job.steps):
        ends = in_time = False
        with common.PeakBytes(device) as peak:  # of steps: an evaluation takes memory, too
            while not ends and not in_time and done < MOST * job.steps:
                learn(done)
                done += 1
                ends = done == job.steps
                if done == UNTIMED_STEPS + 1 and _steps_in(seconds, most) < done:
                    most = None  # it was over before the pace was known
                in_time = at_time is None and _steps_in(seconds, most) <= done
        peak_bytes = max(peak_bytes, peak.bytes)
        if ends or in_time:
            found = common.held_out_loss(model, *judged)
            after_steps = found if ends else after_steps
            at_time = (found, done) if in_time else at_time
    bar.close()
    assert after_steps is not None
    if job.method == SHOWN:
        import fxseek

        fxseek.report(model).to_html(job.tokenizer, job.page)
    if job.method == PACE:
        at_time = (after_steps, job.steps)
    return Result(
        method=job.method,
        saved_bytes=saved_bytes[0],
        peak_bytes=peak_bytes,
        first_bytes=first.bytes,
        step_seconds=statistics.median(seconds[UNTIMED_STEPS:]),
        loss_before=before,
        loss_after_steps=after_steps,
        loss_at_time=None if at_time is None else at_time[0],
        steps_at_time=None if at_time is None else at_time[1],
    )


def _steps_in(seconds: Sequence[float], most: float | None) -> float:
    """How many steps fit the time, if all take what the median takes."""
    if most is None:
        return math.inf
    return most // statistics.median(seconds[UNTIMED_STEPS:])


def show(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Print the table and what its columns mean."""
    header = [
        *("", "saved MiB", "peak MiB", "first step", "s / step", "loss", "steps"),
        "loss at equal time",
    ]
    rows = [
        [
            NAMES[result.method],
            f"{result.saved_bytes / common.MIB:.0f}",
            f"{result.peak_bytes / common.MIB:.0f}",
            f"{result.first_bytes / common.MIB:.0f}",
            f"{result.step_seconds:.2f}",
            f"{result.loss_after_steps:.3f}",
            "-" if result.steps_at_time is None else str(result.steps_at_time),
            "-" if result.loss_at_time is None else f"{result.loss_at_time:.3f}",
        ]
        for result in results
    ]
    what = "every parameter" if options.full else "LoRA adapters"
    before = next(result.loss_before for result in results if result.loss_before is not None)
    print(f"\nTraining {what} ({options.device}), {options.steps} steps, from {before:.3f}:\n")
    print(common.table(header, rows))
    print(
        "\nsaved: what one forward keeps for its backward, parameters aside; peak: the most memory "
        "that steps used, above the model's and the optimiser's; first step: the same of the first "
        "two steps, above the model's, where fxseek captures the graph (in host memory); loss: "
        "nats per held-out answer token, of the ordinary model, after these steps, and after as "
        "many as fit the time that gradient checkpointing took."
    )
    if any(result.method == SHOWN for result in results):
        print(f"\nThe tokens of a step: {options.page}")


if __name__ == "__main__":
    sys.exit(main())

"""TRL's trainers beside themselves with fxseek: time and memory of their training steps.

The three programs `trl_sft.py`, `trl_dpo.py` and `trl_grpo.py` share this: each makes a trainer as
TRL's documentation does, and the only line of fxseek is `fxseek.compile(trainer.model, ...)`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

import common
import processes
import programs
from common import ExampleError, ModelSource, Pair, Tokenizer

# Options of fxseek.compile; None is TRL alone, which checkpoints by itself.
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "trl": ("TRL, gradient checkpointing", None),
    "every": ("fxseek, every token in parts", {"ratio": 1.0}),
    "share": ("fxseek, sampled tokens in parts", {"score": "gradient", "select": "sample"}),
}
UNTIMED_STEPS = 2


class Given(NamedTuple):
    """What a program makes its trainer of."""

    model: nn.Module
    tokenizer: Tokenizer
    pairs: list[Pair]
    settings: dict[str, Any]
    options: argparse.Namespace


@dataclass(frozen=True)
class Job:
    """One way, with everything that its process needs."""

    way: str
    trainer: Callable[[Given], Any]
    source: ModelSource
    pairs: list[Pair]
    options: argparse.Namespace
    folder: str


@dataclass(frozen=True)
class Result:
    """What a way's training steps took, without generation, and the mean of the last losses."""

    way: str
    seconds: float
    peak_bytes: int
    loss: float


class Meter(TrainerCallback):
    """Times training steps, and their peak behind the untimed ones, and moves a bar."""

    def __init__(self, device: torch.device, steps: int, name: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.bar = tqdm(total=steps, desc=f"{name:32}", unit="step")
        self.peak = common.PeakBytes(device)
        self.entered = False
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        if len(self.seconds) == UNTIMED_STEPS and not self.entered:
            self.peak.__enter__()
            self.entered = True
        common.synchronise(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        common.synchronise(self.device)
        self.seconds.append(time.perf_counter() - self.start)
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Note the peak."""
        self.bar.close()
        if self.entered:
            self.peak.__exit__()


def main(
    name: str, trainer: Callable[[Given], Any], arguments: Sequence[str] | None, **defaults: Any
) -> int:
    """Run each way in a fresh process, and print a table."""
    options = parse(name, arguments, defaults)
    try:
        results = compare(trainer, options)
    except ExampleError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    first = results[0]
    header = ["", "s / step", f"of {first.way}", "peak MiB", f"of {first.way}", "loss"]
    rows = [
        [
            WAYS[result.way][0],
            f"{result.seconds:.2f}",
            f"{result.seconds / first.seconds:.2f}×",
            f"{result.peak_bytes / 2**20:.0f}",
            f"{result.peak_bytes / first.peak_bytes:.2f}×",
            f"{result.loss:.3f}",
        ]
        for result in results
    ]
    print(f"\n{common.table(header, rows)}")
    print("Peaks are above what there is before a step: weights, and the optimiser's state.")
    return 0 if len(results) == len(options.ways) else 2


def parse(
    name: str, arguments: Sequence[str] | None, defaults: dict[str, Any]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name)
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", help="a JSONL file in Alpaca's format (default: docstrings)")
    add("--ways", default=",".join(WAYS), help="some of %(default)s")
    add("--ratio", type=float, default=0.5, help="share of tokens of the last way (%(default)s)")
    add("--learn-chunk", type=int, default=128, help="tokens of a part (%(default)s)")
    add("--steps", type=int, default=8, help="training steps of each way (%(default)s)")
    add("--batch", type=int, default=2, help="rows of a step (%(default)s)")
    add("--tokens", type=int, default=512, help="the longest row, or completion (%(default)s)")
    add("--full", action="store_true", help="train every parameter, not LoRA adapters")
    add("--rate", type=float, default=1e-4, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    options.ways = options.ways.split(",")
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        parser.error(f"--ways has {', '.join(unknown)}; there are {', '.join(WAYS)}")
    if options.steps <= UNTIMED_STEPS:
        parser.error(f"--steps must be at least {UNTIMED_STEPS + 1}")
    programs.check_rate(parser, options.rate)
    options.device = programs.device_of(parser, options.device)
    return options


def compare(trainer: Callable[[Given], Any], options: argparse.Namespace) -> list[Result]:
    common.quiet()
    source = common.find_model(options.model)
    if options.data:
        pairs = common.read_alpaca(options.data)
    else:
        pairs = common.docstring_pairs(least_characters=900)
    pairs = pairs[: 2 * options.steps * options.batch]
    with tempfile.TemporaryDirectory() as folder:
        # dequantised once, not in every process
        plain = common.plain_source(source, torch.float32, folder)
        if plain is not source:
            common.load_tokenizer(source).save_pretrained(folder)
        results = []
        for way in options.ways:
            job = Job(way, trainer, plain, pairs, options, folder)
            try:
                results.append(processes.apart(run, job))
            except BrokenProcessPool:
                print(f"{WAYS[way][0]}: {processes.KILLED}", file=sys.stderr)
    if not results:
        raise ExampleError("no way has a result")
    return results


def run(job: Job) -> Result:
    """Train one way and measure it."""
    common.quiet()
    logging.getLogger("fxseek").setLevel(logging.ERROR)
    options = job.options
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model: Any = common.load_model(job.source, torch.float32)
    settings = {
        "output_dir": f"{job.folder}/{job.way}",
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.rate,
        "logging_steps": 1,
        "use_cpu": options.device == "cpu",
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": options.seed,
    }
    given = Given(model, common.load_tokenizer(job.source), job.pairs, settings, options)
    trainer = job.trainer(given)
    name, chosen = WAYS[job.way]
    if chosen is not None:
        import fxseek

        parts = {"learn_chunk": options.learn_chunk, "seed": options.seed}
        fxseek.compile(trainer.model, **{"ratio": options.ratio, **parts, **chosen})
    meter = Meter(device, options.steps, name)
    trainer.add_callback(meter)
    trainer.train()
    seconds = statistics.median(meter.seconds[UNTIMED_STEPS:])
    loss = statistics.mean(meter.losses[-3:])
    return Result(job.way, seconds, meter.peak.bytes, loss)


def adapters(options: argparse.Namespace) -> Any:
    """The adapters to train, or None for every parameter."""
    from peft import LoraConfig

    if options.full:
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def chat(pair: Pair) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Prompt and answer as conversations."""
    return (
        [{"role": "user", "content": pair.instruction}],
        [{"role": "assistant", "content": pair.answer}],
    )

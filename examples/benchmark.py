"""Measure a training step of ordinary fine-tuning, fxseek and others: seconds and memory.

    python examples/benchmark.py
    python examples/benchmark.py --tokens 512 --repeats 1 --output -
    python examples/benchmark.py --device cuda --dtype bfloat16 --tokens 4096

A step is a forward (with all of fxseek's stages) and its backward; the optimiser isn't in it. For
each kind of tuning and each length a fresh process runs all ways, which take turns, step by step,
and share one set of weights: a slower moment of the machine meets all of them. Results go into
docs/benchmarks.md as they come, between the markers of their setting, with plots beside the page;
--output - only prints them. --keep FILE remembers them, so that a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import benchmark_page
import common
import peak
import processes
import programs
import ways
from benchmark_page import Measured, Part
from common import ExampleError

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
LENGTHS = "512,1024,2048,4096"
PART_LENGTHS = "1024,2048,4096,8192"
SHORT = 1024  # tokens of a row by which fxseek captures: its graphs serve all lengths
UNTIMED = 2  # rounds: one captures, one counts bytes
KILLED = "its process was killed, as a machine with too little memory does"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    common.quiet()
    # The profiler's remarks, one a step, would come between the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parts: dict[tuple[str, int], Part] = {}
    try:
        if options.keep is not None:
            programs.check_writable("--keep", options.keep)
        for tokens in options.tokens:
            for tuning in options.tunings:
                parts[tuning, tokens] = remembered(tuning, tokens, options)
                if options.output != "-":
                    benchmark_page.write(Path(options.output), parts, options)
    except ExampleError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print(f"\n{benchmark_page.text(parts, options)}")
    if options.output != "-":
        print(f"\nWritten into {options.output}.")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--tokens", help=f"lengths of a row (default: {LENGTHS}; in parts {PART_LENGTHS})")
    add("--batch", type=int, default=1, help="rows (%(default)s)")
    add("--ratio", type=float, default=0.1, help="share of tokens to train on (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--backend", default="eager", help="what runs fxseek's stages (%(default)s)")
    add("--tunings", default="full,lora", help="some of %(default)s")
    selecting = [way for way in ways.WAYS if way not in ways.PARTS]
    add("--methods", default=",".join(selecting), help="'parts', or some of %(default)s")
    few = "default: 5, above 1024 tokens 3, in parts above 2048 1"
    add("--repeats", type=int, help=f"steps of each way to time ({few})")
    add("--output", default=str(PAGE), help="the page to write into, - for none (%(default)s)")
    add("--keep", type=Path, help="a file that remembers results, made if missing")
    options = parser.parse_args(arguments)
    options.in_parts = options.methods == "parts"
    if options.in_parts:
        options.methods = ",".join([*ways.AGAINST_PARTS, *ways.PARTS])
    for name, known in (("tunings", ["full", "lora"]), ("methods", list(ways.WAYS))):
        chosen = getattr(options, name).split(",")
        unknown = [choice for choice in chosen if choice not in known]
        if unknown:
            parser.error(f"--{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    lengths = options.tokens or (PART_LENGTHS if options.in_parts else LENGTHS)
    try:
        options.tokens = sorted({int(length) for length in lengths.split(",")})
    except ValueError:
        parser.error(f"--tokens is {lengths}; it must be lengths, such as {LENGTHS}")
    if options.tokens[0] < 2 or (options.repeats is not None and options.repeats < 1):
        parser.error("--tokens must be at least 2 and --repeats at least 1")
    options.device = programs.device_of(parser, options.device)
    if options.output != "-":
        if not Path(options.output).exists():
            parser.error(f"--output {options.output} doesn't exist: name a page, or - for none")
        plots = len(options.tokens) > 1 and not options.in_parts
        if plots and importlib.util.find_spec("matplotlib") is None:
            parser.error("plots need matplotlib: install fxseek[demo], or give --output -")
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "examples/benchmark.py", *given])
    return options


# --------------------------------------------------------------------------------------- measuring


def remembered(tuning: str, tokens: int, options: argparse.Namespace) -> Part:
    """What --keep holds of this part, measured now if it holds nothing."""
    if options.keep is None:
        return apart(tuning, tokens, options)
    setting = [benchmark_page.setting_key(options), tuning, f"{tokens} tokens"]
    setting += [f"{repeats(tokens, options)} repeats", ",".join(options.methods)]
    setting += [benchmark_page.machine(options), benchmark_page.versions()]
    setting += [common.origin_of(common.find_model(options.model), [])["model"]]
    name = ", ".join(setting)
    try:
        kept = json.loads(options.keep.read_text()) if options.keep.exists() else {}
    except ValueError as error:
        raise ExampleError(f"--keep {options.keep} holds no results ({error})") from error
    if name in kept:
        return {way: Measured(**values) for way, values in kept[name].items()}
    part = apart(tuning, tokens, options)
    if any(result.failed != KILLED for result in part.values()):  # that may go well next time
        kept[name] = {way: dataclasses.asdict(result) for way, result in part.items()}
        whole = options.keep.with_name(f"{options.keep.name}.new")
        whole.write_text(json.dumps(kept, indent=1) + "\n")
        whole.replace(options.keep)
    return part


def repeats(tokens: int, options: argparse.Namespace) -> int:
    """How many steps of each way are timed."""
    few = 1 if options.in_parts and tokens > 2048 else 3
    return options.repeats or (5 if tokens <= 1024 else few)


def count_is_timed(tokens: int, options: argparse.Namespace) -> bool:
    """Whether the step that counts bytes is one of those that are timed: where they take minutes.

    The profiler adds some 1 % at 2048 tokens.
    """
    return options.in_parts and tokens > 2048


def apart(tuning: str, tokens: int, options: argparse.Namespace) -> Part:
    """`measure` in a fresh process, which gives all of its memory back."""
    try:
        # In a shared cache, what a compiler takes would depend on what was compiled before.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            return processes.apart(measure, tuning, tokens, options)
    except BrokenProcessPool:
        print(f"{tuning}, {tokens} tokens: {KILLED}", file=sys.stderr)
        return {way: Measured(failed=KILLED) for way in options.methods}


def measure(tuning: str, tokens: int, options: argparse.Namespace) -> Part:
    """Run every way in turn: once to warm up (and capture), once to count bytes, then timed."""
    common.quiet()
    source = common.find_model(options.model)
    tokenizer = common.load_tokenizer(source)
    model: nn.Module = common.load_model(source, getattr(torch, options.dtype))
    model.config.use_cache = False  # type: ignore[union-attr]  # as Trainer has it
    if tuning == "lora":
        model = common.add_lora(model, seed=0)
    device = torch.device(options.device)
    model = nn.Module.to(model, device).train()
    batch = text(tokenizer, options.batch, tokens, device)
    part = {way: Measured(failed=ways.lacking(way) or "") for way in options.methods}
    models = {
        way: ways.prepared(way, model, options.ratio, options.backend)
        for way, result in part.items()
        if not result.failed
    }
    description = f"{tuning}, {tokens} tokens"
    counted = count_is_timed(tokens, options)
    rounds = UNTIMED + repeats(tokens, options) - int(counted)
    bar = tqdm(range(rounds), description, unit="round")
    for number in bar:
        # Each round starts with another way, so that none always follows the same neighbour.
        turn = number % len(part)
        for way in [*options.methods[turn:], *options.methods[:turn]]:
            result = part[way]
            if result.failed:
                continue
            bar.set_postfix_str(way)
            if number == 0:
                result.failed = first_step(way, models[way], batch, result, device)
            elif number == 1:
                seconds = count(models[way], batch, result, device)
                if counted:
                    result.seconds = seconds
            else:
                with common.timed(device, result.seconds):
                    models[way](**batch).loss.backward()
            model.zero_grad(set_to_none=True)
            if number < UNTIMED:
                common.trim()
            else:
                gc.collect()
    return part


def first_step(
    way: str, model: nn.Module, batch: dict[str, Tensor], result: Measured, device: torch.device
) -> str:
    """Time the step that captures; returns why torch.compile failed, which its row then says.

    Only torch.compile, which is told that lengths are static, needs the row's whole length.
    """
    compiles = "compile" in ways.WAYS[way]
    short = not compiles and batch["input_ids"].shape[1] > SHORT
    if short:
        batch = {name: value[:, :SHORT] for name, value in batch.items()}
    seconds: list[float] = []
    try:
        for _ in range(2 if short else 1):
            with common.timed(device, seconds):
                model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    except Exception as error:
        if not compiles:
            raise
        lines = str(error).strip().splitlines()  # the second says what the backend raised
        return f"failed with {type(error).__name__}: {' '.join(lines[:2])}"
    result.first, *result.again = seconds
    return ""


def count(
    model: nn.Module, batch: dict[str, Tensor], result: Measured, device: torch.device
) -> list[float]:
    """Count the bytes that a step keeps for its backward, and its peak; returns its seconds."""
    seconds: list[float] = []

    def step() -> None:
        with common.timed(device, seconds):
            # The hooks keep what autograd would keep, for as long: they don't change the peak.
            with common.SavedBytes(model) as saved:
                loss = model(**batch).loss
                result.saved_bytes = saved.bytes()
            loss.backward()

    result.peak_bytes = peak.step_peak(step, model.parameters(), device)
    return seconds


def text(
    tokenizer: common.Tokenizer, batch: int, tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Real text, every row full and every token labelled."""
    ids: list[int] = []
    for pair in common.docstring_pairs():
        if len(ids) >= batch * tokens:
            break
        ids += tokenizer(pair.answer + "\n\n", add_special_tokens=False)["input_ids"]
    if len(ids) < batch * tokens:
        raise ExampleError(f"there is text for {len(ids)} tokens: lower --batch or --tokens")
    input_ids = torch.tensor(ids[: batch * tokens], device=device).view(batch, tokens)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.clone(),
    }


if __name__ == "__main__":
    sys.exit(main())

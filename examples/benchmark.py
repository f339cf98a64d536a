"""Measure a training step: seconds and saved bytes, ordinary fine-tuning beside fxseek.

    python examples/benchmark.py
    python examples/benchmark.py --device cuda --dtype bfloat16 --tokens 4096

A step is a forward (with all of fxseek's stages) and its backward; the optimiser isn't in it. The
ways take turns, step by step, in one process and share one set of weights, so that a slower moment
of the machine meets all of them. Results go into docs/benchmarks.md, between the markers of their
setting; --output - only prints them.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import ExampleError

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

METHODS: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "checkpointing": None,
    "random": {"score": "random"},
    "context": {"score": "context"},
    "tokenseek": {"score": "tokenseek"},
}
NAMES = {
    "ordinary": "ordinary",
    "checkpointing": "gradient checkpointing",
    "random": "fxseek, random",
    "context": "fxseek, context",
    "tokenseek": "fxseek, tokenseek",
}
# What the project set out to reach, on the CPU at the default setting: shares of the ordinary step.
TIME_TARGETS = {"random": 0.45, "tokenseek": 0.55}
SAVED_TARGET = 0.17
CAPTURE_TARGET = 25.0


@dataclass
class Measured:
    """One way's numbers. ``first`` is the step that captures and rewrites the graph."""

    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0

    @property
    def step(self) -> float:
        """The median step, in seconds."""
        return statistics.median(self.seconds)

    @property
    def capture(self) -> float:
        """What the first step took beyond a median one, in seconds."""
        return max(0.0, self.first - self.step)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    common.quiet()
    try:
        sections = [
            section(tuning, measure(tuning, options), options) for tuning in options.tunings
        ]
    except ExampleError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    text = "\n\n".join([setting(options), *sections])
    print(f"\n{text}")
    if options.output != "-":
        path = Path(options.output)
        path.write_text(put(path.read_text(encoding="utf-8"), key(options), text), encoding="utf-8")
        print(f"\nWritten into {path}.")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--tokens", type=int, default=1024, help="length of a row (%(default)s)")
    add("--batch", type=int, default=1, help="rows (%(default)s)")
    add("--ratio", type=float, default=0.1, help="share of tokens to train on (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--backend", default="eager", help="what runs fxseek's stages (%(default)s)")
    add("--tunings", default="full,lora", help="some of %(default)s")
    add("--methods", default=",".join(METHODS), help="some of %(default)s")
    add("--repeats", type=int, default=5, help="timed steps of each way (%(default)s)")
    add("--output", default=str(PAGE), help="the page to write into, - for none (%(default)s)")
    options = parser.parse_args(arguments)
    for name, known in (("tunings", ["full", "lora"]), ("methods", list(METHODS))):
        chosen = getattr(options, name).split(",")
        unknown = [choice for choice in chosen if choice not in known]
        if unknown:
            parser.error(f"--{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    if options.output != "-" and not Path(options.output).exists():
        parser.error(f"--output {options.output} doesn't exist: name a page with markers, or -")
    options.command = shlex.join(["python", "examples/benchmark.py", *(arguments or sys.argv[1:])])
    return options


# --------------------------------------------------------------------------------------- measuring


def measure(tuning: str, options: argparse.Namespace) -> dict[str, Measured]:
    """Run every way in turn: once to warm up (and capture), once to count bytes, then timed."""
    source = common.find_model(options.model)
    print(f"Loading {source.name} for {tuning} ...", flush=True)
    tokenizer = common.load_tokenizer(source)
    model: nn.Module = common.load_model(source, getattr(torch, options.dtype))
    if tuning == "lora":
        model = common.add_lora(model, seed=0)
    device = torch.device(options.device)
    model = nn.Module.to(model, device).train()
    batch = text(tokenizer, options.batch, options.tokens, device)
    models = {method: way(method, model, options) for method in options.methods}
    measured = {method: Measured() for method in models}
    warm_ups = 2
    rounds = range(warm_ups + options.repeats)
    for number in tqdm(rounds, desc=tuning, unit="round"):
        # Each round starts with another way, so that none always follows the same neighbour.
        turn = number % len(models)
        for method in [*options.methods[turn:], *options.methods[:turn]]:
            seconds: list[float] = []
            result = measured[method]
            with common.timed(device, seconds):
                step(models[method], batch, result if number == 1 else None)
            for parameter in model.parameters():
                parameter.grad = None
            if number == 0:
                result.first = seconds[0]
            elif number >= warm_ups:
                result.seconds += seconds
    return measured


def step(model: nn.Module, batch: dict[str, Tensor], count_into: Measured | None) -> None:
    """A forward and its backward; ``count_into`` also receives the bytes kept between them."""
    if count_into is None:
        model(**batch).loss.backward()
        return
    with common.SavedBytes(model) as saved:
        loss = model(**batch).loss
        count_into.saved_bytes = saved.bytes()
    loss.backward()


def way(method: str, model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """A copy of the model that trains in the given way and shares the model's parameters."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    model = copy.deepcopy(model, shared)
    if method == "checkpointing":
        enable: Callable[..., None] = model.gradient_checkpointing_enable  # type: ignore[assignment]
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if (chosen := METHODS[method]) is not None:
        import fxseek

        fxseek.compile(model, options.ratio, backend=options.backend, **chosen)
    return model


def text(
    tokenizer: common.Tokenizer, batch: int, tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Real text, every row full and every token labelled."""
    ids: list[int] = []
    for pair in common.docstring_pairs():
        if len(ids) >= batch * tokens:
            break
        ids += tokenizer(pair.answer + "\n\n", add_special_tokens=False)["input_ids"]
    input_ids = torch.tensor(ids[: batch * tokens], device=device).view(batch, tokens)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.clone(),
    }


# --------------------------------------------------------------------------------------- reporting


def key(options: argparse.Namespace) -> str:
    """The name of a setting's markers: another run of the same setting takes its place."""
    model = common.find_model(options.model).name
    parts = [model, options.device, options.dtype, options.backend]
    return " ".join([*parts, f"{options.batch}x{options.tokens}", f"ratio {options.ratio}"])


def put(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers called ``name``, added at the end if missing."""
    begin, end = f"<!-- measured: {name} -->", "<!-- end of measured -->"
    block = f"{begin}\n\n{text}\n\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    before, rest = page.split(begin, 1)
    if end not in rest:
        raise ExampleError(f"the page has {begin!r} and no {end!r} after it: put the marker back")
    return before + block + rest.split(end, 1)[1]


def setting(options: argparse.Namespace) -> str:
    """Machine, versions and command, as a reader needs them to run it again."""
    source = common.find_model(options.model)
    if options.device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"### {source.name}, {options.device}\n\n"
        f"Batch {options.batch}, {options.tokens} tokens, {options.dtype}, ratio {options.ratio}, "
        f"stages run by `{options.backend}`; medians of {options.repeats} steps.\n\n"
        f"Machine: {machine}. Versions: Python {platform.python_version()}, {versions}. "
        f"Command: `{options.command}`."
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def section(tuning: str, measured: dict[str, Measured], options: argparse.Namespace) -> str:
    """The table of one kind of tuning; targets are judged at the setting they were set for."""
    base = measured.get("ordinary")
    judged = (options.model, options.device, options.dtype) == (None, "cpu", "float32") and (
        options.batch, options.tokens, options.ratio) == (1, 1024, 0.1)  # fmt: skip
    header = ["", "s / step", "of ordinary", "saved MiB", "of ordinary", "capture s"]
    header += ["targets"] if judged else []
    rows = []
    for method, result in measured.items():
        compiled = METHODS[method] is not None
        time_share = result.step / base.step if base else None
        saved_share = result.saved_bytes / base.saved_bytes if base else None
        row = [
            NAMES[method],
            f"{result.step:.2f}",
            "" if time_share is None else f"{time_share:.2f}×",
            f"{result.saved_bytes / common.MIB:.0f}",
            "" if saved_share is None else f"{saved_share:.1%}",
            f"{result.capture:.1f}" if compiled else "",
        ]
        if judged:
            row.append(verdicts(method, result, time_share, saved_share) if compiled else "")
        rows.append(row)
    title = {"full": "Full-parameter", "lora": "LoRA (r = 16, all linear layers)"}[tuning]
    return f"**{title}**\n\n{common.table(header, rows)}"


def verdicts(
    method: str, result: Measured, time_share: float | None, saved_share: float | None
) -> str:
    """Each target of a way, and whether it is reached."""
    judged = [
        ("time", time_share, TIME_TARGETS.get(method), "{:.2f}×"),
        ("saved", saved_share, SAVED_TARGET, "{:.0%}"),
        ("capture", result.capture, CAPTURE_TARGET, "{:.0f} s"),
    ]
    said = []
    for name, value, target, form in judged:
        if value is not None and target is not None:
            word = "yes" if value <= target else "**no**"
            said.append(f"{name} ≤ {form.format(target)}: {word}")
    return "; ".join(said)


if __name__ == "__main__":
    sys.exit(main())

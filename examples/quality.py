"""What a share of the tokens teaches: held-out loss by ways to select, over seeds.

    python examples/quality.py                     # or: make quality ARGS="--tunings lora"

Each run trains a real model for some steps in a process of its own, and adds a line to a file; what
is in the file is not run again, so that a run that was stopped goes on where it was. The page has
each way's held-out loss against steps and against seconds, as the mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import common
import quality_page
from common import ExampleError, ModelSource, Row

DOCS = Path(__file__).parents[1] / "docs"
# The options of fxseek.compile for each way; None is a way without fxseek. "As published" selects
# among all tokens, as the papers do; the other ways among those that have a label.
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "ordinary": ("ordinary", None),
    "checkpointing": ("gradient checkpointing", None),
    "every": ("every token, in parts of 128", {"ratio": 1.0, "learn_chunk": 128}),
    "labelled": ("labelled tokens", {"ratio": "labelled"}),
    "tokentune": ("TokenTune as published, 10 %", {"ratio": 0.1, "score": "random"}),
    "tokenseek": ("TokenSeek as published, 10 %", {"ratio": 0.1}),
    **{
        f"{kind}-{share}": (
            f"{name}, {round(100 * share)} %",
            {"ratio": share, "score": "gradient", "select": "sample", **options},
        )
        for share in (0.1, 0.25, 0.5)
        for kind, name, options in (
            ("sampled", "sampled tokens", {}),
            ("spans", "sampled spans of 8", {"span": 8}),
        )
    },
    "growing": (
        "sampled tokens, 10 % to 50 %",
        {"ratio": "0.1->0.5", "score": "gradient", "select": "sample"},
    ),
}
UNTIMED_STEPS = 2


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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run_all(options)
        quality_page.write(options.page, options.out)
    except ExampleError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    print(f"\nWritten: {options.page}")
    return 0


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
    add("--steps", type=int, default=48, help="training steps (%(default)s)")
    add("--every", type=int, default=12, help="steps between two evaluations (%(default)s)")
    add("--batch", type=int, default=4, help="rows of a step (%(default)s)")
    add("--tokens", type=int, default=512, help="the longest row (%(default)s)")
    add("--least", type=int, default=600, help="characters of the shortest answer (%(default)s)")
    add("--held-out", type=int, default=24, help="rows to judge by (%(default)s)")
    add("--rate", type=float, help="learning rate (default: 5e-4 for LoRA, 2e-5 for full)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--out", type=Path, default=DOCS / "quality.jsonl", help="a line a run (%(default)s)")
    add("--page", type=Path, default=DOCS / "quality.md", help="the page (%(default)s)")
    options = parser.parse_args(arguments)
    for name, known in (("tunings", ["lora", "full"]), ("arms", list(ARMS))):
        chosen = getattr(options, name).split(",")
        unknown = [choice for choice in chosen if choice not in known]
        if unknown:
            parser.error(f"--{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    for name, least in (("seeds", 1), ("steps", UNTIMED_STEPS + 1), ("every", 1), ("batch", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def run_all(options: argparse.Namespace) -> None:
    """Every run that the file does not have yet."""
    common.quiet()
    done = {quality_page.key(line) for line in quality_page.read(options.out)}
    source = common.find_model(options.model)
    left = [line for line in settings(options, source.name) if quality_page.key(line) not in done]
    if not left:
        return
    tokenizer = common.load_tokenizer(source)
    if options.data:
        pairs = common.read_alpaca(options.data)
    else:
        pairs = common.docstring_pairs(least_characters=options.least)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # dequantised once, not in every process
        source = common.plain_source(source, getattr(torch, options.dtype), folder)
        for line in tqdm(left, desc="quality", unit="run"):
            train, held_out = common.split_rows(
                pairs, tokenizer, options.tokens, options.steps * options.batch,
                options.held_out, line["seed"],
            )  # fmt: skip
            job = Job(
                arm=line["arm"], tuning=line["tuning"], seed=line["seed"], source=source,
                train=train, held_out=held_out, pad_id=pad_id, batch=options.batch,
                steps=options.steps, every=options.every, rate=line["rate"],
                device=options.device, dtype=options.dtype,
            )  # fmt: skip
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found = pool.submit(run, job).result()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **found}) + "\n")


def settings(options: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """What each run is, without what it finds: seed by seed, so that early ones are comparable."""
    for tuning in options.tunings:
        for seed in range(options.seeds):
            for arm in options.arms:
                yield {
                    "model": model,
                    "data": Path(options.data).stem if options.data else "documentation",
                    "tuning": tuning,
                    "tokens": options.tokens,
                    "batch": options.batch,
                    "steps": options.steps,
                    "every": options.every,
                    "held_out": options.held_out,
                    "rate": options.rate or (2e-5 if tuning == "full" else 5e-4),
                    "dtype": options.dtype,
                    "device": options.device,
                    "arm": arm,
                    "name": ARMS[arm][0],
                    "seed": seed,
                }


def run(job: Job) -> dict[str, Any]:
    """Train one way; its held-out losses by step, and its median step in seconds."""
    common.quiet()
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    model: nn.Module = common.load_model(job.source, getattr(torch, job.dtype))
    if job.tuning == "lora":
        model = common.add_lora(model, job.seed)
    model = nn.Module.to(model, device)
    _, given = ARMS[job.arm]
    if given is not None:
        import fxseek

        steps = {"ratio_steps": job.steps} if "->" in str(given["ratio"]) else {}
        fxseek.compile(model, seed=job.seed, **steps, **given)
    elif job.arm == "checkpointing":
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)
    judged = (job.held_out, job.pad_id, device)
    losses = [(0, common.held_out_loss(model, *judged))]
    seconds: list[float] = []
    model.train()
    for step in range(job.steps):
        batch = common.batch_of(job.train, step, job.batch, job.pad_id, device)
        with common.timed(device, seconds):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % job.every == 0 or step + 1 == job.steps:
            losses.append((step + 1, common.held_out_loss(model, *judged)))
    return {"losses": losses, "seconds": statistics.median(seconds[UNTIMED_STEPS:])}


if __name__ == "__main__":
    sys.exit(main())

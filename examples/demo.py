"""Fine-tune a real language model in six ways and compare them: memory, time, held-out loss.

    python examples/demo.py
    python examples/demo.py --data my.jsonl --model Qwen/Qwen2.5-0.5B --full

The ways are ordinary fine-tuning, gradient checkpointing, fxseek on every token (which learns the
same), and fxseek on a share of the tokens that is drawn at random, chosen by TokenSeek (the
best-scoring), or sampled by TokenSeek's scores. Each starts from the same weights and sees the same
batches in the same order, in a process of its own, so that their memory can be compared. Without
--data the text is the documentation of installed libraries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import ExampleError, ModelSource, Row

# The options of fxseek.compile for each way; None is a way without fxseek. Only the answers carry
# labels, so a selection among all tokens would spend a part of itself on prompt tokens that teach
# nothing: supervised_only keeps it to the answers (sampling does so by itself).
METHODS: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "checkpointing": None,
    "every": {"ratio": 1.0, "learn_chunk": 128},
    "random": {"score": "random", "supervised_only": True},
    "topk": {"score": "tokenseek", "select": "topk", "supervised_only": True},
    "sample": {"score": "tokenseek", "select": "sample"},
}
NAMES = {
    "ordinary": "ordinary",
    "checkpointing": "gradient checkpointing",
    "every": "fxseek, every token",
    "random": "fxseek, random tokens",
    "topk": "fxseek, TokenSeek top-k",
    "sample": "fxseek, TokenSeek sampled",
}
UNTIMED_STEPS = 2  # the first captures the graph; in the second saved tensors are counted


@dataclass(frozen=True)
class Job:
    """One way to fine-tune, with everything its process needs."""

    method: str
    source: ModelSource
    train: list[Row]
    held_out: list[Row]
    pad_id: int
    batch: int
    steps: int
    ratio: float
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
    step_seconds: float
    loss_before: float
    loss_after: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        results = compare(options)
    except ExampleError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    show(results, options)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", help="a JSONL file in Alpaca's format (default: docstrings)")
    add("--full", action="store_true", help="train every parameter, not LoRA adapters")
    add("--methods", default=",".join(METHODS), help="some of %(default)s")
    add("--ratio", type=float, default=0.1, help="share of tokens to train on (%(default)s)")
    add("--steps", type=int, default=16, help="training steps of each way (%(default)s)")
    add("--batch", type=int, default=1, help="rows of a step (%(default)s)")
    add("--tokens", type=int, default=512, help="the longest row (%(default)s)")
    add("--held-out", type=int, default=16, help="rows to judge by (%(default)s)")
    add("--rate", type=float, help="learning rate (default: 5e-4 for LoRA, 2e-5 for --full)")
    add("--seed", type=int, default=0, help="of the split, the order and the adapters")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods has {', '.join(unknown)}; the ways are {', '.join(METHODS)}")
    for name, least in (("steps", UNTIMED_STEPS + 1), ("batch", 1), ("tokens", 2), ("held_out", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 < options.ratio <= 1:
        parser.error(f"--ratio must be in (0, 1], not {options.ratio}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.rate = options.rate or (2e-5 if options.full else 5e-4)
    return options


def compare(options: argparse.Namespace) -> list[Result]:
    """Prepare the model and the text, then run each way in a fresh process."""
    common.quiet()
    source = common.find_model(options.model)
    print(f"Loading {source.name} ...", flush=True)
    tokenizer = common.load_tokenizer(source)
    if options.data:
        pairs = common.read_alpaca(options.data)
    else:
        pairs = common.docstring_pairs(least_characters=600)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    rows = options.steps * options.batch
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
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # dequantised once, not in every process
        source = common.plain_source(source, getattr(torch, options.dtype), folder)
        results = []
        for method in options.methods:
            job = Job(
                method=method, source=source, train=train, held_out=held_out,
                pad_id=pad_id, batch=options.batch, steps=options.steps,
                ratio=options.ratio, full=options.full, rate=options.rate, seed=options.seed,
                device=options.device, dtype=options.dtype,
            )  # fmt: skip
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                results.append(pool.submit(run, job).result())
    return results


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

        fxseek.compile(model, **{"ratio": job.ratio, "seed": job.seed, **options})
    elif job.method == "checkpointing":
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = common.held_out_loss(model, job.held_out, job.pad_id, device)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)
    seconds: list[float] = []
    saved_bytes = 0
    model.train()
    with common.PeakBytes(device) as peak:
        bar = tqdm(range(job.steps), desc=f"{NAMES[job.method]:26}", unit="step", leave=True)
        for step in bar:
            batch = common.batch_of(job.train, step, job.batch, job.pad_id, device)
            with common.timed(device, seconds):
                if step == 1:
                    with common.SavedBytes(model) as saved:
                        loss: Tensor = model(**batch).loss
                        saved_bytes = saved.bytes()
                else:
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            del loss
    return Result(
        method=job.method,
        saved_bytes=saved_bytes,
        peak_bytes=peak.bytes,
        step_seconds=statistics.median(seconds[UNTIMED_STEPS:]),
        loss_before=before,
        loss_after=common.held_out_loss(model, job.held_out, job.pad_id, device),
    )


def show(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Print the table and what its columns mean."""
    header = ["", "saved MiB", "peak MiB", "s / step", "loss before", "loss after"]
    rows = [
        [
            NAMES[result.method],
            f"{result.saved_bytes / common.MIB:.0f}",
            f"{result.peak_bytes / common.MIB:.0f}",
            f"{result.step_seconds:.2f}",
            f"{result.loss_before:.3f}",
            f"{result.loss_after:.3f}",
        ]
        for result in results
    ]
    what = "every parameter" if options.full else "LoRA adapters"
    print(f"\nTraining {what} ({options.device}); selections are {options.ratio:.0%} of a row:\n")
    print(common.table(header, rows))
    print(
        "\nsaved: what one forward keeps for its backward, parameters aside; peak: the most memory "
        "that training used above the loaded model's; loss: nats per held-out answer token, of the "
        "ordinary model. Selections are among answer tokens, for only they carry labels."
    )


if __name__ == "__main__":
    sys.exit(main())

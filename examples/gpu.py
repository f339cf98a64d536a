r"""How long a row one GPU trains, in what time and what memory: ordinary, checkpointing, fxseek.

    python examples/gpu.py                        # under 8 minutes on one H100
    python examples/gpu.py                        # again: goes on where it stopped
    python examples/gpu.py --estimate             # what fxseek.estimate says of what was measured
    python examples/gpu.py --page docs/gpu.md     # tables and plots; neither needs a GPU
    python examples/gpu.py --device cpu --models tiny --tokens 32 --most 64 --learn-chunk 16

Models have random weights in the shapes of published ones, so nothing is downloaded. Each point, a
model, a way to train it and a length of its one row, is a line of --out: the time of a step with
its optimiser, and the peak of the allocator, weights included. The length is doubled until a way
runs out of memory, or its next step would take longer than --slowest.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

import baselines
import common
import fxseek
import gpu_page
from common import ExampleError
from estimate import llama_3, tokens_of
from gpu_page import Point

# name: model, tuning
RUNS = (
    "Llama-3.2-1B lora",
    "Llama-3.1-8B qlora",
    "Llama-3.1-8B lora",
    "Qwen3-8B lora",
    "Llama-3.2-3B lora",
)
OFFLOAD = {"recompute": "block", "kv": "offload"}
# name: options of fxseek.compile; None is a way without fxseek
WAYS: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "checkpointing": None,
    "1.0": {"ratio": 1.0},
    "1.0 lean": {"ratio": 1.0, "learn_chunk": 1024},
    "1.0 kept": {"ratio": 1.0, "recompute": "none"},
    "1.0 offload": {"ratio": 1.0, **OFFLOAD},
    "0.5": {"ratio": 0.5},
    "0.1": {"ratio": 0.1},
    "0.5 offload": {"ratio": 0.5, **OFFLOAD},
    "0.1 offload": {"ratio": 0.1, **OFFLOAD},
}
DATA = Path(__file__).parent.parent / "docs" / "gpu.jsonl"
WARM_TOKENS = 1024
QUICK = 10.0  # seconds: a step that takes less is run again, and the second is timed
LEAST = 10.0  # seconds that a way needs to begin


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a model, written out."""
    if name == "tiny":
        return LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
    if name == "Qwen3-8B":
        return Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            tie_word_embeddings=False, max_position_embeddings=40960,
        )  # fmt: skip
    return llama_3(name)


def model_of(name: str, tuning: str, device: torch.device) -> nn.Module:
    """A model with random weights in bfloat16, its adapters, and NF4 weights for "qlora"."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
        if tuning == "qlora":
            quantise(model)
        return model if tuning == "full" else common.add_lora(model, seed=0)


def quantise(model: Any) -> None:
    """Store the linear layers but the head in NF4 with double quantisation, in place."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        new = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        kind: Any = {"requires_grad": False, "quant_type": "nf4"}
        weight: Any = Params4bit(layer.weight.data, **kind)
        new.weight = weight.to(layer.weight.device)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    model.requires_grad_(False)


def prepared(way: str, model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A copy of the model that trains in the given way and shares the model's parameters."""
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).train()
    if way == "checkpointing":
        common.checkpoint(model)
        return baselines.ChunkedLoss(model)
    chosen = WAYS[way]
    return model if chosen is None else fxseek.compile(model, **{**options, **chosen})


class Trial:
    """One way to train one model, at growing lengths."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        trained = [x for x in model.parameters() if x.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-6, fused=device.type == "cuda")
        inner = model.model if isinstance(model, baselines.ChunkedLoss) else model
        ids = baselines.base_of(inner).config.vocab_size
        self.ids = torch.randint(ids, (1, 1 << 21), generator=torch.manual_seed(0))

    def step(self, tokens: int) -> tuple[float, int]:
        """Seconds of a step on a row, and its peak in bytes (0 on the CPU)."""
        ids = self.ids[:, :tokens].to(self.device)
        gpu = self.device.type == "cuda"
        common.synchronise(self.device)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        common.synchronise(self.device)
        seconds = time.perf_counter() - start
        if not bool(loss.isfinite()):
            raise ExampleError(f"the loss of a step on {tokens} tokens is {loss.item()}")
        return seconds, torch.cuda.max_memory_allocated() if gpu else 0

    def let_go(self) -> None:
        """Free what the model has besides its weights."""
        self.optimiser.zero_grad()
        del self.model, self.optimiser
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def slower(arguments: argparse.Namespace) -> int:
    """How many times as long a row of the next length may take: attention is quadratic."""
    return arguments.factor**2


def lengths_left(points: Sequence[Point], arguments: argparse.Namespace) -> Iterator[int]:
    """Lengths to measure after those of a model and a way that are known."""
    tokens = arguments.tokens
    for point in points:
        if point.seconds is None or slower(arguments) * point.seconds > arguments.slowest:
            return
        tokens = max(tokens, arguments.factor * point.tokens)
    while tokens <= arguments.most:
        yield tokens
        tokens *= arguments.factor


def run(arguments: argparse.Namespace, out: Path) -> None:
    """Measure what is not in the file yet, as long as there is time."""
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    until = time.monotonic() + 60 * arguments.minutes
    config = fxseek.SeekConfig(chunk_bytes=arguments.chunk_bytes).on(device.type)
    given = {
        "learn_chunk": arguments.learn_chunk, "prefill_chunk": arguments.prefill_chunk,
        "chunk_bytes": config.chunk_bytes,
    }  # fmt: skip
    here = card, torch.__version__
    known = [point for point in gpu_page.read(out) if (point.card, point.torch) == here]
    for name in arguments.models:
        model = None
        for way in arguments.ways:
            chosen = WAYS[way]
            options = {} if chosen is None else {**given, **chosen}
            options.pop("ratio", None)
            mine = [x for x in known if (x.model, x.way, x.options) == (name, way, options)]
            lengths = list(lengths_left(mine, arguments))
            if not lengths:
                continue
            if time.monotonic() > until - LEAST:
                print("the time is up: run it again to go on", flush=True)
                return
            kind, _, tuning = name.partition(" ")
            model = model_of(kind, tuning or "lora", device) if model is None else model
            trial = Trial(prepared(way, model, options), device)
            for tokens, seconds, peak in measured(trial, lengths, arguments, until):
                point = Point(*here, name, way, tokens, seconds, peak, options)
                gpu_page.write(out, point)
                print(point, flush=True)
            trial.let_go()


def measured(
    trial: Trial, lengths: Sequence[int], arguments: argparse.Namespace, until: float
) -> Iterator[tuple[int, float | None, int]]:
    """Tokens, seconds and peak bytes of growing lengths; no seconds where memory runs out."""
    seconds, tokens = 0.0, lengths[0]
    try:
        trial.step(min(WARM_TOKENS, lengths[0]))  # captures, and makes the optimiser's state
        for tokens in lengths:
            left = min(arguments.slowest, until - time.monotonic())
            if slower(arguments) * seconds > left:
                return
            seconds, peak = trial.step(tokens)
            if seconds < QUICK:
                seconds, peak = trial.step(tokens)
            yield tokens, seconds, peak
    except torch.OutOfMemoryError:
        yield tokens, None, 0


def estimate(out: Path) -> None:
    """Add what `fxseek.estimate` says to points that have no estimate."""
    points = gpu_page.read(out)
    for index, point in enumerate(points):
        if point.estimate or point.seconds is None or point.way == "checkpointing":
            continue
        kind, _, tuning = point.model.partition(" ")
        chosen = WAYS[point.way]
        found = fxseek.estimate(
            config_of(kind), point.tokens, 1, **{**point.options, **(chosen or {})},
            tuning=tuning or "lora", ordinary=chosen is None, device=gpu_page.kernels_of(point),
        )  # fmt: skip
        points[index] = dataclasses.replace(point, estimate=found.peak_bytes)
        print(points[index], flush=True)
        gpu_page.rewrite(out, points)


def names(text: str) -> list[str]:
    return text.split(",")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    common.quiet()
    try:
        if options.page is not None:
            gpu_page.page(gpu_page.read(options.out), options.page)
        elif options.estimate:
            estimate(options.out)
        elif options.device == "cuda" and not torch.cuda.is_available():
            raise ExampleError("torch sees no GPU: run this on a machine with one, or --device cpu")
        else:
            run(options, options.out)
    except ExampleError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", type=names, default=list(RUNS), help='such as "Qwen3-8B qlora"')
    parser.add_argument("--ways", type=names, default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--tokens", type=tokens_of, default=4096, help="the first length")
    parser.add_argument("--factor", type=int, default=2, help="of a length to the one before")
    parser.add_argument("--most", type=tokens_of, default=1 << 20, help="the greatest length")
    parser.add_argument("--learn-chunk", type=int, default=4096)
    parser.add_argument("--prefill-chunk", type=int, default=4096)
    parser.add_argument("--chunk-bytes", type=int, help="of logits (default: fxseek's own)")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all (%(default)s)")
    parser.add_argument("--slowest", type=float, default=100.0, help="seconds (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument(
        "--page", type=Path, help="write tables and plots there, and measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.factor < 2:
        parser.error("--factor must be at least 2")
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        parser.error(f"--ways has {', '.join(unknown)}; the ways are {', '.join(WAYS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())

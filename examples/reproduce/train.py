"""One run: trained, measured and evaluated in a process of its own."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

import benchmark_page
import common
import peak
import processes
from common import MIB, ExampleError, ModelSource, Row
from reproduce import methods, paper, tasks
from reproduce.methods import Way

MEASURED = 4
"""Steps whose memory a run on the CPU averages, at most; on CUDA it is every step's."""

ROOM = {"cpu": 1024 * MIB, "cuda": 1024 * MIB}
"""What a process needs besides tensors."""

GIB = 2**30


@dataclass(frozen=True)
class Job:
    """Everything that a run's process needs."""

    way: Way
    seed: int
    source: ModelSource
    train: list[Row]
    held_out: list[Row]
    pad_id: int
    batch: int
    accumulate: int
    steps: int
    rate: float
    schedule: str
    decay: float
    device: str
    dtype: str
    tasks: list[str]
    folder: str
    room: int
    """Bytes of memory for it: what was free before the first run, shared among the workers."""
    place: int
    """The line of its progress bar, below that of all runs."""


class Lacking(ExampleError):
    """What a run needs and the machine has not."""


def apart(job: Job) -> dict[str, Any]:
    """A run in a fresh process."""
    return processes.apart(run, job)


def run(job: Job) -> dict[str, Any]:
    """Train, and return the run's losses, memory, scores and time.

    Memory is all that the step holds, in bytes: weights, gradients, the optimiser's state and
    activations. `average` is the mean of steps' peaks, `maximal` the largest. An evaluation that
    fails leaves its reason, `unscored`, in place of the scores: what was trained is kept.
    """
    common.quiet()
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # kernels of BOFT
    device = torch.device(job.device)
    dtype = getattr(torch, job.dtype)
    refuse_what_does_not_fit(job, dtype)
    built = tasks.build(job.tasks, Path(job.folder)) if job.tasks else None
    torch.manual_seed(job.seed)
    model = methods.load(job.way, job.source, dtype, device)
    if job.way.options is not None:
        import fxseek

        fxseek.compile(model, seed=job.seed, **job.way.options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused, it makes no tensors in its step, which would be the peak of a small model's.
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=job.decay, fused=True)
    schedule = get_scheduler(
        job.schedule, optimizer, num_warmup_steps=min(paper.WARM_UP, job.steps // 5),
        num_training_steps=job.steps,
    )  # fmt: skip
    judged = (job.held_out, job.pad_id, device)
    before = common.held_out_loss(model, *judged)
    averaged, measured = measured_steps(job)
    peaks: dict[int, int] = {}
    seconds: list[float] = []
    model.train()
    for step in tqdm(range(job.steps), job.way.name, unit="step", leave=False, position=job.place):
        batches = [
            common.batch_of(job.train, step * job.accumulate + part, job.batch, job.pad_id, device)
            for part in range(job.accumulate)
        ]
        alone: list[float] = []

        def once(batches: Iterable[dict[str, Any]] = batches, into: list[float] = alone) -> None:
            with common.timed(device, into):
                for batch in batches:
                    (model(**batch).loss / job.accumulate).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        if step in measured:
            peaks[step] = step_memory(once, model, optimizer, device)
        else:
            once()
        if step not in measured or device.type == "cuda":  # a profiler takes time
            seconds += alone
        schedule.step()
    if job.way.tuner not in ("full", "qlora") and dtype is torch.float32:
        merge: Any = model.merge_adapter  # type: ignore[union-attr]  # of peft
        merge()  # in each forward BOFT would make its matrices anew
    after = common.held_out_loss(model, *judged)
    if not math.isfinite(after):
        raise ExampleError(f"it diverged, the held-out loss is {after}: lower --rate")
    found: dict[str, Any] = {
        "losses": [[0, before], [job.steps, after]],
        "memory": {
            "average": statistics.mean(peaks[step] for step in averaged),
            "maximal": max(peaks.values()),
            "steps": len(peaks),
        },
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": statistics.median(seconds) if seconds else None,
        "machine": machine(device),
    }
    if built:
        try:
            tokenizer = common.load_tokenizer(job.source)
            found["scores"] = tasks.evaluate(model, tokenizer, built, job.batch, job.place)
        except Exception as error:  # of memory, of the network
            found["unscored"] = f"{type(error).__name__}: {error}"
    return found


def unusable_schedule(name: str) -> str | None:
    """Why a run can't have a schedule of transformers by its name alone."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2)
        optimizer.step()
        schedule.step()
    except Exception as error:  # of transformers: some need options, some a metric
        return str(error) or type(error).__name__
    return None


def measured_steps(job: Job) -> tuple[set[int], set[int]]:
    """Which steps' memory is averaged, and which is measured, the former among them.

    On CUDA both are every step. On the CPU a few are averaged, spread over the run, but not the
    first, and the one with the longest row is measured besides.
    """

    def longest(step: int) -> int:
        size = job.batch * job.accumulate
        rows = [job.train[i % len(job.train)] for i in range(step * size, (step + 1) * size)]
        return max(len(row.ids) for row in rows)

    if torch.device(job.device).type == "cuda":
        return {*range(job.steps)}, {*range(job.steps)}
    steps = range(min(1, job.steps - 1), job.steps)
    spread = {*steps[:: math.ceil(len(steps) / MEASURED)]}
    return spread, {*spread, max(steps, key=longest)}


def step_memory(
    step: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:  # fmt: skip
    """The most bytes that tensors take in a step of training: those before it, and what it adds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    held = held_bytes(model, optimizer)
    return held + peak.peak_of(peak.trace_of(step))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, with what quantised ones carry, and of the optimiser's state."""
    from fxseek.inspect.memory import module_tensors

    state = (x for some in optimizer.state.values() for x in some.values())
    tensors = [*module_tensors(model), *(x for x in state if isinstance(x, torch.Tensor))]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def refuse_what_does_not_fit(job: Job, dtype: torch.dtype) -> None:
    """Estimate a step before the model is loaded.

    Ordinary training is estimated first, which takes a second and bounds what is selected.

    Raises:
        Lacking: the machine has less memory than the step needs.
    """
    free = min(job.room, available(job.device))
    needed = estimated(job, dtype, ordinary=True)
    if needed is not None and needed > free and job.way.options is not None:
        needed = estimated(job, dtype, ordinary=False)
    if needed is not None and needed > free:
        raise Lacking(
            f"a step needs {needed / GIB:.1f} GiB by fxseek.estimate, and {free / GIB:.1f} GiB are "
            "free for a run: lower --workers, --batch or --tokens, or take a smaller --model"
        )


def estimated(job: Job, dtype: torch.dtype, ordinary: bool) -> int | None:
    """The peak of a step of the longest rows, with the process; None where there is no estimate."""
    import fxseek

    tokens = max(len(row.ids) for row in job.train)
    given: dict[str, Any] = {} if ordinary else dict(job.way.options or {})
    device = torch.device(job.device).type
    try:
        config = AutoConfig.from_pretrained(job.source.location)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if job.way.tuner == "qlora":
                model, given = config, {**given, "tuning": "qlora", "lora_rank": 8}
            else:
                model = methods.adapted(job.way, model)
        found = fxseek.estimate(
            model, tokens, job.batch, ordinary=ordinary, dtype=dtype, device=device, **given
        )
    except (fxseek.FxseekError, RuntimeError, NotImplementedError, ValueError) as error:
        print(f"{job.way.name}: no estimate of its memory ({error})")
        return None
    return found.peak_bytes + ROOM[device]


def available(device: str) -> int:
    """Bytes that are free."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {benchmark_page.processor()}"


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in another order for each seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]

"""What processes do in `test_fsdp.py`, and what one process does in their place.

A module of its own, for a spawned process imports the module of its function.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import batch, tiny_llama, tiny_lora
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fxseek
from fxseek.capture import sharded

STEPS = 3
VOCABULARY = 37
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=3),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "lora": lambda: tiny_lora(tiny_llama()),
}


@dataclass(frozen=True)
class Case:
    """A model, options of `fxseek.compile`, and how it is sharded.

    `uneven`: processes have other lengths, numbers of rows and labels; `compile_first`: before it
    is sharded; `root_only`: blocks are not sharded by themselves; `shard`: options of
    `fully_shard`.
    """

    options: dict[str, Any]
    model: str = "llama"
    uneven: bool = False
    compile_first: bool = False
    root_only: bool = False
    shard: dict[str, Any] = field(default_factory=dict)

    def made(self) -> nn.Module:
        """The model, in float64."""
        return MODELS[self.model]().double()

    def rows(self, step: int, rank: int, processes: int) -> dict[str, Tensor]:
        """What a process trains on in a step."""
        if not self.uneven:
            given = batch(VOCABULARY, 2 * processes, 13, seed=step)
            return {name: x[2 * rank : 2 * rank + 2] for name, x in given.items()}
        sizes = {"batch": 1 + 2 * (rank % 2), "tokens": (13, 8)[rank % 2] + step}
        labels = "none" if rank == 1 and step == 1 else "some"
        seed = 10 * step + rank
        return batch(VOCABULARY, padding="right", labels=labels, seed=seed, **sizes)


def shard(case: Case, model: Any, **more: Any) -> Any:
    """`fully_shard` by block and at the root."""
    from torch.distributed.fsdp import fully_shard

    options = case.shard | more
    if not case.root_only:
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, **options)
    return fully_shard(model, **options)


def compiled(case: Case) -> nn.Module:
    """The sharded model, compiled."""
    model = case.made()
    if case.compile_first:
        return shard(case, fxseek.compile(model, **case.options))
    return fxseek.compile(shard(case, model), **case.options)


def whole(x: Any) -> Tensor:
    """A tensor, gathered if it is sharded."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def train(model: nn.Module, losses: Callable[[int], Sequence[Tensor]]) -> dict[str, Any]:
    """The gradients of each step of AdamW, and the weights after the last."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found: dict[str, Any] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for loss in losses(step):
            loss.backward()
        found[f"gradients of step {step}"] = gradients(model)
        optimizer.step()
    return found | {"weights": weights(model)}


def alone(case: Case, processes: int) -> dict[str, Any]:
    """What one process finds that has the rows of all, and averages over them."""
    model = case.made()
    trained = [
        fxseek.compile(case.made(), **seeded(case, rank))
        for rank in range(processes if case.uneven or "sample" in case.options.values() else 1)
    ]
    for other in trained:  # each draws as its process does, with the same weights
        for (name, p), (_, own) in zip(
            other.named_parameters(), model.named_parameters(), strict=True
        ):
            parent, _, leaf = name.rpartition(".")
            other.get_submodule(parent)._parameters[leaf] = own
            assert p.shape == own.shape

    def losses(step: int) -> Iterator[Tensor]:
        if len(trained) == 1:
            given = [case.rows(step, rank, processes) for rank in range(processes)]
            yield trained[0](**{k: torch.cat([x[k] for x in given]) for k in given[0]}).loss
            return
        for rank, each in enumerate(trained):
            yield each(**case.rows(step, rank, processes)).loss / processes

    return train(model, losses)  # type: ignore[arg-type]


def seeded(case: Case, rank: int) -> dict[str, Any]:
    return case.options | {"seed": rank * sharded._SEEDS}


# ---- processes -----------------------------------------------------------------------------------


def spawn(work: Any, processes: int, folder: Path, *given: Any, seconds: float = 240) -> Any:
    """Start processes that run ``work(rank, processes, folder, *given)``; a function that waits.

    It raises what one of them has raised, and `TimeoutError` where they don't end in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, work, folder, given)
    context = torch.multiprocessing.spawn(_process, arguments, nprocs=processes, join=False)  # type: ignore[attr-defined]
    end = time.monotonic() + seconds

    def wait() -> None:
        try:
            while not context.join(timeout=max(0.1, min(5.0, end - time.monotonic()))):
                if time.monotonic() > end:
                    raise TimeoutError(f"processes hang after {seconds} seconds")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()

    return wait


def _process(rank: int, processes: int, port: int, work: Any, folder: Path, given: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    work(rank, processes, folder, *given)
    dist.destroy_process_group()


def run_cases(rank: int, processes: int, folder: Path, cases: dict[str, Case]) -> None:
    """Train each model, and write what was found to a file."""
    for name, case in cases.items():
        torch._dynamo.reset()
        model = compiled(case)

        def losses(step: int, model: Any = model, case: Case = case) -> list[Tensor]:
            return [model(**case.rows(step, rank, processes)).loss]

        with counted() as alive:
            found = train(model, losses)
        found["alive"] = alive
        found["kinds"] = {type(p.grad).__name__ for p in model.parameters() if p.requires_grad}
        torch.save(found, folder / f"{name}-{rank}.pt")


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of whole parameters that are alive after each gather."""
    from fxseek.ops import shards
    from fxseek.run import env

    gather = shards.whole
    alive: list[int] = []
    known: dict[StorageWeakRef, int] = {}

    def whole(*given: Any) -> list[Tensor]:
        found = gather(*given)
        for x in found:
            storage = x.untyped_storage()
            known[StorageWeakRef(storage)] = storage.nbytes()
        for gone in [x for x in known if x.expired()]:
            del known[gone]
        alive.append(sum(known.values()))
        return found

    shards.whole = env.whole = whole
    try:
        yield alive
    finally:
        shards.whole = env.whole = gather
    alive.append(sum(n for x, n in known.items() if not x.expired()))

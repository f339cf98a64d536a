"""What processes do in the tests of DDP.

A module of its own, for a spawned process imports the module of its function.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from models import batch, tiny_llama
from torch.nn.parallel import DistributedDataParallel
from trainers import base_of, trainer

import fxseek

OPTIONS: dict[str, Any] = {"ratio": 0.3, "supervised_only": True}


def rows(first: int, last: int) -> dict[str, Any]:
    """Rows of the batch that the processes share."""
    return {name: x[first:last] for name, x in batch(37, 4, 13).items()}


def run(
    worker: Callable[..., None], folder: Path, *arguments: Any, processes: int = 2
) -> list[Any]:
    """What `worker` has saved in each of some processes: `worker(rank, port, folder, ...)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder), *arguments), nprocs=processes)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def _join(rank: int, port: int, processes: int = 2) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def leave() -> NoReturn:
    """End a process without torch's destructors.

    The one of gloo's group waits for gloo's thread, which may wait for the interpreter's lock to
    let go of a tensor (https://github.com/pytorch/pytorch/issues/56297).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def split_worker(rank: int, port: int, folder: str) -> None:
    """What the backend says where Dynamo splits a graph for DDP; and a step where it doesn't."""
    _join(rank, port, 1)
    torch.distributed.init_process_group("gloo")
    model: Any = tiny_llama()
    wrapped = DistributedDataParallel(
        torch.compile(model, backend="fxseek", dynamic=True, options={"score": "random"})  # type: ignore[arg-type]
    )
    said = ""
    try:
        wrapped(**rows(0, 2))
    except Exception as error:  # Dynamo's own, with the backend's in its text
        said = str(error)
    with torch._dynamo.config.patch(optimize_ddp=False):
        wrapped(**rows(0, 2)).loss.backward()
    trained = all(p.grad is not None for p in model.parameters())
    torch.save((said, trained), Path(folder) / f"{rank}.pt")
    leave()


def trl_worker(rank: int, port: int, folder: str, kind: str) -> None:
    """Two steps of TRL's trainer without fxseek, and with it at ratio 1.0: the trained weights."""
    _join(rank, port)
    found: dict[str, Any] = {}
    ways = ("alone", "compiled")
    bases = [base_of(kind) for _ in ways]  # only one process saves, once there is a group
    for way, base in zip(ways, bases, strict=True):
        torch.manual_seed(0)
        made = trainer(kind, Path(folder) / way, base)
        if way == "compiled":
            fxseek.compile(made.model, 1.0)
        made.train()
        found[way] = dict(made.model.named_parameters())
        assert isinstance(made.model_wrapped, DistributedDataParallel)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave()


def worker(rank: int, port: int, folder: str) -> None:
    """Two rows by DDP of accelerate, and what is refused; results go into a file."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    _join(rank, port)
    # Many buckets, as large models have: Dynamo splits graphs at them unless told not to.
    setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 500)  # noqa: B010 - not exported
    buckets = DistributedDataParallelKwargs(bucket_cap_mb=0.001)  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True, kwargs_handlers=[buckets])
    found: dict[str, Any] = {}

    model = fxseek.compile(tiny_llama(), **OPTIONS)
    wrapped = accelerator.prepare(model)
    assert isinstance(wrapped, DistributedDataParallel)
    accelerator.backward(wrapped(**rows(2 * rank, 2 * rank + 2)).loss)
    found["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    in_parts = accelerator.prepare(fxseek.compile(tiny_llama(), learn_chunk=2, **OPTIONS))
    accelerator.backward(in_parts(**rows(2 * rank, 2 * rank + 2)).loss)
    found["in_parts"] = {name: p.grad for name, p in in_parts.module.named_parameters()}
    found["explained"] = str(fxseek.explain(in_parts.module, **rows(0, 2)))
    found["compile_ddp"] = refusal(lambda: fxseek.compile(wrapped))

    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    one = FullyShardedDataParallel(tiny_llama(), device_id=device)
    found["compile_fsdp"] = refusal(lambda: fxseek.compile(one))
    later = fxseek.compile(tiny_llama(), **OPTIONS)
    outer = FullyShardedDataParallel(later, device_id=device)
    found["fsdp_after"] = refusal(lambda: outer(**rows(0, 2)))
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave()


def refusal(call: Any) -> str:
    """The message of fxseek's error, or what happened instead of one."""
    try:
        result = call()
    except (fxseek.ConfigError, fxseek.InputError) as error:
        return str(error)
    except Exception as error:
        return f"not refused: {type(error).__name__}: {error}"
    return f"not refused: {type(result).__name__}"

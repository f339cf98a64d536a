"""What processes do in `test_fsdp.py`, and what one process does in their place.

A module of its own, for a spawned process imports the module of its function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import batch, tiny_llama, tiny_lora
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.multiprocessing.reductions import StorageWeakRef

import fxseek
from fxseek import _fsdp
from fxseek.capture import sharded

STEPS = 3
VOCABULARY = 37
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
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
        """The model, in float64: the same in each process."""
        torch.manual_seed(0)
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


def train(model: nn.Module, losses: Callable[[int], Iterable[Tensor]]) -> dict[str, Any]:
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
    draws = bool({"sample", "random"} & set(case.options.values())) or "span" in case.options
    model = fxseek.compile(case.made(), **case.options)
    models = [model] * processes
    for rank in range(1, processes if draws else 1):  # each draws as its process does
        models[rank] = fxseek.compile(share(case.made(), model), **seeded(case, rank))
    together = case.options["ratio"] == 1.0 and not case.uneven

    def losses(step: int) -> Iterator[Tensor]:
        given = [case.rows(step, rank, processes) for rank in range(processes)]
        if together:
            yield model(**{name: torch.cat([x[name] for x in given]) for name in given[0]}).loss
            return
        for each, rows in zip(models, given, strict=True):
            yield each(**rows).loss / processes

    return train(model, losses)


def share(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with another one's parameters."""
    for name, parameter in other.named_parameters():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = parameter
    return model


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


def run_cases(
    rank: int, processes: int, folder: Path, cases: dict[str, Case], mesh: tuple[int, ...] = ()
) -> None:
    """Train each model, and write what was found to a file."""
    if mesh:
        made = dist.init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    for name, case in cases.items():
        if mesh:
            case = dataclasses.replace(case, shard={**case.shard, "mesh": made})
        torch._dynamo.reset()
        model = compiled(case)

        def losses(step: int, model: Any = model, case: Case = case) -> list[Tensor]:
            return [model(**case.rows(step, rank, processes)).loss]

        with counted() as alive, counted_traffic() as traffic:
            found = train(model, losses)
        found["alive"], found["bytes"] = alive, traffic
        found["kept"] = fxseek.report(model).selected.shape[1]
        found["kinds"] = {type(p.grad).__name__ for p in model.parameters() if p.requires_grad}
        torch.save(found, folder / f"{name}-{rank}.pt")


def run_all(rank: int, processes: int, folder: Path, cases: dict[str, Case]) -> None:
    """Cases, and what loops do: in one set of processes, which take seconds to begin."""
    run_cases(rank, processes, folder, cases)
    use(rank, processes, folder)


def use(rank: int, processes: int, folder: Path) -> None:
    """What training loops do with a sharded model, beside one that FSDP2 runs; and errors."""
    case = Case({"ratio": 1.0})
    plain, ours = shard(case, case.made()), compiled(case)
    models: list[Any] = [plain, ours]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    found: dict[str, Any] = {}

    def both(what: str, run: Callable[[Any], Any]) -> None:
        found[what] = [run(model) for model in models]

    def accumulated(model: Any) -> dict[str, Tensor]:
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            model(**case.rows(micro, rank, processes)).loss.backward()
        return gradients(model)

    def clipped(model: Any) -> dict[str, Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return {"norm": whole(norm), **gradients(model)}

    def evaluated(model: Any) -> dict[str, Tensor]:
        ids = torch.arange(3, 10)[None]
        with torch.no_grad():
            loss = model.eval()(**case.rows(0, rank, processes)).loss
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        model.train()
        return {"loss": loss, "written": written}

    def stepped(model: Any) -> dict[str, Tensor]:
        optimizer = optimizers[models.index(model)]
        optimizer.step()
        optimizer.zero_grad()
        model(**case.rows(4, rank, processes)).loss.backward()
        return gradients(model)

    def state(model: Any) -> dict[str, Tensor]:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))

    both("accumulated", accumulated)
    both("clipped", clipped)
    both("stepped", stepped)
    both("evaluated", evaluated)
    both("trained again", accumulated)
    both("state", state)

    def sent(model: Any) -> dict[str, int]:
        with counted_traffic() as traffic:
            model(**case.rows(5, rank, processes)).loss.backward()
        return traffic

    both("bytes", sent)

    rows = case.rows(0, rank, processes)
    empty = {name: x[:0] for name, x in rows.items()}
    found["bad rows in one"] = refusal(lambda: ours(**(empty if rank == 1 else rows)))
    found["classes"] = {type(p).__name__ for p in ours.parameters()}
    optimizers[1].zero_grad()
    for parameter in ours.model.layers[0].parameters():
        parameter.requires_grad_(False)
    ours(**rows).loss.backward()
    found["trained"] = sorted(gradients(ours))
    found["check"] = refusal(lambda: fxseek.check_gradients(ours, **rows))
    inductor = Case({"backend": "inductor"})
    found["inductor"] = refusal(lambda: compiled(inductor)(**rows))
    parallel = case.made()
    mesh = dist.init_device_mesh("cpu", (processes,))
    head: Any = parallel.get_submodule("lm_head")
    head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
    with context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1]):
        found["context parallel"] = refusal(lambda: ours(**rows))
    found["tensor parallel"] = refusal(lambda: fxseek.compile(parallel))
    torch.save(found, folder / f"use-{rank}.pt")


def refusal(call: Callable[[], Any]) -> str:
    """The class and the message of fxseek's error."""
    try:
        call()
    except fxseek.FxseekError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


@contextlib.contextmanager
def counted_traffic() -> Iterator[dict[str, int]]:
    """Bytes of whole parameters gathered, and of whole gradients reduced, by whoever does it."""
    traffic = {"gathered": 0, "reduced": 0}
    inside = False
    owners = [(dist, f"{kind}_{end}") for kind in ("all_gather", "reduce_scatter")
              for end in ("into_tensor", "tensor", "single")]  # fmt: skip
    owners += [(_fsdp, "all_gather"), (_fsdp, "reduce_scatter")]
    before = [(owner, name, getattr(owner, name)) for owner, name in owners if hasattr(owner, name)]

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            outermost, inside = not inside, True
            if outermost:
                given = [x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                traffic["gathered" if "all_gather" in name else "reduced"] += max(given)
            try:
                return function(*args, **kwargs)
            finally:
                inside = not outermost

        return call

    for owner, name, function in before:
        setattr(owner, name, counting(name, function))
    try:
        yield traffic
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


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

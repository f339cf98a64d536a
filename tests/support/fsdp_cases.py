"""What processes do in `test_fsdp.py`, and what one process does in their place.

A module of its own, for a spawned process imports the module of its function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import os
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ddp import leave
from models import batch, tiny_llama, tiny_lora, without_casts
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import Dataset
from tuners import TUNERS

import fxseek
from fxseek import _fsdp
from fxseek.capture import sharded
from fxseek.ops import shards
from fxseek.ops.team import Team

STEPS = 3
TIMEOUT = 120
"""Seconds: that of the process group."""
VOCABULARY = 37
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: without_casts(tiny_llama()),
    "tied": lambda: without_casts(tiny_llama(tie_word_embeddings=True)),
    "lora": lambda: tiny_lora(without_casts(tiny_llama())),
}


@dataclass(frozen=True)
class Case:
    """A model, options of `fxseek.compile`, and how it is sharded.

    `uneven`: processes have other lengths, numbers of rows and labels; `compile_first`: before it
    is sharded; `root_only`: blocks are not sharded by themselves; `ahead`: the next segment is
    gathered ahead of its use, as on a device; `shard`: options of `fully_shard`.
    """

    options: dict[str, Any]
    model: str = "llama"
    uneven: bool = False
    compile_first: bool = False
    root_only: bool = False
    ahead: bool = False
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
        labels = "none" if rank == 1 and step == 1 else "some"
        count, tokens = (3, 8 + step) if rank % 2 else (1, 13 + step)
        return batch(VOCABULARY, count, tokens, "right", labels, seed=10 * step + rank)


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


def spawn(work: Any, processes: int, folder: Path, *given: Any, seconds: float = 480) -> Any:
    """Start processes that run ``work(rank, processes, folder, *given)``; a function that waits.

    It raises what one of them has raised, and `TimeoutError` where they don't end in time; with
    ``raises=False`` it answers how each has ended, None where it hasn't.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, work, folder, given)
    start: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    context = start(_process, arguments, nprocs=processes, join=False)
    end = time.monotonic() + seconds

    def wait(*, raises: bool = True) -> list[int | None]:
        try:
            while raises and not context.join(timeout=max(0.1, min(5.0, end - time.monotonic()))):
                if time.monotonic() > end:
                    raise TimeoutError(f"processes hang after {seconds} seconds")
            for process in context.processes:
                process.join(max(0.1, end - time.monotonic()))
            return [process.exitcode for process in context.processes]
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()

    return wait


def _process(rank: int, processes: int, port: int, work: Any, folder: Path, given: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    work(rank, processes, folder, *given)
    leave()


def run_cases(
    rank: int, processes: int, folder: Path, cases: dict[str, Case], mesh: tuple[int, ...] = ()
) -> None:
    """Train each model, and write what was found to a file."""
    if mesh:
        made = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
        cases = {k: dataclasses.replace(x, shard={"mesh": made}) for k, x in cases.items()}
    for name, case in cases.items():
        torch._dynamo.reset()
        model = compiled(case)

        def losses(step: int, model: Any = model, case: Case = case) -> list[Tensor]:
            return [model(**case.rows(step, rank, processes)).loss]

        with gathering_ahead() if case.ahead else contextlib.nullcontext():
            with counted() as alive, counted_traffic() as traffic:
                found = train(model, losses)
            found["alive"], found["bytes"] = alive, traffic
            found["order"] = order_of(lambda: losses(0)[0].backward()) if case.ahead else []
        found["kept"] = fxseek.report(model).selected.shape[1]
        found["kinds"] = {type(p.grad).__name__ for p in model.parameters() if p.requires_grad}
        torch.save(found, folder / f"{name}-{rank}.pt")


def run_all(rank: int, processes: int, folder: Path, cases: dict[str, Case]) -> None:
    """Cases, and what loops do: in one set of processes, which take seconds to begin."""
    run_cases(rank, processes, folder, cases)
    use(rank, processes, folder)
    kept = after_a_step(Case({"ratio": 0.5}), rank, processes)
    gc.collect()
    assert kept() is None, "a sharded model is not freed with its last reference"


def after_a_step(case: Case, rank: int, processes: int) -> weakref.ref[nn.Module]:
    model = compiled(case)
    model(**case.rows(0, rank, processes)).loss.backward()
    return weakref.ref(model)


def use(rank: int, processes: int, folder: Path) -> None:
    """What training loops do with a sharded model, beside one that FSDP2 runs; and errors."""
    case = Case({"ratio": 1.0})
    plain: Any = shard(case, case.made())
    ours: Any = compiled(case)
    models = [plain, ours]
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

    def state(model: Any) -> dict[str, Any]:
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

    rows: dict[str, Any] = case.rows(0, rank, processes)
    empty = {name: x[:0] for name, x in rows.items()}
    found["bad rows in one"] = refusal(lambda: ours(**(empty if rank == 1 else rows)))
    found["classes"] = {type(p).__name__ for p in ours.parameters()}
    optimizers[1].zero_grad()
    for parameter in ours.model.layers[0].parameters():
        parameter.requires_grad_(False)
    ours(**rows).loss.backward()
    found["trained"] = sorted(gradients(ours))
    before = gradients(ours)
    found["check"] = fxseek.check_gradients(ours, **rows).error
    assert all(torch.equal(x, before[name]) for name, x in gradients(ours).items())
    with wrong_gradients():
        found["mismatch"] = refusal(lambda: fxseek.check_gradients(ours, **rows))
    ours.set_requires_gradient_sync(False)
    found["check without reduction"] = refusal(lambda: fxseek.check_gradients(ours, **rows))
    ours.set_requires_gradient_sync(True)
    inductor = Case({"backend": "inductor"})
    found["inductor"] = refusal(lambda: compiled(inductor)(**rows))
    parallel = case.made()
    mesh = init_device_mesh("cpu", (processes,))
    head: Any = parallel.get_submodule("lm_head")
    head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
    with context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1]):
        found["context parallel"] = refusal(lambda: ours(**rows))
    found["tensor parallel"] = refusal(lambda: fxseek.compile(parallel))
    torch.save(found, folder / f"use-{rank}.pt")


def tuners(rank: int, processes: int, folder: Path, names: Sequence[str]) -> None:
    """The gradients of a step of each tuner of peft, by FSDP2 alone and with fxseek."""
    case = Case({"ratio": 1.0, "learn_chunk": 5})
    found: dict[str, Any] = {}
    for name in names:
        torch._dynamo.reset()
        runs: list[Any] = []
        for ours in (False, True):
            torch.manual_seed(0)
            try:
                model = shard(case, TUNERS[name].make())
                model = fxseek.compile(model, **case.options) if ours else model
                model(**case.rows(0, rank, processes)).loss.backward()
                runs.append(gradients(model))
            except Exception as error:
                runs.append(f"{type(error).__name__}: {error}")
        found[name] = runs
    torch.save(found, folder / f"tuners-{rank}.pt")


def precisions(rank: int, processes: int, folder: Path) -> None:
    """Mixed precision with offloaded shards, and LoRA on weights of 4 bits.

    Those stay whole where they are stored as bytes ("quantised"), and are sharded where they are
    stored as floating-point numbers ("packed").
    """
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    case = Case({"ratio": 1.0})
    found: dict[str, Any] = {"mixed": [], "quantised": [], "packed": []}
    rows: dict[str, Any] = case.rows(0, rank, processes)
    for ours in (False, True):
        for name in ("mixed", "quantised", "packed"):
            model: Any = case.made().float()
            offload = CPUOffloadPolicy(pin_memory=False)
            options: dict[str, Any] = {"mp_policy": low, "offload_policy": offload}
            if name != "mixed":
                storage = torch.uint8 if name == "quantised" else torch.bfloat16
                model = tiny_lora(in_four_bits(storage))
                kept = {p for p in model.parameters() if p.dtype == torch.uint8}
                options = {"ignored_params": kept}
            model = shard(case, model, **options)
            model = fxseek.compile(model, **case.options) if ours else model
            loss = model(**rows).loss
            loss.backward()
            found[name].append({"loss": loss.detach(), **gradients(model)})
    rounded = shard(case, tiny_lora(in_four_bits(torch.float32)), mp_policy=low)
    found["rounded"] = refusal(lambda: fxseek.compile(rounded, **case.options))
    torch.save(found, folder / f"precisions-{rank}.pt")


def in_four_bits(storage: torch.dtype) -> nn.Module:
    """A model with linear layers of bitsandbytes, but for the head."""
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    import bitsandbytes

    bits: Any = bitsandbytes.nn
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            sizes = module.in_features, module.out_features
            kind: dict[str, Any] = {"quant_type": "nf4", "quant_storage": storage}
            layer = bits.Linear4bit(*sizes, bias=False, **kind)
            weight = module.weight.data
            layer.weight = bits.Params4bit(weight, requires_grad=False, module=layer, **kind)
            model.set_submodule(name, layer.to("cpu"))
    return model


def drill(rank: int, processes: int, folder: Path, case: Case, dies: bool) -> None:
    """Train; with a checkpoint after two steps, from it where there is one.

    One process dies in the third step, between two gathers, if it is to.
    """
    model, checkpoint = compiled(case), folder / "checkpoint"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = 0

    def states() -> dict[str, Any]:
        own, optimizers = get_state_dict(model, optimizer)
        return {"model": own, "optimizer": optimizers}

    if checkpoint.exists():
        state = states()
        load_state(state, checkpoint_id=checkpoint)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )  # fmt: skip
        first = 2
        fxseek.resume(model, first)
    for step in range(first, STEPS):
        if step == 2 and not first:
            save_state(states(), checkpoint_id=checkpoint)
        if step == 2 and dies and rank == 1:
            die_at_gather(3, folder / "killed")
        optimizer.zero_grad()
        try:
            model(**case.rows(step, rank, processes)).loss.backward()
        except Exception as error:
            seconds = time.time() - float((folder / "killed").read_text())
            (folder / "survivor").write_text(f"{seconds}: {type(error).__name__}: {error}")
            raise
        optimizer.step()
    torch.save(weights(model), folder / f"weights-{rank}.pt")


def die_at_gather(number: int, killed: Path) -> None:
    """Let this process be killed ahead of a gather, and write down when."""
    begin, left = shards.begin, number

    def gather(*given: Any, **options: Any) -> shards.Gathering:
        nonlocal left
        left -= 1
        if not left:
            killed.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(*given, **options)

    shards.begin = gather


def failing(rank: int, processes: int, folder: Path, at: str) -> None:
    """One process fails in its step, after the first gather: in its forward or its backward."""
    case = Case({"ratio": 0.6, "learn_chunk": 2} if at == "parts" else {"ratio": 0.6})
    model = compiled(case)
    rows = case.rows(0, rank, processes)
    model(**rows).loss.backward()
    if rank == 1 and at == "forward":
        rows["input_ids"][0, 0] = VOCABULARY  # no embedding has it
    try:
        loss = model(**rows).loss
        if rank == 1:
            run_out_of_memory_at_gather(2)
        loss.backward()
    except Exception as error:
        text = f"{time.time()}: {type(error).__name__}: {error}"
        (folder / f"error-{rank}").write_text(text)
        raise


def run_out_of_memory_at_gather(number: int) -> None:
    """Let a gather fail in this process, before it has begun."""
    begin, left = shards.begin, number

    def gather(*given: Any, **options: Any) -> shards.Gathering:
        nonlocal left
        left -= 1
        if not left:
            raise torch.OutOfMemoryError("no memory for a block")
        return begin(*given, **options)

    shards.begin = gather


SHARDING = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}  # fmt: skip


def shard_on_the_cpu() -> None:
    """accelerate shards on devices only: it is told that there are some."""
    from accelerate import DistributedType, PartialState

    PartialState().distributed_type = DistributedType.MULTI_GPU


def in_trl(rank: int, processes: int, folder: Path, kind: str, tuner: str) -> None:
    """A trainer of TRL with ``fsdp_version: 2``, with fxseek and without."""
    import trainers
    from peft import LoraConfig

    found: dict[str, Any] = {}
    for name in ("plain", "ours"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"fsdp": True, "fsdp_config": SHARDING}
        if tuner == "lora":
            options["peft_config"] = LoraConfig(
                r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
            )  # fmt: skip
        base = trainers.base_of(kind, folder / f"base-{name}")
        dist.barrier()  # process 0 alone has saved it
        shard_on_the_cpu()
        trainer = trainers.trainer(kind, folder / name, base, **options)
        if name == "ours":
            fxseek.compile(trainer.model, ratio=1.0, learn_chunk=7)
        torch.manual_seed(3)
        trainer.train()
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        found[name] = {"losses": torch.tensor(losses), **weights(trainer.model)}
    torch.save(found, folder / f"trl-{rank}.pt")


def in_trainer(rank: int, processes: int, folder: Path, loads_first: bool) -> None:
    """Trainer with ``fsdp_version: 2``, with fxseek and without.

    With `loads_first` the first process alone has the weights (`cpu_ram_efficient_loading`).
    """
    from transformers import Trainer, TrainingArguments

    sharding = SHARDING | {"cpu_ram_efficient_loading": loads_first}
    found: dict[str, Any] = {}
    for name in ("plain", "ours"):
        model: Any = Case({}).made().float()
        if loads_first and rank:
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
        if name == "ours":
            fxseek.compile(model, ratio=1.0, learn_chunk=4)
        args = TrainingArguments(
            str(folder / name), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=2, use_cpu=True, report_to=[], save_strategy="steps", save_steps=2,
            disable_tqdm=True, logging_steps=1, learning_rate=1e-2, eval_strategy="steps",
            eval_steps=1, dataloader_pin_memory=False, fsdp_config=sharding,
            fsdp=True,  # type: ignore[arg-type]
        )  # fmt: skip
        shard_on_the_cpu()
        rows = Rows(VOCABULARY, 16)
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=Rows(VOCABULARY, 4))
        trainer.train()
        trainer.save_model(str(folder / name / "saved"))
        history = [x for x in trainer.state.log_history if "loss" in x or "eval_loss" in x]
        losses = [x.get("loss", x.get("eval_loss")) for x in history]
        found[name] = {"losses": torch.tensor(losses), **weights(model)}
    torch.save(found, folder / f"trainer-{rank}.pt")


def launched(folder: Path) -> None:
    """Started by ``accelerate launch``: the steps of a loop with accelerate."""
    from accelerate import Accelerator

    case = Case({"ratio": 1.0, "learn_chunk": 4})
    found: dict[str, Any] = {}
    shard_on_the_cpu()
    accelerator = Accelerator()
    for name in ("plain", "ours"):
        model: Any = case.made()
        if name == "ours":
            fxseek.compile(model, **case.options)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(STEPS):
            rows: dict[str, Any] = case.rows(step, dist.get_rank(), dist.get_world_size())
            accelerator.backward(model(**rows).loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        kinds = {type(p).__name__ for p in model.parameters()}
        found[name] = {"kinds": kinds, "weights": weights(model)}
    torch.save(found, folder / f"launched-{dist.get_rank()}.pt")


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of one padded batch."""

    def __init__(self, vocabulary: int, rows: int) -> None:
        self.batch = batch(vocabulary, rows, 11, padding="right", labels="some")

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


def refusal(call: Callable[[], Any]) -> str:
    """The class and the message of fxseek's error."""
    try:
        call()
    except fxseek.FxseekError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


@contextlib.contextmanager
def wrong_gradients() -> Iterator[None]:
    """Gradients are reduced wrongly by fxseek."""
    reduce = Team.reduce
    Team.reduce = lambda team, sent: reduce(team, sent) * 1.001  # type: ignore[method-assign]
    try:
        yield
    finally:
        Team.reduce = reduce  # type: ignore[method-assign]


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
    """Bytes of whole parameters that are alive, whenever some have been received or made."""
    follow = Team.follow
    alive: list[int] = []
    known: dict[StorageWeakRef, int] = {}

    def count(least: int) -> int:
        """More than `least` are counted twice: gloo's threads let go of a gather after its end."""
        found = held()
        if found > least:
            time.sleep(0.05)
            found = held()
        return found

    def held() -> int:
        for gone in [x for x in known if x.expired()]:
            del known[gone]
        return sum(known.values())

    def followed(self: Team, wholes: Sequence[Tensor]) -> None:
        for x in wholes:
            storage = x.untyped_storage()
            known[StorageWeakRef(storage)] = storage.nbytes()
        alive.append(count(max(alive, default=0)))
        follow(self, wholes)

    Team.follow = followed
    try:
        yield alive
    finally:
        Team.follow = follow
    alive.append(count(0))


@contextlib.contextmanager
def gathering_ahead() -> Iterator[None]:
    """Gathers are begun ahead of their use on the CPU, too."""
    before = Team.overlaps
    Team.overlaps = property(lambda team: True)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Team.overlaps = before  # type: ignore[method-assign]


def order_of(run: Callable[[], Any]) -> list[str]:
    """What happens, in order: "begin" or "wait" and the first parameter of a gather, "attend"."""
    begin, wait = shards.begin, shards.Gathering.wait

    def begun(shardings: Sequence[shards.Sharding], *given: Any, **options: Any) -> Any:
        with torch.profiler.record_function(f"begin {shardings[0].name}"):
            return begin(shardings, *given, **options)

    def waited(self: shards.Gathering) -> None:
        with torch.profiler.record_function(f"wait {self.shardings[0].name}"):
            wait(self)

    shards.begin, shards.Gathering.wait = begun, waited
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
    finally:
        shards.begin, shards.Gathering.wait = begin, wait
    attention = "aten::scaled_dot_product_attention"
    events = sorted(profile.events() or [], key=lambda event: event.time_range.start)
    names = [event.name for event in events]
    return [
        "attend" if name == attention else name
        for name in names
        if name == attention or name.startswith(("begin ", "wait "))
    ]

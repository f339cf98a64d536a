"""FSDP2 with fxseek: python examples/fsdp.py, or torchrun --nproc-per-node=8 examples/fsdp.py.

Trains a small Llama that is sharded over processes on every token, in parts, and prints the loss.
By itself it starts two processes, on the CPU where there are no two devices.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fxseek

STEPS = 4


def main() -> None:
    """What each process does."""
    device = torch.device("cpu")
    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]):
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)  # the same weights in all processes
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device).train()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fxseek.compile(model, ratio=1.0, learn_chunk=64)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.Generator().manual_seed(dist.get_rank())  # rows of its own in each
    for step in range(STEPS):
        ids = torch.randint(1000, (2, 128 + 32 * dist.get_rank()), generator=rows).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = norm.full_tensor().item()  # all processes take part
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, gradient norm {total:.3f}")

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        own = sum(p.to_local().numel() for p in model.parameters())
        print(f"{sum(x.numel() for x in state.values())} parameters; this process holds {own}")
    dist.destroy_process_group()


def begin(rank: int, processes: int, port: int) -> None:
    """One of the processes that this program has started."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has started it
        main()
        sys.exit()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    torch.multiprocessing.spawn(begin, (2, address[1]), nprocs=2)  # type: ignore[attr-defined]

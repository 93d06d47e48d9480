"""Trains a small fused model for five steps, alone or as one of two processes; see ddp.py."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from helpers import CountOps, batch_for, build, with_lora
from torch.nn.parallel import DistributedDataParallel

import heterolora


def main(folder: str, kind: str = "lora") -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    base = build("bert")
    model = with_lora(base, {n: 1 + i % 8 for i, n in enumerate(_names(base))})
    if kind == "shortcuts":
        heterolora.add_shortcuts(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    heterolora.fuse(model, strict=True, backend="aten")
    trained = model
    if world > 1:
        dist.init_process_group("gloo")
        trained = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(5):
        batch = batch_for(base, rows=6, seed=seed)
        half = 6 // world
        part = {k: v[rank * half : (rank + 1) * half] for k, v in batch.items()}
        optimizer.zero_grad()
        with CountOps() as ops:
            trained(**part).loss.backward()
        assert ops.forward > 0 and ops.backward > 0
        optimizer.step()
    if rank == 0:
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        torch.save(weights, f"{folder}/{world}.pt")
    if world > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by returning: DDP's destructor waits for gloo's threads while it holds the interpreter
        # lock, which a thread may need to drop what it kept of the last all-reduce (torch 2.13).
        os._exit(0)


def _names(base: torch.nn.Module) -> list[str]:
    return [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train LoRA-XS cores on several processes with DistributedDataParallel.

    torchrun --nproc_per_node=2 examples/ddp.py

Runs on GPUs (nccl) where there is one for each process, and on the CPU (gloo) elsewhere.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import loraxs_kernels as lxk

RANK, WORLD = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
GPU = torch.cuda.device_count() >= WORLD
DEVICE = torch.device("cuda", RANK) if GPU else torch.device("cpu")


def make_model(r_std: float) -> nn.Module:
    """A small network with an adapter on both layers, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).to(DEVICE)
    # The ranks divide the SVDs among themselves and send each other the results.
    config = lxk.LoRAXSConfig(8, target_modules=["0", "2"], r_std=r_std)
    return lxk.inject_lora_xs(model, config)


def main() -> None:
    dist.init_process_group("nccl" if GPU else "gloo")
    # What is to be learned: the output of the same network with other cores.
    teacher = make_model(r_std=0.3)
    # R is all that is exchanged in a step. The bases are the same everywhere and never change, so
    # there is nothing to broadcast before a forward pass.
    model = DistributedDataParallel(make_model(r_std=1e-5), broadcast_buffers=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    generator = torch.Generator().manual_seed(RANK)  # each rank has data of its own
    first = last = 0.0
    for _ in range(60):
        x = torch.randn(64, 64, generator=generator).to(DEVICE)
        with torch.no_grad():
            target = teacher(x)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        last = float(mean) / WORLD
        first = first or last
    if RANK == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{WORLD} x {DEVICE.type}, {trained} trained numbers, loss {first:.4f} -> {last:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Train LoRA-XS cores of a model whose frozen weights are sharded by FSDP2, and save the adapter.

    torchrun --nproc_per_node=2 examples/fsdp.py

Runs on GPUs (nccl) where there is one for each process, and on the CPU (gloo) elsewhere.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import loraxs_kernels as lxk

RANK, WORLD = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
GPU = torch.cuda.device_count() >= WORLD
DEVICE = torch.device("cuda", RANK) if GPU else torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def make_base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(64) for _ in range(3))).to(DEVICE)


def make_model(r_std: float) -> nn.Sequential:
    model = make_base()
    # The ranks divide the SVDs among themselves. Inject first, then shard.
    lxk.inject_lora_xs(model, lxk.LoRAXSConfig(8, target_modules=["up", "down"], r_std=r_std))
    return model


def main() -> None:
    dist.init_process_group("nccl" if GPU else "gloo")
    mesh = init_device_mesh(DEVICE.type, (WORLD,))
    teacher = make_model(r_std=0.3)
    model = make_model(r_std=1e-5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    generator = torch.Generator().manual_seed(RANK)  # each rank has data of its own
    first = last = 0.0
    for _ in range(60):
        x = torch.randn(32, 64, generator=generator).to(DEVICE)
        with torch.no_grad():
            target = teacher(x)
        loss = nn.functional.mse_loss(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        last = float(mean) / WORLD
        first = first or last
    with tempfile.TemporaryDirectory() as directory:
        # Every rank takes part in bringing R together; rank 0 writes.
        lxk.save_adapter(model, directory)
        if RANK == 0:
            loaded = lxk.load_adapter(make_base(), directory)
            print(f"{WORLD} x {DEVICE.type}, loss {first:.4f} -> {last:.4f}")
            x = torch.randn(256, 64, generator=generator).to(DEVICE)
            difference = nn.functional.mse_loss(loaded(x), teacher(x))
            print(f"loss of the saved adapter, loaded without FSDP: {float(difference):.4f}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Layers in other processes: pickled with their caches warm, and sharded by FSDP."""

from __future__ import annotations

import copy
import gc
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import loraxs_kernels as lxk
from loraxs_kernels.backends import packing

pytestmark = pytest.mark.slow


def _x(rows: int = 40) -> Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        lxk.LoRAXSLinear(24, 32, 4, r_std=0.3), nn.Tanh(), lxk.LoRAXSLinear(32, 20, 4, r_std=0.3)
    )


def _forward(layer: nn.Module, queue: Any) -> None:
    queue.put(layer(_x()).detach().numpy())


def test_a_used_layer_goes_to_another_process() -> None:
    layer = _stack()
    want = layer(_x()).detach()
    assert packing.packed_bytes()[0] > 0
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_forward, args=(layer, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join(timeout=120)
    assert process.exitcode == 0
    torch.testing.assert_close(got, want)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _train(model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """The output after two steps on weights that change under way, and the last gradient of R."""
    for step in range(2):
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * (step + 1))
    grad = model[0].R.grad  # type: ignore[index]
    return model(x).detach(), grad


def _sharded(rank: int, world: int, port: int) -> None:
    from torch.distributed import barrier, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    single = _stack()
    model = copy.deepcopy(single)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    packing.invalidate_packed()
    y, grad = _train(model, _x())
    # FSDP refills the same tensors: a copy packed from them would be stale.
    assert packing.packed_bytes()[0] == 0
    want_y, want_grad = _train(single, _x())
    assert packing.packed_bytes()[0] > 0
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(grad.full_tensor(), want_grad)
    # No rank may hang up while the other still listens, or while its model holds the connection.
    del model, grad, y
    gc.collect()
    barrier()
    destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
def test_fsdp_never_meets_a_packed_copy() -> None:
    mp.spawn(_sharded, args=(2, _free_port()), nprocs=2)

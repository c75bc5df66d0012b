"""DDP, FSDP2, tensor parallelism and distributed checkpoints, beside one process with all the data.

The functions named ``_on_ranks_...`` run in worker processes (see ``ranks.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loraxs_kernels as lxk
from loraxs_kernels.backends import packing
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built"),
]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    pool = Ranks(request.param)
    yield pool
    pool.close()


class Block(nn.Module):
    """What a transformer has besides attention: norm, up, down, residual."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return y


def _model(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, **settings: Any
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(16, bias) for _ in range(2))).to(dtype)
    options = {"r_std": 0.3, "alpha": 6.0, **settings}
    config = lxk.LoRAXSConfig(4, target_modules=["up", "down"], **options)
    lxk.inject_lora_xs(model, config)
    return model


def _x(dtype: torch.dtype = torch.float32, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, 16, generator=generator).to(dtype)


def _loss(y: Tensor) -> Tensor:
    return y.square().mean()


def _mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def _full(t: Tensor) -> Tensor:
    whole: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return whole.detach()


def _train(model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """Steps of SGD on R; returns every trained parameter, whole."""
    cores = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(cores, 0.5)
    for _ in range(steps):
        _loss(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [_full(p) for p in cores]


def _assert_close(got: list[Tensor], want: list[Tensor], **tolerance: Any) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- the initializer -----------------------------------------------------------------------------


def _on_ranks_initialize() -> None:
    alone = torch.get_rng_state()
    model = _model()
    torch.set_rng_state(alone)
    torch.manual_seed(0)
    by_itself = nn.Sequential(*(Block(16, True) for _ in range(2)))
    config = lxk.LoRAXSConfig(4, target_modules=["up", "down"], r_std=0.3, alpha=6.0)
    lxk.inject_lora_xs(by_itself, config, share=False)
    for (name, mine), theirs in zip(
        model.state_dict().items(), by_itself.state_dict().values(), strict=True
    ):
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(mine, other) for other in everyone), name
        torch.testing.assert_close(mine, theirs)


def test_ranks_divide_the_initialization(ranks: Ranks) -> None:
    ranks.run(_on_ranks_initialize)


# ---- DDP -----------------------------------------------------------------------------------------


def _on_ranks_ddp(broadcast_buffers: bool) -> None:
    from torch.nn.parallel import DistributedDataParallel

    single, model = _model(), _model()
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    got = _train(wrapped, _mine(_x()))
    _assert_close(got, _train(single, _x()))
    reduced = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert reduced == 4 * 4 * 4  # nothing but R is exchanged


@pytest.mark.parametrize("broadcast_buffers", [False, True])
def test_ddp(ranks: Ranks, broadcast_buffers: bool) -> None:
    ranks.run(_on_ranks_ddp, broadcast_buffers)


# ---- FSDP2 ---------------------------------------------------------------------------------------


def _shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def _on_ranks_fsdp(dtype: torch.dtype) -> None:
    single = _model(dtype)
    got = _train(_shard(_model(dtype)), _mine(_x(dtype)))
    # Frozen weights in 16 bits beside cores in float32: FSDP gathers both.
    assert all(t.dtype == torch.float32 for t in got)
    if dtype == torch.float32:
        _assert_close(got, _train(single, _x(dtype)))
        return
    # In 16 bits the gradients are sums of rounded terms, whose order differs.
    truth = _train(single.double(), _x(torch.float64))
    _assert_close(got, [t.float() for t in truth], rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(_on_ranks_fsdp, dtype)


def _on_ranks_fsdp_mixed_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    packing.invalidate_packed()
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    model = _shard(_model(), mp_policy=policy)
    assert model(_mine(_x())).dtype == torch.bfloat16
    got = _train(model, _mine(_x()))
    assert all(t.dtype == torch.float32 for t in got)
    assert packing.packed_bytes()[0] == 0
    _assert_close(got, _train(_model(), _x()), rtol=0.05, atol=2e-3)


def test_fsdp_mixed_precision(ranks: Ranks) -> None:
    ranks.run(_on_ranks_fsdp_mixed_precision)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def _on_ranks_checkpoint(directory: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    trained = _shard(_model())
    want = _train(trained, _mine(_x()))
    y = trained(_mine(_x()))
    dcp.save(get_model_state_dict(trained), checkpoint_id=f"{directory}/whole")
    cores_only = StateDictOptions(ignore_frozen_params=True)
    cores = get_model_state_dict(trained, options=cores_only)
    cores = {name: value for name, value in cores.items() if name.endswith(".R")}
    assert len(cores) == 4
    dcp.save(cores, checkpoint_id=f"{directory}/cores")

    # The whole state, into a model of other numbers.
    other = _model(seed=7)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.normal_()
    other = _shard(other)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=f"{directory}/whole")
    set_model_state_dict(other, state)
    assert torch.equal(other(_mine(_x())), y)
    # R alone, into a model that starts from the same base.
    fresh = _shard(_model())
    state = {n: v for n, v in get_model_state_dict(fresh).items() if n.endswith(".R")}
    dcp.load(state, checkpoint_id=f"{directory}/cores")
    set_model_state_dict(fresh, state, options=StateDictOptions(strict=False))
    assert torch.equal(fresh(_mine(_x())), y)
    _assert_close([_full(p) for p in fresh.parameters() if p.requires_grad], want, rtol=0, atol=0)
    # Without FSDP, the file holds whole tensors.
    plain = _model()
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=f"{directory}/whole")
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(_mine(_x())), y)


def test_distributed_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_on_ranks_checkpoint, str(tmp_path))


def _on_ranks_save_adapter(directory: str) -> None:
    trained = _shard(_model())
    _train(trained, _mine(_x()))
    parallel = _tensor_parallel(_model())
    # A directory for each rank, to see who writes.
    for name, model in (("fsdp", trained), ("tp", parallel)):
        mine = Path(directory, f"{name}{dist.get_rank()}")
        lxk.save_adapter(model, mine, embed_bases=name == "fsdp")
        dist.barrier()
        assert mine.exists() == (dist.get_rank() == 0)
        torch.manual_seed(0)
        loaded = nn.Sequential(*(Block(16, True) for _ in range(2)))
        lxk.load_adapter(loaded, f"{directory}/{name}0")
        torch.testing.assert_close(loaded(_x()), model(_x()))


def test_save_adapter_of_a_sharded_model(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_on_ranks_save_adapter, str(tmp_path))


# ---- tensor parallelism --------------------------------------------------------------------------


class Communication(TorchDispatchMode):
    """Records each functional collective and the number of elements it sends."""

    LOCAL = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "_c10d_functional" and name not in self.LOCAL:
            self.calls.append((name, args[0].numel()))
        return func(*args, **(kwargs or {}))


def _plan(sequence: bool = False) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    from loraxs_kernels.parallel import ColwiseParallelLoRAXS, RowwiseParallelLoRAXS

    between: dict[str, Any] = {"input_layouts": Shard(1)} if sequence else {}
    after: dict[str, Any] = {"output_layouts": Shard(1)} if sequence else {}
    return {
        "*.up": ColwiseParallelLoRAXS(**between),
        "*.down": RowwiseParallelLoRAXS(**after),
    }


def _tensor_parallel(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    parallel: nn.Module = parallelize_module(model, mesh, _plan(**options))
    return parallel


def _results(model: Any, x: Tensor, seed: int = 5) -> list[Tensor]:
    """y, dx and every dR of one pass."""
    x = x.clone().requires_grad_()
    cores = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    y = model(x)
    grads = torch.autograd.grad(_loss(y), [x, *cores])
    return [y.detach(), *(_full(g) for g in grads)]


def _tolerance(dtype: torch.dtype) -> dict[str, Any]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 256 * eps, "atol": 64 * eps}


def _on_ranks_tensor_parallel(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    single, model = _model(dtype, **settings), _tensor_parallel(_model(dtype, **settings))
    _assert_close(_results(model, _x(dtype)), _results(single, _x(dtype)), **_tolerance(dtype))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(_x(dtype)), single.eval()(_x(dtype)), **_tolerance(dtype)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_tensor_parallel(ranks: Ranks, dtype: torch.dtype, dropout: float, backend: str) -> None:
    ranks.run(_on_ranks_tensor_parallel, dtype, {"dropout": dropout, "backend": backend})


def test_tensor_parallel_without_bias(ranks: Ranks) -> None:
    ranks.run(_on_ranks_tensor_parallel, torch.float64, {"bias": False})


def _on_ranks_communication() -> None:
    x = _x()
    model = _tensor_parallel(nn.Sequential(_model()[0]))
    x.requires_grad_()
    core, activations = 4 * 4, x.numel()
    with Communication() as forward:
        y = model(x)
    assert forward.calls == [("all_reduce", activations)]
    with Communication() as backward:
        _loss(y).backward()
    # Of what PyTorch's own styles send besides, there is one all-reduce of dX.
    assert sorted(backward.calls) == sorted(
        [("all_reduce", activations), ("all_reduce", core), ("all_reduce", core)]
    )
    with Communication() as evaluation, torch.no_grad():
        model(x)
    assert evaluation.calls == [("all_reduce", activations)]


def test_the_adapter_adds_only_the_sum_of_dR(ranks: Ranks) -> None:
    ranks.run(_on_ranks_communication)


def _on_ranks_sequence_parallel() -> None:
    """Between the layers each rank has its part of the sequence: no all-reduce of activations."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = _x().repeat(1, 4, 1)
    single: Any = _model()[0]
    want_x = x.clone().requires_grad_()
    want = single.down(torch.tanh(single.up(want_x)))
    _loss(want).backward()
    model: Any = _tensor_parallel(nn.Sequential(_model()[0]), sequence=True).get_submodule("0")
    mine = x.chunk(world, 1)[rank].clone().requires_grad_()
    with Communication() as sent:
        y = model.down(torch.tanh(model.up(mine)))
        _loss(y).backward()
    assert mine.grad is not None and want_x.grad is not None
    kinds = sorted(name for name, _ in sent.calls)
    assert kinds == 2 * ["all_gather_into_tensor"] + 2 * ["all_reduce"] + 2 * [
        "reduce_scatter_tensor"
    ]
    torch.testing.assert_close(y, want.chunk(world, 1)[rank])
    # The mean over a part of the sequence weighs its rows more, world times.
    torch.testing.assert_close(mine.grad / world, want_x.grad.chunk(world, 1)[rank])
    torch.testing.assert_close(_full(model.up.R.grad) / world, single.up.R.grad)


def test_sequence_parallel_layouts(ranks: Ranks) -> None:
    ranks.run(_on_ranks_sequence_parallel)


def _on_ranks_tensor_parallel_training() -> None:
    single, model = _model(), _tensor_parallel(_model())
    packing.invalidate_packed()
    _assert_close(_train(model, _x()), _train(single, _x()))
    # Four weights in both directions are packed once, each rank its own shards.
    held = packing.packed_bytes()[0]
    model(_x())
    assert packing.packed_bytes()[0] == held > 0


def test_training_tensor_parallel(ranks: Ranks) -> None:
    ranks.run(_on_ranks_tensor_parallel_training)


def _on_ranks_checkpointed(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = _tensor_parallel(_model(dropout=0.3))
    assert isinstance(model, nn.Sequential)
    blocks = list(model)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    x = _x().requires_grad_()
    torch.manual_seed(5)
    y = Checkpointed()(x)
    _loss(y).backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    got = [y.detach(), *(_full(g) for g in grads if g is not None)]
    _assert_close(got, _results(_model(dropout=0.3), _x()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_tensor_parallel(ranks: Ranks, use_reentrant: bool) -> None:
    ranks.run(_on_ranks_checkpointed, use_reentrant)


def _on_ranks_compiled() -> None:
    model = _tensor_parallel(_model(dropout=0.3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _assert_close(_results(compiled, _x()), _results(_model(dropout=0.3), _x()))
    torch._dynamo.reset()


def test_compiled_tensor_parallel(ranks: Ranks) -> None:
    if ranks.world != 2:
        pytest.skip("each rank compiles: two are enough")
    ranks.run(_on_ranks_compiled)


def _on_ranks_several_adapters() -> None:
    single, model = _model(num_adapters=3), _tensor_parallel(_model(num_adapters=3))
    with torch.no_grad():
        for a, b in zip(single.parameters(), model.parameters(), strict=True):
            if a.requires_grad:
                a.normal_(generator=torch.Generator().manual_seed(3))
                b.to_local().copy_(a)  # type: ignore[attr-defined]
    ids = torch.tensor([0, 2, -1, 1, 1, 0, 2, 2])
    with lxk.use_adapters(single, ids), lxk.use_adapters(model, ids):
        _assert_close(_results(model, _x()), _results(single, _x()))


def test_several_adapters_tensor_parallel(ranks: Ranks) -> None:
    ranks.run(_on_ranks_several_adapters)


def _on_ranks_merge() -> None:
    single, model = _model(), _tensor_parallel(_model())
    want = single(_x()).detach()
    before = [_full(p) for p in model.parameters()]
    for module in model.modules():
        if isinstance(module, lxk.LoRAXSLinear):
            module.merge()
    torch.testing.assert_close(model(_x()).detach(), want)
    for module in model.modules():
        if isinstance(module, lxk.LoRAXSLinear):
            module.unmerge()
    after = [_full(p) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_merging_tensor_parallel(ranks: Ranks) -> None:
    ranks.run(_on_ranks_merge)


def _on_ranks_trained_bias_and_weight() -> None:
    """Whatever a user unfreezes has the gradient of the whole layer."""
    single, model = _model(torch.float64), _tensor_parallel(_model(torch.float64))
    for m in (single, model):
        for module in m.modules():
            if isinstance(module, lxk.LoRAXSLinear):
                module.weight.requires_grad_()
                module.bias.requires_grad_()  # type: ignore[union-attr]
    got, want = (_results(m, _x(torch.float64)) for m in (model, single))
    assert len(got) == 2 + 4 * 3
    _assert_close(got, want, **_tolerance(torch.float64))


def test_trained_base_tensor_parallel(ranks: Ranks) -> None:
    ranks.run(_on_ranks_trained_bias_and_weight)


def _on_ranks_fsdp_and_tensor_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _tensor_parallel(_model(), mesh["tp"])
    assert isinstance(model, nn.Sequential)
    _shard(model, mesh=mesh["dp"])
    got = _train(model, _x().chunk(2)[mesh["dp"].get_local_rank()])
    _assert_close(got, _train(_model(), _x()))


def _on_ranks_tensor_parallel_checkpoint(directory: str) -> None:
    import torch.distributed.checkpoint as dcp

    model = _tensor_parallel(_model())
    _train(model, _x())
    y = model(_x())
    dcp.save(model.state_dict(), checkpoint_id=directory)
    plain = _model(seed=7)
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=directory)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(_x()), y)


def test_fsdp_and_tensor_parallel(ranks: Ranks) -> None:
    if ranks.world != 4:
        pytest.skip("a mesh of 2 x 2 needs four ranks")
    ranks.run(_on_ranks_fsdp_and_tensor_parallel)


def test_tensor_parallel_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_on_ranks_tensor_parallel_checkpoint, str(tmp_path))


def _on_ranks_refusals() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from loraxs_kernels.parallel import ColwiseParallelLoRAXS, RowwiseParallelLoRAXS

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = lxk.LoRAXSLinear(7, 9, 2)
    with pytest.raises(TypeError, match=r"^module: got Linear"):
        parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallelLoRAXS())
    with pytest.raises(ValueError, match=r"^out_features: got 9"):
        parallelize_module(layer, mesh, ColwiseParallelLoRAXS())
    with pytest.raises(ValueError, match=r"^in_features: got 7"):
        parallelize_module(layer, mesh, RowwiseParallelLoRAXS())
    assert type(layer) is lxk.LoRAXSLinear and type(layer.weight) is nn.Parameter
    model = _tensor_parallel(_model())
    assert "rowwise over" in repr(model)
    with pytest.raises(RuntimeError, match="eject before parallelizing"):
        lxk.eject_lora_xs(model)


def test_refusals(ranks: Ranks) -> None:
    ranks.run(_on_ranks_refusals)

"""The layer through its public functions: values, gradients, transforms, modules, files, errors."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loraxs_kernels as lxk
from loraxs_kernels.backends import _native, packing, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
S = 0.7


@dataclass
class Problem:
    """The operands of one call, and what differentiates it."""

    x: Tensor
    weight: Tensor
    A: Tensor
    R: Tensor
    B: Tensor
    bias: Tensor
    grad_y: Tensor
    ids: Tensor | None = None

    def to(self, dtype: torch.dtype, core: torch.dtype | None = None) -> Problem:
        names = ("x", "weight", "A", "B", "bias", "grad_y")
        cast = {n: getattr(self, n).to(dtype) for n in names}
        return Problem(**cast, R=self.R.to(core or dtype), ids=self.ids)


def problem(
    rows: int, k: int, n: int, rank: int, *, adapters: int | None = None, seed: int = 0
) -> Problem:
    g = torch.Generator().manual_seed(seed * 104729 + rows * 7919 + k * 31 + n * 17 + rank)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    shape = (rank, rank) if adapters is None else (adapters, rank, rank)
    ids = None if adapters is None else torch.randint(-1, adapters, (rows,), generator=g)
    return Problem(
        draw(rows, k), draw(n, k, scale=k**-0.5), draw(rank, k, scale=k**-0.5),
        draw(*shape, scale=rank**-0.5), draw(n, rank, scale=rank**-0.5), draw(n), draw(rows, n),
        ids,
    )  # fmt: skip


def eager(p: Problem, x: Tensor, R: Tensor, bias: Tensor, *, packed: bool = False) -> Tensor:
    """The expression every implementation runs; ``packed``: with oneDNN's product as the base."""
    if packed:
        base = PackedLinear.apply(x, p.weight, bias)
    else:
        base = F.linear(x, p.weight, bias)
    q = (x @ p.A.T).to(R.dtype)
    if p.ids is None:
        t = q @ R.T
    else:
        t = torch.einsum("mj,mij->mi", q, R[p.ids.clamp(min=0)]) * (p.ids >= 0).unsqueeze(1)
    return base + S * (t.to(x.dtype) @ p.B.T)


class PackedLinear(torch.autograd.Function):
    """The bare packed product, forward and backward: the other fp32 product of docs/cpu.md."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight = weight
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias.detach(), "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed = torch.ops.mkldnn._reorder_linear_weight(ctx.weight.T.contiguous(), None)
        dx = torch.ops.mkldnn._linear_pointwise(grad.contiguous(), packed, None, "none", [], "")
        return dx, None, grad.sum(0)


def results(f: Any, p: Problem) -> dict[str, Tensor]:
    """y and all gradients of ``f(x, R, bias)``."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, p.R, p.bias)]
    y = f(*leaves)
    grads = torch.autograd.grad(y, leaves, p.grad_y)
    return dict(zip(("y", "dx", "dR", "db"), (y.detach(), *grads), strict=True))


Case = tuple[dict[str, Tensor], Problem, Problem]


def check(*cases: Case) -> None:
    """The tolerance rule: twice the eager error plus 2 eps of the largest value; max and RMS.

    A case is (what was computed, the problem in float64, the problem in the dtype). Errors of
    several cases are pooled: a single number, such as dR at rank 1, has a lucky eager error too
    often.
    In float64 there is no better truth; the classical bound for sums of n terms, n * eps, counts.
    """
    pooled: dict[str, list[list[Tensor]]] = {}
    for got, p64, p in cases:
        truth = results(lambda x, R, b, q=p64: eager(q, x, R, b), p64)
        peers = [results(lambda x, R, b, q=p: eager(q, x, R, b), p)]
        if p.x.dtype == torch.float32 and len(p.x):
            peers.append(results(lambda x, R, b, q=p: eager(q, x, R, b, packed=True), p))
        for name, value in got.items():
            assert value.dtype == peers[0][name].dtype
            assert value.shape == truth[name].shape
            columns = [truth[name], value, *(peer[name] for peer in peers)]
            pooled.setdefault(name, []).append([c.double().flatten() for c in columns])
    dtype, terms = cases[0][2].x.dtype, sum(cases[0][2].weight.shape)
    for name, rows in pooled.items():
        true, value, *others = (torch.cat(column) for column in zip(*rows, strict=True))
        if not true.numel():
            continue
        eps = torch.finfo(cases[0][0][name].dtype).eps
        slack = (terms if dtype == torch.float64 else 2) * eps * true.abs().max()
        errors = [(other - true).abs() for other in others]
        error = (value - true).abs()
        assert error.max() <= 2 * max(e.max() for e in errors) + slack, name
        rms = max(e.square().mean().sqrt() for e in errors)
        assert error.square().mean().sqrt() <= 2 * rms + slack, name


@pytest.fixture(params=["reference", "onednn", "onednn-python", "onednn-unpacked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a call can run on the CPU."""
    if request.param == "onednn-python":
        monkeypatch.setattr(_native, "operators", lambda: None)
    if request.param == "onednn-unpacked":
        monkeypatch.setenv("LORAXS_PREPACK", "0")
    return str(request.param.split("-")[0])


def frozen(p: Problem) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    made = [nn.Parameter(t, requires_grad=False) for t in (p.weight, p.A, p.B)]
    return made[0], made[1], made[2]


SHAPES = [(1, 17, 3), (3, 33, 65), (17, 130, 41), (40, 65, 129), (0, 8, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 12, 20, 25, 64, 136, 256])
def test_values_and_gradients(backend: str, dtype: torch.dtype, rank: int) -> None:
    for rows, k, n in SHAPES if rank <= 64 else SHAPES[1:3]:
        for core in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
            cases: list[Case] = []
            for seed in range(8 if rank <= 4 else 1):
                p64 = problem(rows, k, n, rank, seed=seed).to(dtype, core).to(torch.float64)
                p = p64.to(dtype, core)
                W, A, B = frozen(p)
                got = results(
                    lambda x, R, b, W=W, A=A, B=B: lxk.lora_xs_linear(
                        x, W, A, R, B, b, scaling=S, backend=backend
                    ),
                    p,
                )
                cases.append((got, p64, p))
            check(*cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_odd_shapes(backend: str, dtype: torch.dtype) -> None:
    p64 = problem(300, 1504, 736, 20).to(dtype).to(torch.float64)
    p = p64.to(dtype)
    W, A, B = frozen(p)
    f = lambda x, R, b: lxk.lora_xs_linear(x, W, A, R, B, b, scaling=S, backend=backend)  # noqa: E731
    check((results(f, p), p64, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "sorted", "absent", "none", "batch", "int32"])
def test_adapter_ids(backend: str, dtype: torch.dtype, kind: str) -> None:
    p64 = problem(29, 33, 65, 12, adapters=5).to(dtype).to(torch.float64)
    assert p64.ids is not None
    if kind == "sorted":
        p64.ids = p64.ids.sort().values
    elif kind == "absent":
        p64.ids = torch.where(p64.ids == 3, 1, p64.ids)
    elif kind == "none":
        p64.ids = torch.full_like(p64.ids, -1)
    p = p64.to(dtype)
    W, A, B = frozen(p)
    ids: Any = lxk.AdapterBatch(p64.ids, 5) if kind == "batch" else p64.ids
    ids = p64.ids.int() if kind == "int32" else ids
    got = results(
        lambda x, R, b: lxk.lora_xs_linear(
            x, W, A, R, B, b, scaling=S, backend=backend, adapter_ids=ids
        ),
        p,
    )
    check((got, p64, p))
    if kind in ("absent", "none"):
        assert not got["dR"][3].any()


def test_ids_per_sequence_equal_ids_per_row() -> None:
    p = problem(12, 9, 7, 4, adapters=3).to(torch.float32)
    W, A, B = frozen(p)
    x, ids = p.x.view(4, 3, 9), torch.tensor([2, -1, 0, 2])
    rows = lxk.lora_xs_linear(x, W, A, p.R, B, adapter_ids=ids.repeat_interleave(3).view(4, 3))
    assert torch.equal(lxk.lora_xs_linear(x, W, A, p.R, B, adapter_ids=ids), rows)
    batch = lxk.AdapterBatch(ids, 3)
    assert torch.equal(lxk.lora_xs_linear(x, W, A, p.R, B, adapter_ids=batch), rows)


def test_leading_dimensions_and_strides(backend: str) -> None:
    p = problem(24, 18, 10, 4).to(torch.float32)
    W, A, B = frozen(p)
    call = lambda x: lxk.lora_xs_linear(x, W, A, p.R, B, p.bias, backend=backend)  # noqa: E731
    flat = call(p.x)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(call(p.x.view(2, 3, 4, 18)).view(24, 10), flat, **close)
    torch.testing.assert_close(call(p.x[5]), flat[5], **close)
    torch.testing.assert_close(call(p.x.T.contiguous().T), flat, **close)
    torch.testing.assert_close(call(p.x.repeat(1, 2)[:, :18]), flat, **close)
    torch.testing.assert_close(call(p.x[::3]), flat[::3], **close)


def test_update_leaves_base_alone_and_passes_its_gradient(backend: str) -> None:
    p = problem(9, 12, 7, 4).to(torch.float32)
    base = torch.randn(9, 7, requires_grad=True)
    before = base.detach().clone()
    x = p.x.clone().requires_grad_()
    y = lxk.lora_xs_update(base, x, p.A, p.R, p.B, scaling=S, backend=backend)
    torch.testing.assert_close(y, before + S * (p.x @ p.A.T @ p.R.T @ p.B.T))
    gb, gx = torch.autograd.grad(y, (base, x), p.grad_y)
    assert torch.equal(gb, p.grad_y)
    torch.testing.assert_close(gx, S * (p.grad_y @ p.B @ p.R @ p.A))
    assert torch.equal(base.detach(), before)


# ---------------------------------------------------------------------------------- dropout


def philox(key: int, counter: int) -> int:
    """First word of Philox4x32-10, in plain integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_dropout_mask_is_philox() -> None:
    assert philox(0, 0) == 0x6627E8D5  # Random123's known answer
    seed = torch.tensor([0x1234567890ABCDEF])
    least = int(0.3 * 2**32)
    want = [[philox(int(seed), i * 37 + j) >= least for j in range(37)] for i in range(5)]
    assert torch.equal(reference.dropout_mask(seed, 5, 37, 0.3), torch.tensor(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(backend: str, dtype: torch.dtype) -> None:
    p = problem(20, 50, 30, 8).to(dtype)
    W, A, B = frozen(p)

    def run(name: str) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return results(
            lambda x, R, b: lxk.lora_xs_linear(
                x, W, A, R, B, b, scaling=S, dropout_p=0.4, backend=name
            ),
            p,
        )

    torch.manual_seed(5)
    keep = reference.dropout_mask(torch.randint(0, 2**63 - 1, (1,)), 20, 50, 0.4)
    wide = p.to(torch.float64)
    want = results(
        lambda x, R, b: (
            F.linear(x, wide.weight, b) + S * ((x * keep / 0.6) @ wide.A.T @ R.T @ wide.B.T)
        ),
        wide,
    )
    got, again = run(backend), run(backend)
    for name, value in got.items():
        assert torch.equal(value, again[name])
        error = (value.double() - want[name]).abs().max() / want[name].abs().max()
        assert error <= 16 * torch.finfo(dtype).eps, name


def test_dropout_under_activation_checkpointing() -> None:
    layer = lxk.LoRAXSLinear(16, 12, 4, dropout=0.5, r_std=1.0)
    x = torch.randn(6, 16, requires_grad=True)
    found = []
    for run in (
        layer,
        lambda t: checkpoint(layer, t, use_reentrant=False),
        lambda t: checkpoint(layer, t, use_reentrant=True),
    ):
        torch.manual_seed(3)
        y = run(x)
        found.append((y, *_backward(y, x, layer)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def _backward(y: Tensor, x: Tensor, layer: lxk.LoRAXSLinear) -> tuple[Tensor, Tensor]:
    x.grad = layer.R.grad = None
    y.square().sum().backward()
    assert x.grad is not None and layer.R.grad is not None
    return x.grad, layer.R.grad


# ---------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["reference", "onednn"])
@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(name: str, adapters: int | None, dropout: float) -> None:
    p = problem(4, 5, 6, 3, adapters=adapters)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.R, p.bias)]

    def f(x: Tensor, R: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lxk.lora_xs_linear(
            x, p.weight, p.A, R, p.B, b, scaling=S, dropout_p=dropout, adapter_ids=p.ids,
            backend=name,
        )  # fmt: skip

    batched = dropout == 0.0
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=batched)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_torch_func() -> None:
    p = problem(5, 7, 6, 3)
    xs = torch.randn(4, 5, 7, dtype=torch.float64)
    Rs = torch.randn(4, 3, 3, dtype=torch.float64)

    def ours(R: Tensor, x: Tensor) -> Tensor:
        return lxk.lora_xs_linear(x, p.weight, p.A, R, p.B, p.bias, scaling=S).square().sum()

    def plain(R: Tensor, x: Tensor) -> Tensor:
        return eager(p, x, R, p.bias).square().sum()

    for dims in ((None, 0), (0, 0), (0, None)):
        args = (Rs if dims[0] == 0 else p.R, xs if dims[1] == 0 else xs[0])
        for wrt in (0, 1):
            got = torch.func.vmap(torch.func.grad(ours, wrt), dims)(*args)
            want = torch.func.vmap(torch.func.grad(plain, wrt), dims)(*args)
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.func.hessian(ours)(p.R, xs[0]), torch.func.hessian(plain)(p.R, xs[0])
    )


@pytest.mark.parametrize("trained", ["weight", "A", "B"])
def test_trained_base_has_exact_gradients_or_raises(trained: str) -> None:
    p = problem(5, 7, 6, 3)
    leaf = getattr(p, trained).requires_grad_()
    y = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, p.bias, scaling=S)
    (got,) = torch.autograd.grad(y, leaf, p.grad_y)
    (want,) = torch.autograd.grad(eager(p, p.x, p.R, p.bias), leaf, p.grad_y)
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match=trained):
        lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, backend="onednn")


def test_only_q_is_saved() -> None:
    layer = lxk.LoRAXSLinear(64, 48, 4)
    known = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(32, 64, requires_grad=True)
        y = layer(x * 1.0)
    extra = [t.numel() for t in saved if t.data_ptr() not in known and t.numel() > 1]
    assert extra == [32 * 4]
    held = torch.randn(32, 64)
    ref = weakref.ref(held)
    y = layer(held)
    del held
    gc.collect()
    assert ref() is None and y.requires_grad


def test_autocast() -> None:
    layer = lxk.LoRAXSLinear(32, 24, 4, r_std=1.0)
    x = torch.randn(40, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.R.grad is not None and layer.R.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("ids", [None, torch.tensor([1, -1, 0, 1])])
def test_compile_without_graph_break(ids: Tensor | None) -> None:
    layer = lxk.LoRAXSLinear(16, 12, 4, r_std=1.0, num_adapters=None if ids is None else 2)
    x = torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for f in (compiled, layer):
        y = f(x, ids)
        grads = torch.autograd.grad(y.square().sum(), (x, layer.R))
        if f is compiled:
            first = (y, *grads)
    for a, b in zip(first, (y, *grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_inductor() -> None:
    layer = lxk.LoRAXSLinear(16, 12, 4, r_std=1.0)
    x = torch.randn(4, 16, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    got = torch.autograd.grad(y.square().sum(), (x, layer.R))
    want = torch.autograd.grad(layer(x).square().sum(), (x, layer.R))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    p = problem(5, 9, 7, 3, adapters=2).to(torch.float32)
    ops = torch.ops.loraxs_kernels
    seed = torch.tensor([7])
    args = (p.x, p.weight, None, p.A, p.R, p.B, p.bias, seed, p.ids, None, None, S, 0.2, 1, "")
    torch.library.opcheck(ops.forward.default, args)
    q = ops.forward(*args)[1]
    rest = (seed, p.ids, None, None, S, 0.2, True, True, True, 1, "")
    torch.library.opcheck(ops.backward.default, (p.grad_y, q, p.weight, p.A, p.R, p.B, *rest))


# ---------------------------------------------------------------------------------- packing


def held(layer: nn.Module) -> int:
    return sum(
        len(packing._entries[id(t)].copies)
        for t in (*layer.parameters(), *layer.buffers())
        if id(t) in packing._entries
    )


def rows_of(layer: lxk.LoRAXSLinear) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(40, layer.in_features, generator=g, dtype=layer.weight.dtype)


def expected(layer: lxk.LoRAXSLinear) -> Tensor:
    return F.linear(rows_of(layer), layer.weight + layer.delta_weight(), layer.bias)


@pytest.mark.parametrize("change", ["copy_", "load_state_dict", "merge", "replace", "double"])
def test_packed_copies_follow_the_weight(change: str) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))
    assert held(layer) > 0
    other = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    with torch.no_grad():
        if change == "copy_":
            layer.weight.copy_(other.weight)
        elif change == "load_state_dict":
            layer.load_state_dict(other.state_dict())
        elif change == "merge":
            before = layer.weight.clone()
            want = expected(layer)
            layer.merge()
            torch.testing.assert_close(layer(rows_of(layer)), want)
            layer.unmerge()
            assert torch.equal(layer.weight, before)
        elif change == "replace":
            layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
        else:
            layer.double()
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))


def test_packed_copies_die_with_the_weight_and_break_nothing() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4)
    x = rows_of(layer)
    y = layer(x)
    assert set(layer.state_dict()) == {"weight", "bias", "A", "B", "R"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), y)
    layer.share_memory()
    torch.testing.assert_close(layer(x), y)
    key = id(layer.weight)
    assert key in packing._entries
    del layer, y
    gc.collect()
    assert key not in packing._entries


def test_packing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, prepack=False)
    want = expected(layer)
    torch.testing.assert_close(layer(rows_of(layer)), want)
    assert held(layer) == 0
    monkeypatch.setenv("LORAXS_PREPACK", "0")
    layer.prepack = True
    torch.testing.assert_close(layer(rows_of(layer)), want)
    assert held(layer) == 0


def test_what_is_never_packed() -> None:
    p = problem(40, 24, 20, 4).to(torch.float32)
    lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B)
    assert not packing._entries[id(p.weight)].copies, "a tensor met for the first time"
    lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B)
    assert packing._entries[id(p.weight)].copies
    with torch.inference_mode():
        w = p.weight.clone()
        lxk.lora_xs_linear(p.x, w, p.A, p.R, p.B)
        lxk.lora_xs_linear(p.x, w, p.A, p.R, p.B)
    assert not packing.packable(w) and id(w) not in packing._entries
    assert not packing.packable(nn.Parameter(p.weight))


def test_invalidate_packed() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    layer(rows_of(layer))
    layer.weight.data.add_(1.0)
    lxk.invalidate_packed(layer)
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))
    with pytest.raises(TypeError, match="module"):
        lxk.invalidate_packed(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.value = nn.Linear(24, 32)
        self.again = self.query
        self.classifier = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.value(self.again(torch.relu(self.query(x)))))


def config(**changes: Any) -> lxk.LoRAXSConfig:
    values: dict[str, Any] = {
        "rank": 4,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "alpha": 8.0,
        "r_std": 0.3,
    }
    return lxk.LoRAXSConfig(**{**values, **changes})


X = torch.randn(10, 24, generator=torch.Generator().manual_seed(2))


def test_inject_and_eject() -> None:
    net = Net()
    net.value.bias.requires_grad_(False)
    weight, y = net.query.weight, net(X)
    assert lxk.inject_lora_xs(net, config(r_init="zeros", rank_pattern={"value": 7})) is net
    torch.testing.assert_close(net(X), y)
    assert net.again is net.query and isinstance(net.query, lxk.LoRAXSLinear)
    assert net.query.weight is weight
    assert isinstance(net.value, lxk.LoRAXSLinear)
    assert (net.query.rank, net.value.rank, net.value.scaling) == (4, 7, 8 / 7)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"query.R", "value.R", "classifier.weight", "classifier.bias"}
    lxk.eject_lora_xs(net)
    assert type(net.query) is nn.Linear and net.query.weight is weight and net.again is net.query
    frozen_now = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen_now == {"value.bias"}
    assert torch.equal(net(X), y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["qeury"]}, "target_modules.*'query'"),
        ({"rank": 30}, "query: rank"),
        ({"modules_to_save": ["klassifier"]}, "modules_to_save.*'classifier'"),
        ({"rank_pattern": {"velue": 3}}, "rank_pattern.*'value'"),
    ],
)
def test_failed_injection_leaves_the_model_alone(changes: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        lxk.inject_lora_xs(net, config(**changes))
    assert not any(isinstance(m, lxk.LoRAXSLinear) for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_attention_out_proj_is_refused() -> None:
    net = nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match="subclass"):
        lxk.inject_lora_xs(net, lxk.LoRAXSConfig(2, target_modules="out_proj"))


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(20, 12)
    net = nn.Sequential(conv)
    x, weight = torch.randn(5, 12), conv.weight.detach().clone()
    y = net(x)
    lxk.inject_lora_xs(net, lxk.LoRAXSConfig(3, target_modules="0", r_init="zeros"))
    torch.testing.assert_close(net(x), y)
    lxk.eject_lora_xs(net)
    back = net.get_parameter("0.weight")
    assert type(net.get_submodule("0")) is Conv1D and torch.equal(back, weight)
    assert torch.equal(net(x), y)


def test_to_lora_and_delta_weight() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, alpha=8.0, r_std=1.0)
    lora_A, lora_B = layer.to_lora()
    torch.testing.assert_close(lora_B @ lora_A, layer.delta_weight())
    torch.testing.assert_close(layer.delta_weight(), 2.0 * layer.B @ layer.R.detach() @ layer.A)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.unmerge()


def test_use_adapters() -> None:
    net = Net()
    lxk.inject_lora_xs(net, config(num_adapters=3))
    ids = torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 1, 1])
    with pytest.raises(ValueError, match="adapter_ids"):
        net(X)
    with lxk.use_adapters(net, ids) as batch:
        y = net(X)
        with lxk.use_adapters(net, [-1] * 10):
            base = net(X)
        assert torch.equal(net(X), y)
    assert isinstance(batch, lxk.AdapterBatch)
    torch.testing.assert_close(y[3], base[3])
    assert isinstance(net.query, lxk.LoRAXSLinear) and net.query.active_ids is None
    lxk.eject_lora_xs(net)
    torch.testing.assert_close(net(X), base)


@pytest.mark.parametrize("sigma", ["A", "B", "both", "none"])
@pytest.mark.parametrize("sign", ["u", "v", None])
def test_factors(sigma: str, sign: str | None) -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    f = lxk.lora_xs_factors(W, 20, sigma=sigma, sign=sign)
    middle = torch.diag(f.S) if sigma == "none" else torch.eye(20)
    full = f.B @ middle @ f.A
    torch.testing.assert_close(full, W, rtol=1e-4, atol=1e-4)
    if sign == "u":
        U = f.B / f.B.norm(dim=0)
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    if sign == "v":
        V = f.A / f.A.norm(dim=1, keepdim=True)
        assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(f.R, lxk.lora_xs_factors(W, 20).R)


# ---------------------------------------------------------------------------------- files


def trained(base: Net, **changes: Any) -> Net:
    net = copy.deepcopy(base)
    lxk.inject_lora_xs(net, config(**changes))
    with torch.no_grad():
        net.classifier.weight.mul_(2.0)
    return net


@pytest.mark.parametrize("embed_bases", [False, True])
@pytest.mark.parametrize("injected", [False, True])
def test_round_trip(tmp_path: Path, embed_bases: bool, injected: bool) -> None:
    base = Net()
    net = trained(base)
    lxk.save_adapter(net, tmp_path, embed_bases=embed_bases)
    fresh = copy.deepcopy(base)
    if injected:
        lxk.inject_lora_xs(fresh, config(seed=3))
    lxk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), net(X))


@pytest.mark.filterwarnings("ignore")
def test_signs_and_rotations_of_the_bases_are_repaired(tmp_path: Path) -> None:
    base = Net()
    u, _, vh = torch.linalg.svd(base.value.weight.detach(), full_matrices=False)
    s = torch.linspace(3, 1, 24)
    s[1] = s[2] = s[0]  # a cluster
    with torch.no_grad():
        base.value.weight.copy_(u * s @ vh)
    net = trained(base)
    lxk.save_adapter(net, tmp_path)
    fresh = copy.deepcopy(base)
    lxk.inject_lora_xs(fresh, config())
    flip = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    rotate = torch.block_diag(turn, torch.ones(1, 1))
    with torch.no_grad():
        for layer, T in ((fresh.query, flip), (fresh.value, rotate)):
            assert isinstance(layer, lxk.LoRAXSLinear)
            layer.A.copy_(T @ layer.A)
            layer.B.copy_(layer.B @ T.T)
    lxk.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(X), net(X), rtol=1e-4, atol=1e-4)


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads((path / "adapter.json").read_text())
    data.update(changes)
    (path / "adapter.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "truncated or was changed"),
        ("changed", "truncated or was changed"),
        ("json", "not JSON"),
        ("version", "version"),
        ("missing", "no adapter.safetensors"),
        ("weights", "base weight of 'query'"),
        ("rank", "rank"),
        ("sigma", "sigma"),
    ],
)
def test_bad_adapters_are_refused(tmp_path: Path, fault: str, message: str) -> None:
    base = Net()
    lxk.save_adapter(trained(base), tmp_path)
    tensors = tmp_path / "adapter.safetensors"
    data = tensors.read_bytes()
    target = copy.deepcopy(base)
    if fault == "truncated":
        tensors.write_bytes(data[:-8])
    elif fault == "changed":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "json":
        (tmp_path / "adapter.json").write_text("{")
    elif fault == "version":
        _edit(tmp_path, version=99)
    elif fault == "missing":
        tensors.unlink()
    elif fault == "weights":
        with torch.no_grad():
            target.query.weight[0, 0] += 1e-6
    elif fault == "rank":
        lxk.inject_lora_xs(target, config(rank=5))
    elif fault == "sigma":
        lxk.inject_lora_xs(target, config(sigma="B"))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    flags = [p.requires_grad for p in target.parameters()]
    with pytest.raises(ValueError, match=message):
        lxk.load_adapter(target, tmp_path)
    after = target.state_dict()
    assert set(before) == set(after) and all(torch.equal(v, after[k]) for k, v in before.items())
    assert flags == [p.requires_grad for p in target.parameters()]


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 3}, TypeError, "^x:"),
        ({"x": torch.randn(4, 8)}, ValueError, "^x:"),
        ({"x": torch.tensor(1.0)}, ValueError, "^x:"),
        ({"x": torch.zeros(4, 9, dtype=torch.int32)}, TypeError, "^x:"),
        ({"weight": torch.randn(7, 8)}, ValueError, "^weight:"),
        ({"weight": torch.randn(7, 9).double()}, TypeError, "^weight:"),
        ({"weight": torch.randn(7, 9, device="meta")}, ValueError, "^weight:"),
        ({"weight": None}, TypeError, "^weight:"),
        ({"A": torch.randn(3)}, ValueError, "^A:"),
        ({"R": torch.randn(3, 4)}, ValueError, "^R:"),
        ({"R": torch.randn(3, 3).half()}, TypeError, "^R:"),
        ({"R": torch.randn(2, 3, 3)}, ValueError, "^adapter_ids:"),
        ({"B": torch.randn(7, 4)}, ValueError, "^B:"),
        ({"bias": torch.randn(8)}, ValueError, "^bias:"),
        ({"scaling": "1"}, TypeError, "^scaling:"),
        ({"dropout_p": 1.0}, ValueError, "^dropout_p:"),
        ({"backend": "fast"}, ValueError, "^backend:"),
        ({"backend": "triton"}, RuntimeError, "^backend:.*triton"),
        ({"adapter_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "^adapter_ids:"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "x": torch.randn(4, 9),
        "weight": torch.randn(7, 9),
        "A": torch.randn(3, 9),
        "R": torch.randn(3, 3),
        "B": torch.randn(7, 3),
        "bias": torch.randn(7),
    }
    lxk.lora_xs_linear(**good)
    with pytest.raises(error, match=message):
        lxk.lora_xs_linear(**{**good, **changes})


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([0, 1, 2, 3]), ValueError),
        (torch.tensor([0, 1, -2, 1]), ValueError),
        (torch.tensor([0, 1]), ValueError),
        (torch.tensor([0.0, 1, 2, 0]), TypeError),
        ([0, 1, 2, 0], TypeError),
        (lxk.AdapterBatch([0, 1, 0, 1], 2), ValueError),
    ],
)
def test_wrong_ids(ids: Any, error: type[Exception]) -> None:
    p = problem(4, 9, 7, 3, adapters=3).to(torch.float32)
    with pytest.raises(error, match="adapter_ids"):
        lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, adapter_ids=ids)
    with pytest.raises(ValueError, match="base_out"):
        lxk.lora_xs_update(p.x, p.x, p.A, p.R, p.B, adapter_ids=torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"target_modules": []}, ValueError, "target_modules"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"sigma": "C"}, ValueError, "sigma"),
        ({"r_init": "ones"}, ValueError, "r_init"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_wrong_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("weight", "rank", "error", "message"),
    [
        (torch.full((4, 4), float("nan")), 2, ValueError, "weight.*NaN"),
        (torch.randn(4, 4), 5, ValueError, "rank"),
        (torch.randn(4), 1, ValueError, "weight"),
        (torch.zeros(0, 4), 1, ValueError, "weight"),
        (torch.ones(4, 4, dtype=torch.int64), 1, TypeError, "weight"),
    ],
)
def test_wrong_weights(weight: Tensor, rank: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lxk.lora_xs_factors(weight, rank)


# ---------------------------------------------------------------------------------- command line


def test_info() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loraxs_kernels", "info"], capture_output=True, text=True, check=True
    )
    for word in ("reference", "onednn", "triton", "packed copies", "float16"):
        assert word in done.stdout


def test_backend_of_the_environment() -> None:
    code = (
        "import torch, loraxs_kernels as l\n"
        "t = torch.randn\n"
        "l.lora_xs_linear(t(2, 4), t(3, 4), t(2, 4), t(2, 2), t(3, 2))\n"
    )
    for name, status in (("reference", 0), ("cuda", 1)):
        environment = {**os.environ, "LORAXS_BACKEND": name}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert status == 0 or "cuda" in done.stderr

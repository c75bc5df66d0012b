"""Derivatives, transforms, compilation, and what is saved for backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import loraxs_kernels as lxk
from tests.oracle import S, eager, problem


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


@pytest.mark.parametrize("rows", [10, 100, 600])
def test_backward_inside_autocast_of_a_forward_outside(rows: int) -> None:
    layer = lxk.LoRAXSLinear(40, 24, 4, r_std=1.0)
    x = torch.randn(rows, 40, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, layer.R), g, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, (x, layer.R), g)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compile_where_nothing_trains(mode: Any) -> None:
    layer = lxk.LoRAXSLinear(16, 12, 4, r_std=1.0)
    layer.R.requires_grad_(False)
    x = torch.randn(4, 16)
    with mode():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, layer(x))


def test_compile_of_a_transform() -> None:
    layer = lxk.LoRAXSLinear(16, 12, 4, r_std=1.0)
    x = torch.randn(4, 16)

    def loss(R: Tensor) -> Tensor:
        return lxk.lora_xs_linear(x, layer.weight, layer.A, R, layer.B).sin().sum()

    gradient = torch.func.grad(loss)
    got = torch.compile(gradient, fullgraph=True, backend="aot_eager")(layer.R.detach())
    torch.testing.assert_close(got, gradient(layer.R.detach()))


@pytest.mark.parametrize("argument", [1, 2, 3])
@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
def test_frozen_matrices_differentiated_at_an_outer_level(argument: int, outer: Any) -> None:
    p = problem(5, 7, 6, 3)

    def plain(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (x @ W.T + S * (x @ A.T @ p.R.T @ B.T)).sin().sum()

    def ours(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lxk.lora_xs_linear(x, W, A, p.R, B, scaling=S).sin().sum()

    operands = (p.x, p.weight, p.A, p.B)
    want, got = (outer(torch.func.grad(f), argument)(*operands) for f in (plain, ours))
    torch.testing.assert_close(got, want)


def test_vmap_checks_ids_before_it_folds_them() -> None:
    p = problem(5, 7, 6, 3)
    R, ids = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.int64)
    ids[0, 0] = 2

    def call(R: Tensor, ids: Tensor) -> Tensor:
        return lxk.lora_xs_linear(p.x, p.weight, p.A, R, p.B, adapter_ids=ids)

    with pytest.raises(ValueError, match="adapter_ids"):
        torch.vmap(call)(R, ids)


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


@pytest.mark.parametrize("seed", [[7], [7, 2, 20]], ids=["whole", "block of columns"])
def test_opcheck(seed: list[int]) -> None:
    p = problem(5, 9, 7, 3, adapters=2).to(torch.float32)
    ops = torch.ops.loraxs_kernels
    key = torch.tensor(seed)
    args = (p.x, p.weight, None, p.A, p.R, p.B, p.bias, key, p.ids, None, None, S, 0.2, 1, "")
    torch.library.opcheck(ops.forward.default, args)
    q = ops.forward(*args)[1]
    rest = (key, p.ids, None, None, S, 0.2, True, True, True, 1, "")
    torch.library.opcheck(ops.backward.default, (p.grad_y, q, p.weight, p.A, p.R, p.B, *rest))

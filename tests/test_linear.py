"""Values and gradients of the public functions, on every way a call can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loraxs_kernels as lxk
from tests.oracle import DTYPES, Case, S, check, frozen, problem, results

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

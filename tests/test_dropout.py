"""Dropout: the mask, its reproduction, its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import loraxs_kernels as lxk
from loraxs_kernels import dispatch, functional
from loraxs_kernels.backends import onednn, reference
from tests.oracle import Problem, S, frozen, problem, results


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


def test_the_expectation_is_the_layer_without_dropout() -> None:
    """The mean over masks, against its own spread: four standard errors of a mean of 400."""
    p = problem(6, 24, 10, 4)
    draws = torch.stack(
        [lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, dropout_p=0.3) for _ in range(400)]
    )
    want = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B)
    error = (draws.mean(0) - want) / (draws.std(0) / 20)
    assert error.abs().max() < 4.5 and error.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_with_a_core_per_row(backend: str, dtype: torch.dtype) -> None:
    """A row with a core of its own is the row of the call in which all have that core."""
    p = problem(21, 50, 30, 8, adapters=3).to(dtype, torch.float32)
    W, A, B = frozen(p)

    def run(R: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
        torch.manual_seed(5)
        q = Problem(p.x, p.weight, p.A, R, p.B, p.bias, p.grad_y)
        return results(
            lambda x, R, b: lxk.lora_xs_linear(
                x, W, A, R, B, b, scaling=S, dropout_p=0.4, adapter_ids=ids, backend=backend
            ),
            q,
        )

    got = run(p.R, p.ids)
    assert p.ids is not None
    for adapter in range(-1, 3):
        core = torch.zeros(8, 8) if adapter < 0 else p.R[adapter]
        single, rows = run(core, None), p.ids == adapter
        eps = torch.finfo(dtype).eps
        for name in ("y", "dx"):
            difference = (got[name][rows].double() - single[name][rows].double()).abs()
            assert (difference <= 2 * eps * single[name].double().abs().max()).all(), name


def test_dropout_mask_of_a_block_of_columns() -> None:
    key = torch.tensor([0x1234567890ABCDEF])
    whole = reference.dropout_mask(key, 5, 37, 0.3)
    for first, width in ((0, 37), (0, 9), (9, 20), (36, 1)):
        seed = reference.column_block_seed(key, first, 37)
        block = reference.dropout_mask(seed, 5, width, 0.3)
        assert torch.equal(block, whole[:, first : first + width])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20, 51, 30), (300, 96, 40)])
def test_dropout_on_blocks_of_columns(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """x and A cut into columns: the terms add up to the whole, gradients and all."""
    p = problem(*shape, 8).to(dtype)
    _, A, B = frozen(p)

    def run(columns: slice) -> list[Tensor]:
        torch.manual_seed(5)
        x, R = p.x[:, columns].requires_grad_(), p.R.clone().requires_grad_()
        part = frozen(Problem(p.x, p.weight[:, columns], p.A[:, columns], R, B, p.bias, p.grad_y))
        y = functional.linear(
            x, part[0], None, part[1], R, B, None, S, 0.4, None, backend, 1,
            (columns.start, shape[1]),
        )  # fmt: skip
        return [y, *torch.autograd.grad(y, (x, R), p.grad_y)]

    torch.manual_seed(5)
    x, R = p.x.clone().requires_grad_(), p.R.clone().requires_grad_()
    W = frozen(p)[0]
    y = lxk.lora_xs_linear(x, W, A, R, B, scaling=S, dropout_p=0.4, backend=backend)
    want = [y, *torch.autograd.grad(y, (x, R), p.grad_y)]
    cut = shape[1] // 3
    left, right = run(slice(0, cut)), run(slice(cut, shape[1]))
    got = [left[0] + right[0], torch.cat([left[1], right[1]], 1), left[2] + right[2]]
    for a, b in zip(got, want, strict=True):
        scale = float(b.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= 32 * torch.finfo(dtype).eps * scale


def test_a_backend_that_cannot_mask_a_block_of_columns_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = dispatch.Call("cpu", torch.float32, torch.float32, True, False, True, True)
    assert dispatch.choose(call, "onednn").name == "onednn"
    monkeypatch.delattr(onednn, "MASKS_COLUMN_BLOCKS")
    assert dispatch.choose(call, None).name == "reference"
    with pytest.raises(RuntimeError, match="block of columns"):
        dispatch.choose(call, "onednn")

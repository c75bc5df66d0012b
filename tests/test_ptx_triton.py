"""Triton kernels, compiled ahead of time for sm_80 and sm_90 and executed by the interpreter."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import errors
from tests.ptx import triton_samples as samples
from tests.ptx.triton_kernel import Compiled, Run, compile_kernel, run_kernel

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
M, N, K = 70, 88, 136


Tile = tuple[int, int, int]
SMALL = (64, 64, 32)


def compile_matmul(
    dtype: torch.dtype, arch: int, *, precision: str = "tf32", tile: Tile = SMALL,
    ones: tuple[str, str] = ("x_col", "w_col"), times: float = 1, divisible: bool = True,
) -> Compiled:  # fmt: skip
    pointers, sizes = ("x_ptr", "w_ptr", "y_ptr"), ("M", "N", "K")
    strides = [s for s in ("x_row", "x_col", "w_row", "w_col", "y_row") if s not in ones]
    signature = {
        **dict.fromkeys(pointers, f"*{NAMES[dtype]}"), **dict.fromkeys(sizes, "i32"),
        "scale": "fp32", **dict.fromkeys(strides, "i32"),
    }  # fmt: skip
    constants: dict[str, Any] = dict(zip(("BM", "BN", "BK"), tile, strict=True))
    constants.update({"PRECISION": precision, "X_TIMES": times, **dict.fromkeys(ones, 1)})
    facts = {}
    if divisible:  # K and the strides: whole 16-byte vectors
        facts = {**dict.fromkeys(pointers, 16), **dict.fromkeys(["K", *strides], 8)}
    return compile_kernel(samples.matmul, signature, constants, facts, arch=arch)


def multiply(
    compiled: Compiled, dtype: torch.dtype, inputs: float = 0.0, *, x_t: bool = False,
    w_t: bool = False, times: float = 1, tile: Tile = SMALL,
) -> Run:  # fmt: skip
    """Run, and check against float64.

    The bound: both inputs rounded to ``inputs`` of their size, K sums in fp32, one rounding of the
    result.
    """
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype)
    want = 0.5 * times * (x.double() @ w.double().T)
    terms = 0.5 * times * (x.double().abs() @ w.double().abs().T)
    x = x.T.contiguous().T if x_t else x
    w = w.T.contiguous().T if w_t else w
    y = torch.full((M, N), float("nan"), dtype=dtype)
    args = {
        "x_ptr": x, "w_ptr": w, "y_ptr": y, "M": M, "N": N, "K": K, "scale": 0.5,
        "x_row": x.stride(0), "x_col": x.stride(1), "w_row": w.stride(0), "w_col": w.stride(1),
        "y_row": N,
    }  # fmt: skip
    tiles = -(-M // tile[0]) * -(-N // tile[1])
    run = run_kernel(compiled, (tiles,), args, readonly=["x_ptr", "w_ptr"])
    assert (run.buffers["y_ptr"].write_counts == 1).all()
    bound = (2 * inputs + K * 2**-24) * terms + torch.finfo(dtype).eps * want.abs()
    assert ((y.double() - want).abs() <= bound).all()
    return run


CASES = [
    (torch.bfloat16, "tf32", 0.0),
    (torch.float16, "tf32", 0.0),
    (torch.float32, "tf32", 2**-11),
    (torch.float32, "tf32x3", 2**-21),
    (torch.float32, "ieee", 0.0),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "precision", "inputs"), CASES)
def test_matmul_with_tails(arch: int, dtype: torch.dtype, precision: str, inputs: float) -> None:
    compiled = compile_matmul(dtype, arch, precision=precision)
    report = multiply(compiled, dtype, inputs).report
    if precision == "ieee":
        assert report.tensor_flops == 0
        return
    times = 3 if precision == "tf32x3" else 1
    assert (
        report.tensor_flops == times * 2 * 128 * 128 * 160
    )  # whole tiles: 2 x 2 of 64, K up to 160
    loop = compiled.kernel.main_loop_lines()
    assert set(report.tensor_flops_by_line) & loop
    if dtype != torch.float32:
        assert not set(report.bank_conflicts) & loop
    kind = "wgmma.mma_async" if arch == 90 else "mma.sync"
    assert any(name.startswith(kind) for name in report.instructions)
    # X comes once for each of 2 column tiles, W for each of 2 row tiles, in 16-byte pieces.
    assert set(report.load_widths) == {16}
    assert report.global_load_bytes == 2 * (M + N) * K * dtype.itemsize
    assert report.global_store_bytes == M * N * dtype.itemsize


@pytest.mark.parametrize(
    ("arch", "x_t", "w_t"), [(80, True, True), (90, False, True), (90, True, True)]
)
def test_transposed_operands(arch: int, x_t: bool, w_t: bool) -> None:
    ones = ("x_row" if x_t else "x_col", "w_row" if w_t else "w_col")
    compiled = compile_matmul(torch.float16, arch, ones=ones)
    # A transposed x has the stride M = 70: the compiler may not be told that it is divisible.
    if x_t:
        with pytest.raises(
            errors.ArgumentError, match="x_col: compiled for multiples of 8, got 70"
        ):
            multiply(compiled, torch.float16, x_t=x_t, w_t=w_t)
        compiled = compile_matmul(torch.float16, arch, ones=ones, divisible=False)
    multiply(compiled, torch.float16, x_t=x_t, w_t=w_t)


@pytest.mark.parametrize("tile", [(64, 64, 16), (64, 128, 64)])
def test_tiles_with_other_swizzles(tile: tuple[int, int, int]) -> None:
    compiled = compile_matmul(torch.bfloat16, 90, tile=tile)
    multiply(compiled, torch.bfloat16, tile=tile)


def test_an_operand_that_passes_through_registers() -> None:
    compiled = compile_matmul(torch.bfloat16, 90, times=2)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    multiply(compiled, torch.bfloat16, times=2)


def test_without_alignment_facts_loads_are_narrow() -> None:
    run = multiply(compile_matmul(torch.bfloat16, 80, divisible=False), torch.bfloat16)
    assert set(run.report.load_widths) == {2}
    assert not any(name.startswith("cp.async") for name in run.report.instructions)


def test_tensor_descriptors() -> None:
    types = {
        "x_ptr": "*bf16",
        "w_ptr": "*bf16",
        "y_ptr": "*bf16",
        "M": "i32",
        "N": "i32",
        "K": "i32",
    }
    facts = {"x_ptr": 16, "w_ptr": 16, "y_ptr": 16, "K": 8, "N": 8}
    constants = {"BM": 64, "BN": 64, "BK": 64}
    compiled = compile_kernel(samples.matmul_tma, types, constants, facts, arch=90)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, K, generator=g).bfloat16() for rows in (M, N))
    y = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    run = run_kernel(
        compiled,
        (2, 2),
        {"x_ptr": x, "w_ptr": w, "y_ptr": y, "M": M, "N": N, "K": K},
        readonly=["x_ptr", "w_ptr"],
    )
    want, terms = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert ((y.double() - want).abs() <= K * 2**-24 * terms + 2**-7 * want.abs()).all()
    assert (run.buffers["y_ptr"].write_counts == 1).all()
    assert any(name.startswith("cp.async.bulk.tensor") for name in run.report.instructions)


@pytest.mark.parametrize(("corner", "columns"), [((0, 0), 40), ((60, 32), 40), ((-5, 8), 64)])
def test_descriptors_made_on_the_host(corner: tuple[int, int], columns: int) -> None:
    """A box, also one that reaches out of the tensor (zeros), of rows that lie apart."""
    types = {"x_desc": "tensordesc<fp16[32,64]>", "y_ptr": "*fp16", "row": "i32", "column": "i32"}
    compiled = compile_kernel(samples.copy_box, types, {"BM": 32, "BN": 64}, ["y_ptr"], arch=90)
    x = torch.randn(70, 72, generator=torch.Generator().manual_seed(0)).half()[:, :columns]
    y = torch.full((32, 64), float("nan"), dtype=torch.float16)
    described = TensorDescriptor(x, list(x.shape), list(x.stride()), [32, 64])
    run = run_kernel(compiled, (1,), [described, y, *corner], readonly=["x_desc"])
    padded = torch.zeros(200, 200, dtype=torch.float16)
    padded[50 : 50 + 70, 50 : 50 + columns] = x
    row, column = 50 + corner[0], 50 + corner[1]
    assert torch.equal(y, padded[row : row + 32, column : column + 64])
    assert run.report.global_load_bytes < 32 * 64 * 2


def test_a_descriptor_of_another_padding_is_refused() -> None:
    types = {"x_desc": "tensordesc<fp16[32,64]>", "y_ptr": "*fp16", "row": "i32", "column": "i32"}
    compiled = compile_kernel(samples.copy_box, types, {"BM": 32, "BN": 64}, ["y_ptr"], arch=90)
    x, y = torch.zeros(64, 64).half(), torch.zeros(32, 64).half()
    described = TensorDescriptor(x, [64, 64], [64, 1], [32, 64], padding="nan")
    with pytest.raises(errors.ArgumentError, match="padded with zeros"):
        run_kernel(compiled, (1,), [described, y, 0, 0])


def run_publish(arch: int, barrier: bool, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    types = {
        "counter_ptr": "*i32",
        "flag_ptr": "*i32",
        "q_ptr": "*fp32",
        "x_ptr": "*fp32",
        "y_ptr": "*fp32",
        "seed": "i32",
        "n": "i32",
    }
    constants = {"BLOCK": 256, "BARRIER": barrier}
    compiled = compile_kernel(
        samples.publish, types, constants, ["q_ptr", "x_ptr", "y_ptr"], arch=arch
    )
    counter, flag = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    x, q, y = (
        torch.randn(200, generator=torch.Generator().manual_seed(0)),
        torch.zeros(256),
        torch.zeros(4, 256),
    )
    run_kernel(
        compiled,
        (4,),
        {
            "counter_ptr": counter,
            "flag_ptr": flag,
            "q_ptr": q,
            "x_ptr": x,
            "y_ptr": y,
            "seed": 7,
            "n": 200,
        },
        **options,
    )
    assert counter.item() == 4 and 0.3 < (q[:200] != 0).double().mean() < 0.7
    assert torch.equal(q[:200][q[:200] != 0], x[q[:200] != 0])
    return q, y


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("order", ["linear", "reversed", "random"])
def test_tickets_never_deadlock(arch: int, order: str) -> None:
    for residency in (1, 2, None):
        chosen = random.Random(3) if order == "random" else order
        q, y = run_publish(arch, True, order=chosen, residency=residency)
        assert torch.allclose(y[1:], (q + q.sum()).expand(3, 256), atol=1e-4) and not y[0].any()


@pytest.mark.parametrize("arch", [80, 90])
def test_a_release_without_a_barrier_before_it_is_found(arch: int) -> None:
    with pytest.raises(errors.GlobalRace, match="q_ptr"):
        run_publish(arch, False)


def test_tensors_that_overlap_share_their_memory() -> None:
    types = {
        "counter_ptr": "*i32",
        "flag_ptr": "*i32",
        "q_ptr": "*fp32",
        "x_ptr": "*fp32",
        "y_ptr": "*fp32",
        "seed": "i32",
        "n": "i32",
    }
    compiled = compile_kernel(samples.publish, types, {"BLOCK": 256, "BARRIER": True})
    flags, data = torch.zeros(2, dtype=torch.int32), torch.randn(456)
    x = data[256:].clone()
    y = torch.zeros(2, 256)
    run = run_kernel(compiled, (2,), [flags[:1], flags[1:], data[:256], data[256:], y, 7, 200])
    assert flags.tolist() == [2, 1] and torch.equal(data[256:], x)
    assert run.buffers["q_ptr"] is run.buffers["x_ptr"]
    assert torch.allclose(
        y[1], torch.where(torch.arange(256) < 200, data[:256], 0) + data[:200].sum(), atol=1e-4
    )
